"""Routing of real drawings and clips in tiny models, and its page."""

import json
import math
from copy import copy
from dataclasses import replace

import pandas as pd
import pytest
import torch

from moe.analysis import expert_table, usage
from moe.config import LIMoEConfig
from moe.routers import ExpertChoice, TokenChoice
from omnivl.architectures import CLIP, OmniVL, Unified
from omnivl.architectures.build import build_chain
from omnivl.chain.gather import LocalGather
from omnivl.data.tokenizer import load_tokenizer
from omnivl.errors import UserError
from omnivl.inference.encoder import Encoder
from omnivl.inference.pictures import PictureSet
from omnivl.objectives import UniVLC
from omnivl.parts.sizes import Transformer
from omnivl.tasks import RoutingTask
from omnivl.tasks.results import write_files
from omnivl.tasks.routing.page import routing_page, write_table
from omnivl.tasks.routing.tokens import CLASS_TOKEN, experts_by_layer, routed_tokens
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
