"""Who went where, of real drawings and clips through tiny models, and the page of it."""

from dataclasses import replace

import pandas as pd
import pytest
import torch

from moe.config import LIMoEConfig
from moe.router_losses import RouterLossConfig
from omnivl.data.tokenizer import load_tokenizer
from omnivl.errors import UserError
from omnivl.evaluation.encoder import Encoder
from omnivl.evaluation.pictures import PictureSet
from omnivl.evaluation.routing import CLASS_TOKEN, routed_tokens
from omnivl.evaluation.routing_page import routing_page, write_table
from omnivl.model.build import build_chain
from omnivl.model.gather import LocalGather
from omnivl.model.presets import PRESETS
from omnivl.objectives import UniVLC

TOKENIZER = load_tokenizer("emoji")
LIMOE = LIMoEConfig(num_experts=4, top_k=2, every=1, noise=0.0, losses=RouterLossConfig(load=0.0))
MODEL = replace(
    PRESETS["tiny"],
    **{"hidden_size": 16, "num_heads": 2, "vision_layers": 2, "text_layers": 2, "alignment_layers": 1},
    **{"generation_layers": 1, "image_size": 16, "video_size": 16, "num_frames": 4, "tubelet_size": 2},
    **{"patch_size": 8, "vocab_size": TOKENIZER.special.vocab_size, "ffn": LIMOE},
)
ARCHITECTURES = {"towers": MODEL, "unified": replace(MODEL, architecture="unified")}


def encoder_of(model) -> Encoder:
    torch.manual_seed(0)
    chain = build_chain(model, (UniVLC(),), TOKENIZER.special).eval()
    return Encoder(chain, model, TOKENIZER, LocalGather(), torch.device("cpu"), batch_size=4)


def pictures_of(model, media="image", count=6) -> PictureSet:
    return PictureSet("emoji", media, {}, model, count)


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
    layers = {"towers": {"visual_00", "visual_01", "text_00", "text_01"}, "unified": {"unified_00", "unified_01"}}
    assert set(table["layer"]) == layers[model.architecture]
    visual = table[table["modality"] == media]
    assert sorted(visual["frame"].unique()) == ([CLASS_TOKEN, 0, 2] if media == "video" else [CLASS_TOKEN, 0])
    assert sorted(visual["row"].unique()) == sorted(visual["column"].unique()) == [CLASS_TOKEN, 0, 1]
    first = table[(table["modality"] == "text") & (table["sample"] == 0) & (table["choice"] == 0)]
    spoken = first[first["layer"] == first["layer"].iloc[0]].sort_values("position")["word"].tolist()
    assert spoken[0] == "[CLS]"
    assert spoken[-1] == "[SEP]"
    assert " ".join(spoken[1:-1]) == TOKENIZER.decode(encoder.token_ids([pictures.captions[0]])[0].tolist())
    assert first["label"].iloc[0] == pictures.samples[0].label


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


def test_what_a_capacity_drops_is_noted_and_padding_is_not():
    short = replace(LIMOE, capacity_factor=0.5)
    for architecture in ARCHITECTURES.values():
        model = replace(architecture, ffn=short)
        encoder, pictures = encoder_of(model), pictures_of(model, count=4)
        table = routed_tokens(encoder, pictures)
        name = "unified_00" if model.architecture == "unified" else "visual_00"
        own = table[(table["layer"] == name) & (table["modality"] == "image")]
        # 20 tokens with two choices of 4 experts: half of their 40 choices is 5 an expert, rounded up to 8.
        assert own[own["served"]]["expert"].value_counts().max() <= 8
        chosen = own["expert"].value_counts()
        assert len(own[~own["served"]]) == (chosen - 8).clip(lower=0).sum() > 0
    assert routed_tokens(encoder_of(MODEL), pictures_of(MODEL))["served"].all()


def test_where_experts_choose_a_token_has_a_row_for_each_that_took_it():
    choosing = replace(LIMOE, routing="expert_choice")
    model = replace(ARCHITECTURES["unified"], ffn=choosing)
    encoder, pictures = encoder_of(model), pictures_of(model, count=4)  # one batch, as the encoder has it
    table = routed_tokens(encoder, pictures, texts=False)
    own = table[table["layer"] == "unified_00"]
    tokens = 4 * 5  # four pictures of four patches and a class token; two experts each in the mean
    assert own["expert"].value_counts().to_dict() == dict.fromkeys(range(4), tokens * 2 // 4)
    assert not own.duplicated(["token", "expert"]).any()
    assert own["served"].all()
    assert own.groupby("token", observed=True)["choice"].apply(lambda one: sorted(one) == list(range(len(one)))).all()
    page = routing_page(routed_tokens(encoder, pictures), 4, pictures, model.patch_size, "Routing")
    assert "unified_00: load by expert" in page


def test_the_page_shows_layers_figures_and_galleries(tmp_path):
    model = ARCHITECTURES["unified"]
    pictures = pictures_of(model)
    table = routed_tokens(encoder_of(model), pictures)
    page = routing_page(table, 4, pictures, model.patch_size, "Routing of <x>")
    assert "Routing of &lt;x&gt;" in page
    assert page.count("data:image/png;base64,") >= 8
    for text in ("unified_00: load by expert", "From unified_00 to unified_01", "expert 0", "[CLS]"):
        assert text in page
    assert "<script src=" not in page, "the page needs nothing else"
    write_table(table, tmp_path / "routing.parquet")
    again = pd.read_parquet(tmp_path / "routing.parquet")
    assert len(again) == len(table)
    assert again["expert"].tolist() == table["expert"].tolist()


def test_a_model_without_routers_is_told_so():
    model = replace(PRESETS["tiny"], **{**vars(MODEL), "ffn": PRESETS["tiny"].ffn})
    with pytest.raises(UserError, match=r"model.ffn: got kind 'dense', .* allowed are 'limoe' and 'mome_limoe'"):
        routed_tokens(encoder_of(model), pictures_of(model))
