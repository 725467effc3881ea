"""The attention of texts to patches: which position's it is, where each patch lies, and what has none."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from small_flamingo import FLAMINGO, FROZEN

from omnivl.architectures import ALBEF, BLIP2, GIT, Architecture, CoCa, OmniVL, Unified, ViLT
from omnivl.architectures.build import build_chain
from omnivl.chain.gather import LocalGather
from omnivl.chain.objective import Objective
from omnivl.data.sources.base import Sample
from omnivl.data.tokenizer import WordPieceTokenizer
from omnivl.inference.encoder import Encoder
from omnivl.inference.patch_attention import PatchAttention, _last_blocks, patch_attention
from omnivl.inference.pictures import Media, PictureSet
from omnivl.inference.predict import predict
from omnivl.objectives import LM, VQA, Answer, InterleavedLM, PrefixLM, Recognize
from omnivl.parts.attended import attending
from omnivl.parts.sizes import Transformer, Words

WORDS = ["red", "cat", "sun", "on", "a", "tree"]
TOKENIZER = WordPieceTokenizer(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", *WORDS])
NARROW = Transformer(hidden_size=16, num_heads=2, layers=2)
BERT = replace(NARROW, norm="post", norm_eps=1e-12)
OMNIVL = OmniVL(
    **{"hidden_size": 16, "num_heads": 2, "vision_layers": 2, "text_layers": 1, "alignment_layers": 2},
    **{"generation_layers": 2, "image_size": 32, "video_size": 32, "num_frames": 4, "patch_size": 8},
    **{"text_length": 8, "vocab_size": 12, "projection_size": 8, "momentum": None},
)
ALBEF_SMALL = ALBEF(
    **{"vision": NARROW, "text": BERT, "fusion": BERT, "image_size": 32, "patch_size": 8, "text_length": 8},
    **{"vocab_size": 12, "projection_size": 8, "momentum": None},
)
VILT = ViLT(blocks=NARROW, words=Words(length=8, vocab_size=12), image_size=32, patch_size=8)
BLIP2_SMALL = BLIP2(
    vision=NARROW,
    qformer=BERT,
    num_queries=4,
    words=Words(length=8, vocab_size=12),
    image_size=32,
    patch_size=8,
    projection_size=8,
)
SQUARES = {"image_size": 32, "patch_size": 8, "text_length": 8, "vocab_size": 12}
COCA_SMALL = CoCa(
    vision=NARROW, text=NARROW, multimodal=NARROW, caption_queries=4, pooler_heads=2, projection_size=8, **SQUARES
)
GIT_SMALL = GIT(vision=NARROW, decoder=BERT, **SQUARES)
FLAMINGO_SMALL, FROZEN_SMALL = (replace(one, image_size=32, patch_size=8) for one in (FLAMINGO, FROZEN))
CHOOSES = VQA(answers=("red", "cat"))
TEXTS = ["red cat", "a sun on a tree", "tree"]


def encoder(model: Architecture, *objectives: Objective, batch_size: int = 16) -> Encoder:
    torch.manual_seed(0)
    chain = build_chain(model, objectives, TOKENIZER.special).eval()
    for parameter in chain.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.2)
    return Encoder(chain, model, TOKENIZER, LocalGather(), torch.device("cpu"), batch_size)


def noise(model: Architecture, media: Media, sides: Sequence[tuple[int, int]] = ((32, 32),) * 3) -> PictureSet:
    random = np.random.default_rng(0)
    count = 1 if media == "image" else 4
    samples = [
        Sample(str(place), str(place), frames=random.integers(0, 256, (count, height, width, 3), dtype=np.uint8))
        for place, (width, height) in enumerate(sides)
    ]
    return PictureSet.of(samples, media, model.inputs)


def attention(made: Encoder, objective: str, pictures: PictureSet, texts: Sequence[str] = TEXTS) -> PatchAttention:
    with torch.no_grad():
        found = patch_attention(made, objective, pictures, texts)
    assert found is not None and found.pictures is pictures
    for grid, share in zip(found.grids, found.shares, strict=True):
        assert grid.sum() == pytest.approx(1, abs=1e-5) and (grid > 0).all()
        assert 0 < share < 1, "the class token has a part"
    return found


CASES: list[tuple[Architecture, Media]] = [
    *[(model, "image") for model in (OMNIVL, ALBEF_SMALL, VILT, Unified.like(OMNIVL))],
    *[(model, "video") for model in (OMNIVL, Unified.like(OMNIVL))],
]


@pytest.mark.parametrize(("model", "media"), CASES, ids=lambda one: getattr(one, "kind", one))
def test_it_is_that_of_the_position_that_the_head_reads(model: Architecture, media: Media) -> None:
    made, pictures = encoder(model, CHOOSES), noise(model, media)
    found = attention(made, "vqa", pictures)
    times = 1 if media == "image" else 4
    assert {grid.shape for grid in found.grids} == {(times, 4, 4)}
    assert found.reader == "the text's first position, which the head reads" and found.num_heads == 2
    with torch.no_grad(), attending(_last_blocks(made.chain)) as heard:
        predict(made.chain, "vqa", pictures.frames(range(3)), made.token_ids(TEXTS))
    assert heard[-1].layer == found.layer
    weights = heard[-1].weights[:, 0, 1:].reshape(3, times, 4, 4).numpy()
    for own, grid, share in zip(weights, found.grids, found.shares, strict=True):
        np.testing.assert_allclose(grid * share, own, rtol=1e-5)
    joined = isinstance(model, ViLT | Unified)
    assert found.layer == {"albef": "alignment_01", "omnivl": "alignment_01", "vilt": "fused_01"}.get(
        model.kind, "unified_01"
    )
    sums = heard[-1].weights[:, 0].sum(-1)
    torch.testing.assert_close(sums, torch.ones(3)) if not joined else torch.testing.assert_close(sums < 1, sums > 0)


@pytest.mark.parametrize(("model", "media"), CASES, ids=lambda one: getattr(one, "kind", one))
def test_a_patch_that_changes_is_where_the_attention_changes(model: Architecture, media: Media) -> None:
    """The patch in the second row and fourth column, of a clip that of the third frame."""
    if isinstance(model, ViLT):  # whose second block reads patches that have seen each other
        model = replace(model, blocks=replace(model.blocks, layers=1))
    made, pictures = encoder(model, CHOOSES), noise(model, media)
    before = attention(made, "vqa", pictures).grids[1]
    frames = pictures.samples[1].frames
    assert frames is not None
    time = min(2, len(frames) - 1)
    frames[time, 8:16, 24:32] = [255, 0, 255]
    after = attention(made, "vqa", pictures).grids[1]
    changed = np.abs(np.log(after / before))
    assert np.unravel_index(int(changed.argmax()), changed.shape) == (time, 1, 3)


def test_of_an_answer_that_is_written_it_is_the_mean_over_the_question() -> None:
    """The decoder looks at the states of the question's words, and these at the picture."""
    made, pictures = encoder(OMNIVL, Answer(length=4)), noise(OMNIVL, "image")
    found = attention(made, "answer", pictures)
    assert (found.layer, found.reader) == ("alignment_01", "the text's words")
    ids = made.token_ids(TEXTS)
    with torch.no_grad(), attending(_last_blocks(made.chain)) as heard:
        patch_attention(made, "answer", pictures, TEXTS)
    for place, count in enumerate((ids != TOKENIZER.special.pad).sum(1).tolist()):
        mean = heard[-1].weights[place, :count, 1:].mean(0).reshape(1, 4, 4).numpy()
        np.testing.assert_allclose(found.grids[place] * found.shares[place], mean, rtol=1e-5)


def test_of_a_caption_it_is_the_mean_over_the_positions_that_wrote_its_words() -> None:
    made, pictures = encoder(OMNIVL, LM()), noise(OMNIVL, "image")
    found = attention(made, "lm", pictures, ["red cat", "", "tree"])
    assert (found.layer, found.reader) == ("generation_01", "the written words")
    with torch.no_grad(), attending(_last_blocks(made.chain)) as heard:
        patch_attention(made, "lm", pictures, ["red cat", "", "tree"])
    weights = heard[-1].weights[:, :, 1:]
    assert weights.shape == (3, 3, 16), "the start and two words"
    for place, count in enumerate((2, 1, 1)):  # the start writes the first word, that one the second
        mean = weights[place, :count].mean(0).reshape(1, 4, 4).numpy()
        np.testing.assert_allclose(found.grids[place] * found.shares[place], mean, rtol=1e-5)
    other = attention(made, "lm", pictures, ["red tree", "cat", "tree"])
    np.testing.assert_allclose(other.grids[2], found.grids[2], rtol=1e-5)
    assert np.abs(other.grids[0] - found.grids[0]).max() < 1e-6, "a word is seen by those after it alone"


def test_a_sample_has_the_same_in_any_batch() -> None:
    few, many = (encoder(OMNIVL, CHOOSES, batch_size=size) for size in (1, 64))
    pictures = noise(OMNIVL, "image")
    one, other = (attention(made, "vqa", pictures) for made in (few, many))
    for first, second in zip(one.grids, other.grids, strict=True):
        np.testing.assert_allclose(first, second, rtol=1e-4)


@pytest.mark.parametrize("model", [OMNIVL, Unified.like(OMNIVL), VILT], ids=lambda one: one.kind)
def test_pictures_of_their_own_sizes_have_their_own_grids(model: Architecture) -> None:
    """What fills a batch's rows up has no attention."""
    own = replace(model, sizes="native")
    pictures = noise(own, "image", [(32, 32), (48, 16), (8, 16)])
    together, alone = (attention(encoder(own, CHOOSES, batch_size=size), "vqa", pictures) for size in (64, 1))
    assert [grid.shape for grid in together.grids] == [(1, 4, 4), (1, 2, 6), (1, 2, 1)]
    for first, second in zip(together.grids, alone.grids, strict=True):
        np.testing.assert_allclose(first, second, rtol=1e-4)


@pytest.mark.parametrize(
    ("model", "objective"),
    [
        *[(OMNIVL, Recognize(classes=("a", "b"))), (BLIP2_SMALL, CHOOSES), (COCA_SMALL, LM()), (GIT_SMALL, LM())],
        *[(FLAMINGO_SMALL, InterleavedLM()), (FROZEN_SMALL, PrefixLM())],
    ],
    ids=["text", "layer", "queries", "joint layer", "pictures", "prefix"],
)
def test_there_is_none_where_no_text_or_no_layer_reads_both(model: Architecture, objective: Objective) -> None:
    made = encoder(model, objective)
    with torch.no_grad():
        assert patch_attention(made, objective.key, noise(model, "image"), TEXTS) is None
