"""An objective that is in no union runs in the default chain: rows, draws, head, twice under two names."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tiny_chain import CONFIG, TOKENS, make_batch
from torch import Tensor, nn

from engine.step.freeze import freeze_idle
from omnivl.architectures.build import build_chain
from omnivl.chain.chain import Chain
from omnivl.chain.demands import Demands, Join
from omnivl.chain.gather import Gather
from omnivl.chain.layout import lay_out, plan_layout
from omnivl.chain.objective import Drawn, Head, Heads, Objective, ObjectiveLoss, PrepareContext
from omnivl.chain.sizes import HeadSizes
from omnivl.chain.state import State
from omnivl.data.batch import Batch, DataKind, is_pair
from omnivl.objectives import UniVLC


class Score(Head):
    """A score of the first position, and how many steps it has seen."""

    steps: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.output = nn.Linear(size, 1)
        self.register_buffer("steps", torch.zeros(1, dtype=torch.int64))

    def after_step(self, gather: Gather) -> None:
        self.steps += 1


@dataclass(frozen=True)
class Swap(Objective):
    """Tells the own text from that of the next sample, whatever the similarities."""

    kind: Literal["swap"] = "swap"
    distance: int = 1

    def demands(self, kind: DataKind, batch_size: int) -> Demands | None:
        if not is_pair(kind):
            return None
        return Demands(joins={f"{self.key}/own": Join(), f"{self.key}/other": Join(drawn="text")})

    def prepare(self, batch: Batch, context: PrepareContext) -> dict[str, Tensor]:
        return {f"{self.key}/distance": torch.tensor(self.distance)}

    def draw(self, state: State, gather: Gather) -> Drawn:
        size, distance = state.layout.batch_size, int(state[f"{self.key}/distance"])
        return Drawn({f"{self.key}/other": (torch.arange(size) + distance) % size})

    def build_head(self, sizes: HeadSizes) -> Score:
        return Score(sizes.widths["fused"])

    def loss(self, state: State, heads: Heads, gather: Gather) -> ObjectiveLoss:
        assert heads.own is not None
        own, other = (heads.own.output(state.rows("fused", f"{self.key}/{row}")[:, 0]) for row in ("own", "other"))
        loss = F.softplus(-own).mean() + F.softplus(other).mean()
        return ObjectiveLoss(loss, {"margin": (own - other).mean()})

    def asks(self, kind: DataKind, batch_size: int) -> Demands:
        return Demands(joins={f"{self.key}/own": Join()})

    def predict(self, state: State, heads: Heads) -> Tensor:
        assert heads.own is not None
        scores: Tensor = heads.own.output(state.rows("fused", f"{self.key}/own")[:, 0])[:, 0]
        return scores


TWICE = (Swap(), Swap(name="far", distance=2), UniVLC())


def trained_on(objectives: Sequence[Objective]) -> tuple[Chain, State]:
    torch.manual_seed(0)
    chain = build_chain(CONFIG, objectives, TOKENS)
    batch = make_batch("image_text", objectives)
    return chain, State.from_batch(batch, plan_layout(objectives, "image_text", batch.size, 1))


def test_its_rows_are_what_it_asked_for() -> None:
    chain, state = trained_on(TWICE)
    seen: list[State] = []
    chain.losses.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0]))
    first: list[State] = []
    chain.join.register_forward_hook(lambda layer, inputs, out: first.append(out))
    out = chain(state)
    text = first[0].rows("fused", "swap/own")
    assert torch.equal(first[0].rows("fused", "swap/other"), text.roll(-1, 0))
    assert torch.equal(first[0].rows("fused", "far/other"), text.roll(-2, 0))
    assert set(seen[0].layout.objectives) == {"swap", "far", "univlc"}
    assert {"loss/swap", "loss/far", "metric/swap/margin", "metric/far/margin"} <= out.keys()


def test_it_learns_under_both_names_and_its_heads_come_back(tmp_path: Path) -> None:
    chain, state = trained_on(TWICE)
    freeze_idle(chain, [state.layout])
    chain(state)["loss"].backward()
    for key in ("swap", "far"):
        assert chain.losses.heads[key].output.weight.grad.abs().sum() > 0
    assert chain.alignment_00.block.attention.qkv.weight.grad is not None
    for name, parameter in chain.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    chain.after_step()
    save_file(chain.state_dict(), tmp_path / "weights.safetensors")
    again, _ = trained_on(TWICE)
    again.load_state_dict(load_file(tmp_path / "weights.safetensors"))
    assert again.losses.heads["far"].steps.item() == 1
    assert torch.equal(again(state)["loss"], chain(state)["loss"])


def test_it_predicts() -> None:
    chain, state = trained_on(TWICE)
    chain.eval()
    asks = lay_out({"far": TWICE[1].asks("image_text", 4)}, "image_text", 4, 1, "predict")
    inputs = {"frames": state["frames"], "token_ids": state["token_ids"]}
    assert chain.fold(State(inputs, asks))["far/prediction"].shape == (4,)


def test_it_acts_on_its_entries_only() -> None:
    objectives = (replace(TWICE[0], on=("pairs",)), UniVLC())
    assert plan_layout(objectives, "image_text", 4, 1, "captions").objectives == ("univlc",)
    assert plan_layout(objectives, "image_text", 4, 1, "pairs").objectives == ("swap", "univlc")
