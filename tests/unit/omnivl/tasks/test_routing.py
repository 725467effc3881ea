"""Routing of real drawings and clips in tiny models, and its page."""

import base64
import io
import itertools
import json
import math
import re
from copy import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from moe.analysis import expert_table, usage
from moe.config import LIMoEConfig, MoMELIMoEConfig
from moe.routers import ExpertChoice, TokenChoice
from omnivl.api.model import Model, Origin
from omnivl.architectures import CLIP, OmniVL, Unified
from omnivl.architectures.build import build_chain
from omnivl.chain.gather import LocalGather
from omnivl.data.sources.base import Sample
from omnivl.data.tokenizer import load_tokenizer
from omnivl.errors import UserError
from omnivl.inference.encoder import Encoder
from omnivl.inference.pictures import PictureSet
from omnivl.objectives import UniVLC
from omnivl.parts.sizes import Transformer
from omnivl.tasks import RoutingTask
from omnivl.tasks.needs import Provided
from omnivl.tasks.results import write_files
from omnivl.tasks.routing.charts import decimals, percent
from omnivl.tasks.routing.forced import Forced, experts_said, forced_by, idle, told
from omnivl.tasks.routing.maps import NOBODY, expert_colour, expert_grid, paint
from omnivl.tasks.routing.page import routing_page, write_table
from omnivl.tasks.routing.tokens import CLASS_TOKEN, experts_by_layer, joined, routed_tokens
from omnivl.tasks.run import run_tasks

TOKENIZER = load_tokenizer("emoji")
LIMOE = LIMoEConfig(num_experts=4, every=1, router=TokenChoice(top_k=2).without_noise())
MODEL = replace(
    OmniVL.presets["tiny"],
    **{"hidden_size": 16, "num_heads": 2, "vision_layers": 2, "text_layers": 2, "alignment_layers": 1},
    **{"generation_layers": 1, "image_size": 16, "video_size": 16, "num_frames": 4, "tubelet_size": 2},
    **{"patch_size": 8, "vocab_size": TOKENIZER.special.vocab_size, "ffn": LIMOE},
)
ARCHITECTURES = {"towers": MODEL, "unified": Unified.like(MODEL)}


def encoder_of(model) -> Encoder:
    torch.manual_seed(0)
    chain = build_chain(model, (UniVLC(),), TOKENIZER.special).eval()
    return Encoder(chain, model, TOKENIZER, LocalGather(), torch.device("cpu"), batch_size=4)


def table_of(encoder: Encoder, pictures: PictureSet):
    """Where tokens went, and how many experts there were."""
    table = routed_tokens(encoder, pictures)
    return table, experts_by_layer(encoder.model, table)


def pictures_of(model, media="image", count=6) -> PictureSet:
    return PictureSet("emoji", media, {}, model.inputs, count)


@pytest.mark.parametrize("model", ARCHITECTURES.values(), ids=ARCHITECTURES)
@pytest.mark.parametrize("media", ["image", "video"])
def test_every_token_is_noted_once_per_layer_and_choice(model, media):
    encoder, pictures = encoder_of(model), pictures_of(model, media)
    table = routed_tokens(encoder, pictures)
    words = sum(int((encoder.token_ids([text]) != TOKENIZER.special.pad).sum()) for text in pictures.captions)
    patches = 1 + (2 if media == "video" else 1) * 4
    assert (table.groupby(["layer", "choice", "token"], observed=True).size() == 1).all()
    for _, part in table[table["choice"] == 0].groupby(["layer", "modality"], observed=True):
        assert len(part) == (words if part["modality"].iloc[0] == "text" else 6 * patches)
    layers = {"omnivl": {"visual_00", "visual_01", "text_00", "text_01"}, "unified": {"unified_00", "unified_01"}}
    assert set(table["layer"]) == layers[model.kind]
    visual = table[table["modality"] == media]
    assert sorted(visual["frame"].unique()) == ([CLASS_TOKEN, 0, 2] if media == "video" else [CLASS_TOKEN, 0])
    assert sorted(visual["row"].unique()) == sorted(visual["column"].unique()) == [CLASS_TOKEN, 0, 1]
    first = table[(table["modality"] == "text") & (table["sample"] == 0) & (table["choice"] == 0)]
    spoken = first[first["layer"] == first["layer"].iloc[0]].sort_values("position")["word"].tolist()
    assert spoken[0] == "[CLS]"
    assert spoken[-1] == "[SEP]"
    assert " ".join(spoken[1:-1]) == TOKENIZER.decode(encoder.token_ids([pictures.captions[0]])[0].tolist())
    assert first["label"].iloc[0] == pictures.samples[0].label


def test_the_end_is_noted_where_it_is_the_padding_as_well():
    """As in CLIP's own tokenizer."""
    tower = Transformer(hidden_size=16, num_heads=2, layers=1, ffn=LIMOE)
    model = replace(CLIP.presets["tiny"], vision=tower, text=replace(tower, layers=2))
    apart = encoder_of(model)
    same = replace(apart, tokenizer=copy(TOKENIZER))
    same.tokenizer.special = replace(TOKENIZER.special, pad=TOKENIZER.special.sep)
    same = replace(same, chain=build_chain(model, (UniVLC(),), same.tokenizer.special).eval())
    same.chain.load_state_dict(apart.chain.state_dict())
    words = []
    for encoder in (apart, same):
        table = routed_tokens(encoder, pictures_of(model))
        words.append(table[(table["modality"] == "text") & (table["choice"] == 0)]["word"].astype(str).tolist())
    assert words[0] == words[1]
    assert "[SEP]" in words[0]


@pytest.mark.parametrize("media", ["image", "video"])
def test_a_program_sees_the_pixels_of_the_task(media):
    """Also where other methods see whole pictures of their own sizes."""
    encoder = encoder_of(replace(MODEL, image_size=224, video_size=224, patch_size=16, sizes="native"))
    model = Model(encoder, Origin("plan", "stage", Path("weights"), None), {"stage": Provided(encoder.model, ())})
    pixels = np.random.default_rng(0).integers(0, 256, (1 if media == "image" else 4, 200, 1000, 3), dtype=np.uint8)
    pictures = PictureSet.of([Sample("a", "a", frames=pixels)], media, encoder.model.inputs)
    found = model.routing(pixels[0] if media == "image" else pixels, media=media)
    assert torch.equal(found.view, pictures.frames([0])[0])
    assert found.view.shape == (len(pixels), 3, 224, 224)
    pd.testing.assert_frame_equal(found.table, routed_tokens(encoder, pictures, texts=False))


@pytest.mark.parametrize("told", [(), (1, 4, 5)])
def test_samples_without_a_caption_are_shown_only(told):
    encoder, whole, some = encoder_of(MODEL), pictures_of(MODEL), pictures_of(MODEL)
    some.samples = [
        sample if place in told else replace(sample, captions=()) for place, sample in enumerate(whole.samples)
    ]
    table, all_of_them = routed_tokens(encoder, some), routed_tokens(encoder, whole)
    texts, visual = table[table["modality"] == "text"], table[table["modality"] == "image"]
    assert set(texts["sample"]) == set(told)
    assert len(visual) == (all_of_them["modality"] == "image").sum()
    wanted = all_of_them[(all_of_them["modality"] == "text") & all_of_them["sample"].isin(told)]
    assert texts["word"].astype(str).tolist() == wanted["word"].astype(str).tolist()


def test_experts_are_those_that_the_router_chose():
    model = ARCHITECTURES["unified"]
    encoder, pictures = encoder_of(model), pictures_of(model)
    table = routed_tokens(encoder, pictures, texts=False)
    heard = []
    router = encoder.chain.unified_00.block.ffn.router
    hook = router.register_forward_hook(lambda module, inputs, choice: heard.append(choice))
    with torch.no_grad():
        encoder.chain.encode_visual(pictures.frames([5]))
    hook.remove()
    own = table[(table["layer"] == "unified_00") & (table["sample"] == 5)]
    for choice in range(2):
        rows = own[own["choice"] == choice].sort_values("position")
        assert rows["expert"].tolist() == heard[0].expert_TK[:, choice].tolist()
        assert rows["gate"].tolist() == pytest.approx(heard[0].gate_TK[:, choice].tolist())


@pytest.mark.filterwarnings("ignore:capacity of")
def test_what_a_capacity_drops_is_noted_and_padding_is_not():
    short = replace(LIMOE, router=replace(LIMOE.router, capacity_factor=0.5))
    for architecture in ARCHITECTURES.values():
        model = replace(architecture, ffn=short)
        encoder, pictures = encoder_of(model), pictures_of(model, count=4)
        table = routed_tokens(encoder, pictures)
        name = "unified_00" if model.kind == "unified" else "visual_00"
        own = table[(table["layer"] == name) & (table["modality"] == "image")]
        # 20 tokens with two choices of 4 experts: half of their 40 choices is 5 an expert, rounded up to 8.
        assert own[own["served"]]["expert"].value_counts().max() <= 8
        chosen = own["expert"].value_counts()
        assert len(own[~own["served"]]) == (chosen - 8).clip(lower=0).sum() > 0
    assert routed_tokens(encoder_of(MODEL), pictures_of(MODEL))["served"].all()


def test_where_experts_choose_a_token_has_a_row_for_each_that_took_it():
    choosing = replace(LIMOE, router=ExpertChoice(experts_per_token=2.0))
    model = replace(ARCHITECTURES["unified"], ffn=choosing)
    encoder, pictures = encoder_of(model), pictures_of(model, count=4)  # one batch, as the encoder has it
    table = routed_tokens(encoder, pictures, texts=False)
    own = table[table["layer"] == "unified_00"]
    tokens = 4 * 5  # four pictures of four patches and a class token; two experts each in the mean
    assert own["expert"].value_counts().to_dict() == dict.fromkeys(range(4), tokens * 2 // 4)
    assert not own.duplicated(["token", "expert"]).any()
    assert own["served"].all()
    assert own.groupby("token", observed=True)["choice"].apply(lambda one: sorted(one) == list(range(len(one)))).all()
    page = routing_page(*table_of(encoder, pictures), pictures, model.patch_size, "Routing")
    assert "unified_00: load by expert" in page


class Twice(LocalGather):
    """Two replicas that hold the same."""

    replicas = 2

    def total(self, tensor):
        return 2 * tensor


@pytest.mark.parametrize("gather", [LocalGather(), Twice()])
def test_scores_are_means_over_the_layers_of_a_modality(gather):
    encoder = replace(encoder_of(MODEL), gather=gather)
    encoder.chain.train()
    (result,) = run_tasks([RoutingTask(name="who goes where", max_samples=6)], encoder)
    assert encoder.chain.training
    encoder.chain.eval()
    used = usage(*table_of(encoder, pictures_of(MODEL))).set_index(["layer", "modality"])
    assert [score.metric for score in result.scores] == [
        *["experts used, image", "entropy, image, nats", "dropped, image"],
        *["experts used, text", "entropy, text, nats", "dropped, text"],
    ]
    found = {score.metric: score.value for score in result.scores}
    for modality, layers in (("image", ("visual_00", "visual_01")), ("text", ("text_00", "text_01"))):
        first, second = (used.loc[(layer, modality)] for layer in layers)
        assert found[f"experts used, {modality}"] == pytest.approx((first.experts_used + second.experts_used) / 2)
        assert found[f"entropy, {modality}, nats"] == pytest.approx((first.local_entropy + second.local_entropy) / 2)
        assert found[f"dropped, {modality}"] == 0.0
    assert {(score.task, score.count, score.graded) for score in result.scores} == {("who goes where", 6, False)}
    assert {score.chance for score in result.scores} == {score.baseline for score in result.scores} == {None}


def test_where_experts_choose_drops_are_no_score():
    model = replace(ARCHITECTURES["unified"], ffn=replace(LIMOE, router=ExpertChoice(experts_per_token=2.0)))
    (result,) = run_tasks([RoutingTask(max_samples=4)], encoder_of(model))
    assert [score.metric for score in result.scores] == [
        *["experts used, image", "entropy, image, nats", "experts used, text", "entropy, text, nats"],
    ]


def test_page_and_table_lie_beside_the_results_and_not_in_them(tmp_path):
    tasks = [RoutingTask(name="<stills>", max_samples=4), RoutingTask(name="clips", media="video", max_samples=4)]
    results = run_tasks(tasks, encoder_of(MODEL))
    assert len(json.dumps([result.as_json() for result in results])) < 5000
    written = write_files(results, tmp_path, "evaluation-")
    names = ["routing.html", "routing.parquet", "routing-2.html", "routing-2.parquet"]
    assert written == [tmp_path / f"evaluation-{name}" for name in names]
    assert sorted(tmp_path.iterdir()) == sorted(written), "nothing is left over"
    assert "<h1>&lt;stills&gt;</h1>" in written[0].read_text()
    assert set(pd.read_parquet(written[3])["modality"]) == {"video", "text"}


def test_the_page_shows_layers_figures_and_galleries(tmp_path):
    model = ARCHITECTURES["unified"]
    pictures = pictures_of(model)
    table = routed_tokens(encoder_of(model), pictures)
    experts = dict.fromkeys(("unified_00", "unified_01"), 4)
    page = routing_page(table, experts, pictures, model.patch_size, "Routing of <x>")
    assert "Routing of &lt;x&gt;" in page
    assert page.count("data:image/png;base64,") >= 8
    for text in ("unified_00: load by expert", "From unified_00 to unified_01", "expert 0", "[CLS]"):
        assert text in page
    assert page.index("<h1>") < page.index('<section class="routing">') < page.index("Confidence by expert")
    assert "Share of its choices that an expert drops" not in page, "nothing is dropped"
    towers = routing_page(*table_of(encoder_of(MODEL), pictures), pictures, MODEL.patch_size, "Routing")
    assert "From text_00 to text_01" in towers
    assert "From text_01 to visual_00" not in towers, "no token passes both"
    assert "Labels by expert" not in page, "no label has three samples"
    shares = expert_table(table).set_index(["layer", "expert"]).loc[("unified_01", 2)]
    cells = [f"{int(shares.choices):,}", f"{100 * shares.load:.1f}%", "0.0%", f"{shares.entropy:.2f}"]
    cells += [f"{shares.confidence:.2f}", f"{100 * shares.image:.1f}%", f"{100 * shares.text:.1f}%"]
    row = "".join(f'<td class="number">{cell}</td>' for cell in ["2", *cells])
    assert row in page[page.index("<summary>unified_01") :]
    assert "<script src=" not in page, "the page needs nothing else"
    write_table(table, tmp_path / "routing.parquet")
    again = pd.read_parquet(tmp_path / "routing.parquet")
    assert len(again) == len(table)
    assert again["expert"].tolist() == table["expert"].tolist()


@pytest.mark.filterwarnings("ignore:capacity of")
def test_the_page_shows_labels_drops_and_experts_without_a_token():
    model = replace(ARCHITECTURES["unified"], ffn=replace(LIMOE, router=replace(LIMOE.router, capacity_factor=0.5)))
    pictures = PictureSet("emoji", "image", {"label": ("bugs", "fruit")}, model.inputs, 40)
    table = routed_tokens(encoder_of(model), pictures)
    experts = dict.fromkeys(("unified_00", "unified_01"), 20)
    page = routing_page(table, experts, pictures, model.patch_size, "Routing")
    for text in ("Labels by expert", "unified_00: labels", "all patches", "bugs", "that an expert drops"):
        assert text in page
    nothing = '<td class="number">19</td><td class="number">0</td>' + '<td class="number">-</td>' * 6
    assert page.count(nothing) == 2
    assert "<details><summary>unified_00" in page, "twenty rows are folded up"


def test_towers_may_have_other_numbers_of_experts():
    vision = Transformer(hidden_size=16, num_heads=2, layers=2, ffn=LIMOE)
    text = Transformer(hidden_size=12, num_heads=2, layers=2, ffn=replace(LIMOE, num_experts=2, every=2))
    sizes = {"image_size": 16, "patch_size": 8, "text_length": 16, "projection_size": 8}
    model = CLIP(vision=vision, text=text, vocab_size=TOKENIZER.special.vocab_size, **sizes)
    pictures = pictures_of(model)
    table, experts = table_of(encoder_of(model), pictures)
    assert experts == {"text_01": 2, "visual_00": 4, "visual_01": 4}
    used = usage(table, experts).set_index("layer")
    evenness = used["global_entropy"] / pd.Series(experts).map(math.log)
    assert used["evenness"].to_dict() == pytest.approx(evenness.to_dict())
    page = routing_page(table, experts, pictures, 8, "Routing")
    assert "choices of 2 or 4 experts in each routed layer" in page
    (result,) = run_tasks((RoutingTask(max_samples=6),), encoder_of(model))
    assert {score.task for score in result.scores} == {"routing"}


def test_a_model_without_routers_is_told_so():
    model = replace(OmniVL.presets["tiny"], **{**vars(MODEL), "ffn": OmniVL.presets["tiny"].ffn})
    with pytest.raises(UserError, match=r"model: got 'dense' layers, which .* allowed are 'limoe' and 'mome_limoe'"):
        routed_tokens(encoder_of(model), pictures_of(model))


def test_the_page_runs_no_script_and_fetches_nothing():
    pictures = pictures_of(MODEL)
    page = routing_page(*table_of(encoder_of(MODEL), pictures), pictures, MODEL.patch_size, "Routing")
    assert "<script" not in page
    assert "http" not in page
    assert len(page) < 1_000_000


def shown_pixels(page: str, mark: str) -> list[np.ndarray]:
    sources = re.findall(rf'<img {mark}src="data:image/png;base64,([^"]*)"', page)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(source))).convert("RGB")) for source in sources]


def test_whole_pictures_are_coloured_by_the_expert_of_each_patch():
    encoder, pictures = encoder_of(MODEL), pictures_of(MODEL, count=2)
    table, experts = table_of(encoder, pictures)
    page = routing_page(table, experts, pictures, MODEL.patch_size, "Routing")
    maps = shown_pixels(page, 'class="map" ')
    texts = re.findall(r'<img class="map" [^>]*alt="([^"]*)"', page)
    assert len(maps) == len(texts) == 2 * 2, "two pictures in two layers"
    own = table[(table["layer"] == "visual_01") & (table["sample"] == 1) & (table["choice"] == 0) & (table["row"] >= 0)]
    grid = own[own["modality"] == "image"].pivot(index="row", columns="column", values="expert").to_numpy()
    assert texts[3] == f"visual_01, expert of each patch: {grid[0, 0]} {grid[0, 1]} / {grid[1, 0]} {grid[1, 1]}"
    picture = pictures.frames([1])[0, 0].permute(1, 2, 0).numpy()
    assert maps[3].shape == (160, 160, 3), "16 pixels, ten times"
    for row in range(2):
        for column in range(2):
            for at in (0, 7):  # two corners of the patch
                mean = (picture[8 * row + at, 8 * column + at] + np.array(expert_colour(grid[row, column]))) / 2
                assert maps[3][80 * row + 10 * at, 80 * column + 10 * at].tolist() == pytest.approx(mean, abs=1)


def test_a_patch_that_no_expert_took_is_grey():
    rows = pd.DataFrame({"row": [0, 1], "column": [1, 0], "expert": [3, 2]})
    grid = expert_grid(rows, (4, 4), 2)
    assert grid.tolist() == [[NOBODY, 3], [2, NOBODY]]
    picture = np.full((4, 4, 3), (30, 60, 90), dtype=np.uint8)
    painted = paint(picture, grid)
    assert painted[:2, :2].reshape(-1, 3).tolist() == painted[2:, 2:].reshape(-1, 3).tolist() == [[60, 60, 60]] * 4
    half = [(value + own) / 2 for value, own in zip((30, 60, 90), expert_colour(3), strict=True)]
    assert painted[0, 2].tolist() == pytest.approx(half, abs=1)


def test_neighbours_differ_in_colour():
    colours = [expert_colour(expert) for expert in range(64)]
    assert len(set(colours)) == 64
    assert min(math.dist(one, other) for one, other in itertools.pairwise(colours)) > 100


def test_pictures_and_clips_are_on_one_page():
    model = ARCHITECTURES["unified"]
    encoder = encoder_of(model)
    sets = [pictures_of(model, count=3), pictures_of(model, "video", count=2)]
    tables = [routed_tokens(encoder, one) for one in sets]
    table = joined(tables)
    assert len(table) == sum(map(len, tables))
    assert (table.groupby(["layer", "choice", "token"], observed=True).size() == 1).all(), "captions are other tokens"
    page = routing_page(table, experts_by_layer(model, table), sets, model.patch_size, "Routing")
    assert "3 pictures and 2 clips." in page
    stills, clips = page.index("<h3>Pictures</h3>"), page.index("<h3>Clips</h3>")
    assert page[stills:clips].count('class="map"') == 3 * 2
    assert page[clips : page.index("Who uses which")].count('class="map"') == 2 * 2
    assert shown_pixels(page[clips:], 'class="map" ')[0].shape == (160, 320, 3), "two times of a clip, side by side"
    for modality in ("image", "video", "text"):
        assert f"unified_00, {modality}</td>" in page
    (result,) = run_tasks([RoutingTask(max_samples=3, both_media=True)], encoder)
    assert {score.metric for score in result.scores} >= {"experts used, image", "experts used, video"}
    assert {score.count for score in result.scores} == {6}


def tokens_of(layer, experts, modality):
    frame = pd.DataFrame({"layer": layer, "expert": experts, "modality": modality, "choice": 0})
    return frame.astype({"layer": "category", "modality": "category"})


def test_experts_without_work_are_told_in_words():
    tokens = tokens_of("a", [0] * 50 + [1] * 49 + [3], "image")
    # An even share is 100 / 6; expert 3 has less than a tenth of it.
    assert idle(tokens, {"a": 6}, Forced()) == [
        "a: experts 2, 4 to 5 of 6 got no token. Less than a tenth of an even share went to expert 3."
    ]
    assert idle(tokens_of("a", [0, 1], "image"), {"a": 2}, Forced()) == ["a: no expert is idle."]
    apart = Forced({"a": {"image": (True, True, False)}})
    assert idle(tokens_of("a", [0, 0], "image"), {"a": 3}, apart) == [
        "a: expert 1 of 3 got no token. Other modalities than these samples' belong to expert 2."
    ]
    assert [experts_said(one) for one in ([3], [0, 1, 2, 5], [])] == ["expert 3", "experts 0 to 2, 5", "experts none"]


def test_what_the_architecture_forces_is_marked_as_such():
    pools = MoMELIMoEConfig(pools={"image": 2, "video": 1, "text": 1}, common_experts=1, every=1, router=LIMOE.router)
    model = replace(ARCHITECTURES["unified"], ffn=pools)
    encoder, pictures = encoder_of(model), pictures_of(model)
    table, experts = table_of(encoder, pictures)
    forced = forced_by(model, table)
    assert forced.allowed["unified_00"] == {
        "image": (True, True, False, False, True),
        "text": (False, False, False, True, True),
    }
    assert told(table, experts, forced)[:2] == [
        "unified_00: image tokens may go to experts 0 to 1, 4 of 5 only.",
        "unified_00: text tokens may go to experts 3 to 4 of 5 only.",
    ]
    page = routing_page(table, experts, pictures, model.patch_size, "Routing", forced)
    cells = page[page.index("<summary>unified_01") :]
    rows = [re.findall(r'<td class="number([^"]*)"[^>]*>([^<]*)</td>', row) for row in cells.split("<tr>")[2:7]]
    forced_or_not = [["forced" in mark for mark, _ in row[-2:]] for row in rows]
    assert forced_or_not == [[False, False], [True, True], [False, False], [True, True], [False, False]]
    assert [text for _, text in rows[3][-2:]] == ["0.0%", "100.0%"]
    assert (
        "unified_01: expert 0 of 5 got no token. Other modalities than these samples&#39; belong to expert 2." in page
    )
    assert "partly forced" in page
    assert "of 2 allowed, 5 in all" in page
    assert "Forced by the architecture" not in routing_page(table, experts, pictures, model.patch_size, "Routing")


def test_layers_of_one_modality_and_experts_that_choose_are_forced_too():
    table, experts = table_of(encoder_of(MODEL), pictures_of(MODEL))
    sentences = told(table, experts, forced_by(MODEL, table))
    assert "visual_00: only image tokens pass, so that every choice is of image." in sentences
    model = replace(ARCHITECTURES["unified"], ffn=replace(LIMOE, router=ExpertChoice(experts_per_token=2.0)))
    table, experts = table_of(encoder_of(model), pictures_of(model))
    (first, _) = told(table, experts, forced_by(model, table))
    assert first == "unified_00: experts choose their tokens, equally many each; loads are equal, and none is idle."


def test_nothing_is_never_written_as_less_than_nothing():
    assert [percent(value) for value in (-0.0, -1e-9, -0.0004, 0.9999, math.nan)] == [*["0.0%"] * 3, "100.0%", "-"]
    assert percent(-0.004, 0) == "0%"
    assert decimals(-0.001) == "0.00"
    for model in ARCHITECTURES.values():
        page = routing_page(*table_of(encoder_of(model), pictures_of(model)), pictures_of(model), 8, "Routing")
        assert not re.search(r"[-\u2212]0(\.0+)?%?<", page)


def test_the_sum_of_all_choices_is_called_so():
    pictures = pictures_of(MODEL)
    table, experts = table_of(encoder_of(MODEL), pictures)
    page = routing_page(table, experts, pictures, MODEL.patch_size, "Routing")
    assert f"Their tokens made {len(table):,} choices in all layers together" in page


def test_texts_of_the_data_are_escaped_on_the_page():
    pictures = pictures_of(MODEL)
    for index, sample in enumerate(pictures.samples):
        pictures.samples[index] = replace(sample, label="<script>alert(1)</script>\u202e")
    page = routing_page(*table_of(encoder_of(MODEL), pictures), pictures, MODEL.patch_size, "Routing")
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;\\u202e" in page
