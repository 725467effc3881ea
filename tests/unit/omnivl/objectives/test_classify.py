"""Classification by names: its loss by the formula and from the encoders' embeddings, and what it leaves out."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import small_blip2
import small_clip
import small_coca
import small_towers
import torch
import torch.nn.functional as F
from small_language import LetterTokenizer
from tiny_chain import CONFIG, TOKENS

from omnivl.architectures import OmniVL, Unified
from omnivl.architectures.base import Architecture
from omnivl.architectures.build import build_chain
from omnivl.chain.gather import LocalGather
from omnivl.chain.layout import plan_layout
from omnivl.chain.objective import Heads, PrepareContext
from omnivl.chain.positions import IGNORED
from omnivl.chain.state import State, StepLayout
from omnivl.data.batch import Batch
from omnivl.data.special_tokens import SpecialTokens
from omnivl.data.tokenizer import TextReader
from omnivl.errors import UserError
from omnivl.objectives import MLM, Classify, Objective, UniVLC

NAMES = ("ox", "cat", "hen", "bee", "fly")
OWN = Classify(names=NAMES, prompt="a {name}")
WORDLESS = replace(CONFIG, text_layers=0, alignment_layers=0, generation_layers=0, text_pooling="mean")
MODELS: dict[str, Architecture] = {
    "omnivl": CONFIG,
    "bag of words": replace(WORDLESS, visual_pooling="mean"),
    "unified": replace(Unified.like(CONFIG), multiway=True),
    "clip": small_clip.SMALL,
    "blip2": small_blip2.SMALL,
    "coca": small_coca.SMALL,
}


def tokens_of(model: Architecture) -> SpecialTokens:
    return {"clip": small_clip.TOKENS, "coca": small_clip.TOKENS, "blip2": small_towers.TOKENS}.get(model.kind, TOKENS)


def batch_of(model: Architecture, objectives: tuple[Objective, ...], names: tuple[str, ...]) -> Batch:
    """Noise with the names that samples have."""
    sizes, random, size = model.inputs, torch.Generator().manual_seed(0), len(names)
    frames = torch.randint(0, 256, (size, 1, 3, *[sizes.side(False)] * 2), dtype=torch.uint8, generator=random)
    token_ids = torch.randint(5, 45, (size, sizes.text_length), generator=random)
    tokens = tokens_of(model)
    token_ids[:, 0], token_ids[:, 5], token_ids[:, 6:] = tokens.cls, tokens.sep, tokens.pad
    own = torch.arange(size)
    batch = Batch("image_text", frames, token_ids, own, own, own, fields={"name": names})
    reader = TextReader(LetterTokenizer(), sizes.text_length)
    context = PrepareContext(0, "test", tokens, sizes.grid(False), 0, readers={"text": reader})
    return replace(batch, prepared={key: t for one in objectives for key, t in one.prepare(batch, context).items()})


def step(model: Architecture, objectives: tuple[Objective, ...], batch: Batch) -> tuple[State, dict[str, torch.Tensor]]:
    """The end of the chain, and the gradients of ``loss``."""
    torch.manual_seed(0)
    chain = build_chain(model, objectives, tokens_of(model)).train()
    out = chain(State.from_batch(batch, plan_layout(objectives, batch.kind, batch.size, 1)))
    out["loss"].backward()
    return out, {name: p.grad for name, p in chain.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", MODELS)
def test_loss_and_gradients_are_those_of_embeddings_made_apart(kind: str) -> None:
    """The names go through the text encoder as texts of their own, and the picture is told from all of them."""
    model = MODELS[kind]
    batch = batch_of(model, (OWN,), ("cat", "fly", "ox", "cat"))
    out, got = step(model, (OWN,), batch)
    torch.manual_seed(0)
    chain = build_chain(model, (OWN,), tokens_of(model)).train()
    visual = chain.encode_visual(batch.frames)
    names = chain.encode_text(batch.prepared["classify/names/token_ids"])
    cosines = visual @ names.t()
    if kind == "blip2":  # of a picture's queries the one that is most like the name
        assert visual.shape[:2] == (4, model.num_queries)
        cosines = cosines.amax(1)
    loss = F.cross_entropy(cosines / OWN.temperature, torch.tensor([1, 4, 0, 1]))
    loss.backward()
    torch.testing.assert_close(out["loss"], loss.detach())
    wanted = {name: p.grad for name, p in chain.named_parameters() if p.grad is not None}
    assert wanted.keys() <= got.keys()
    assert any("words" in name for name in wanted) and any("text_projection" in name for name in wanted)
    for name, gradient in wanted.items():
        if "logit_scale" not in name:  # no parameter of the plain calculation
            torch.testing.assert_close(got[name], gradient, atol=5e-6, rtol=1e-4, msg=f"{name}: {{}}".format)
    assert got["contrast.logit_scale"].abs() > 1e-6


def test_the_names_stand_beside_other_rows_of_the_text_stream() -> None:
    """Beside masked and whole texts each objective reads its own rows."""
    objectives = (MLM(), OWN, UniVLC())
    batch = batch_of(CONFIG, objectives, ("cat", "fly", "ox", "cat"))
    together, _ = step(CONFIG, objectives, batch)
    assert plan_layout(objectives, "image_text", 4, 1).embedded_texts == ("classify/names",)
    for one in objectives:
        alone, _ = step(CONFIG, (one,), batch)
        torch.testing.assert_close(together[f"loss/{one.key}"], alone[f"loss/{one.key}"])


def state_of(visual: torch.Tensor, names: torch.Tensor, targets: list[int], scale: float) -> State:
    tensors = {"visual_embedding": visual, "classify/names/embedding": names, "logit_scale": torch.tensor(scale)}
    return State({**tensors, "classify/targets": torch.tensor(targets)}, StepLayout("image_text", len(targets), 1))


def test_by_hand() -> None:
    # Two axes as names, scale 2. The first picture lies on its name: log(1 + e^-2) = 0.126928. The second has the
    # cosines 0.6 and 0.8 and the first name: log(1 + e^0.4) = 0.913015. The third has no name of the list.
    visual = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    objective = Classify(names=("a", "b"))
    made = objective.loss(state_of(visual, torch.eye(2), [0, 0, IGNORED], 2.0), Heads(), LocalGather())
    assert made.loss.item() == pytest.approx((0.126928 + 0.913015) / 2, rel=1e-5)
    assert made.metrics["accuracy"].item() == 0.5
    assert made.metrics["named"].item() == pytest.approx(2 / 3)
    assert made.metrics["temperature"].item() == 0.5
    # Smoothing by 0.5 moves a quarter of the target to the other name: 0.75 of the loss above and 0.25 of the other's,
    # log(1 + e^2) = 2.126928 and log(1 + e^-0.4) = 0.513015.
    smooth = replace(objective, label_smoothing=0.5)
    made = smooth.loss(state_of(visual, torch.eye(2), [0, 0, IGNORED], 2.0), Heads(), LocalGather())
    wanted = 0.75 * (0.126928 + 0.913015) / 2 + 0.25 * (2.126928 + 0.513015) / 2
    assert made.loss.item() == pytest.approx(wanted, rel=1e-5)


def test_without_a_known_name_there_is_no_loss() -> None:
    visual = torch.tensor([[1.0, 0.0]], requires_grad=True)
    state = state_of(visual, torch.eye(2), [IGNORED], 2.0)
    made = Classify(names=("a", "b")).loss(state, Heads(), LocalGather())
    made.loss.backward()
    assert made.loss.item() == 0.0 and made.metrics["accuracy"].item() == 0.0
    assert visual.grad is not None and not visual.grad.any()
    assert Classify(names=("a", "b")).terms(state, LocalGather())["classify"].item() == 0


def test_prepare_finds_the_names_and_fills_the_prompt() -> None:
    batch = batch_of(CONFIG, (OWN,), ("bee", "wolf", "ox", "Ox"))
    assert batch.prepared["classify/targets"].tolist() == [3, IGNORED, 0, IGNORED]
    wanted = LetterTokenizer().encode([f"a {name}" for name in NAMES], CONFIG.text_length)
    assert batch.prepared["classify/names/token_ids"].tolist() == wanted.tolist()


def test_two_lists_are_read_from_two_fields() -> None:
    """Names and classes of the same pictures, in one step."""
    classes = Classify(name="classes", names=("beast", "insect"), field="class", prompt="a {name}")
    named = batch_of(CONFIG, (OWN,), ("cat", "fly", "ox", "cat"))
    batch = replace(named, fields={**named.fields, "class": ("beast", "insect", "beast", "beast")})
    context = PrepareContext(
        **{"seed": 0, "source": "test", "tokens": TOKENS, "grid": CONFIG.inputs.grid(False), "step": 0},
        readers={"text": TextReader(LetterTokenizer(), CONFIG.text_length)},
    )
    prepared = {**batch.prepared, **classes.prepare(batch, context)}
    assert prepared["classes/targets"].tolist() == [0, 1, 0, 0]
    assert OWN.sample_fields.keys() | classes.sample_fields.keys() == {"name", "class"}
    batch = replace(batch, prepared=prepared)
    out, _ = step(CONFIG, (OWN, classes), batch)
    for one in (OWN, classes):
        alone, _ = step(CONFIG, (one,), batch)
        torch.testing.assert_close(out[f"loss/{one.key}"], alone[f"loss/{one.key}"])


def test_an_exported_model_has_the_names_themselves() -> None:
    assert Classify(names="motions", weight=0.5).after_training() == Classify(names=Classify(names="motions").choices)


@pytest.mark.parametrize(("name", "count", "one"), [("emoji", 1599, "grinning face"), ("motions", 12, "moves left")])
def test_embedded_lists(name: str, count: int, one: str) -> None:
    found = Classify(names=name).choices
    assert len(found) == len(set(found)) == count
    assert one in found


def test_a_list_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("ox\ncat\n")
    assert Classify(names=str(tmp_path / "names.txt")).choices == ("ox", "cat")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"names": ("ox", "ox")}, "names.1 is 'ox' a second time"),
        ({"names": "absent.txt"}, "there is no such file"),
        ({"names": NAMES, "prompt": "a picture"}, "prompt must be a text with {name} in it"),
        ({"names": NAMES, "prompt": "{label} {name}"}, "nothing else in braces"),
        ({"names": NAMES, "label_smoothing": 1.0}, "label_smoothing must be at least 0 and below 1"),
        ({"names": NAMES, "temperature": math.pi}, "temperature must be within temperature_bounds"),
    ],
)
def test_options_that_are_refused(options: dict[str, object], said: str) -> None:
    with pytest.raises(UserError) as raised:
        Classify(**options)  # type: ignore[arg-type]
    assert said in str(raised.value)


def test_a_list_of_one_name_is_a_misfit() -> None:
    assert [misfit.path for misfit in Classify(names=("ox",)).misfits(CONFIG.inputs, 4)] == [("names",)]
    assert isinstance(CONFIG, OmniVL) and not list(OWN.misfits(CONFIG.inputs, 4))


def test_labels_of_the_list_have_its_prompt_and_others_have_none() -> None:
    assert OWN.prompt_of(["cat", "ox"]) == "a {label}"
    assert OWN.prompt_of(["cat", "horse"]) is None
    assert UniVLC().prompt_of(["cat"]) is None
