"""What layers take: against numbers worked out by hand, and against a real device."""

from pathlib import Path

import pytest
import torch
from torch import nn

from engine.estimate.layers import activation_bytes, blank_states, layer_seconds
from engine.plan.parse import load_plan
from omnivl.architectures.build import build_chain
from omnivl.chain.chain import Chain, ChainLayer
from omnivl.chain.state import State, StepLayout
from omnivl.data.tokenizer import load_tokenizer
from omnivl.parts.recompute import recomputed

PLANS = Path(__file__).parents[4] / "configs" / "plans"
SMALL = ["batch.micro_batch_size_per_gpu=4", "parallel.precision=fp32"]


class Product(ChainLayer):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width, width))

    def forward(self, state: State) -> State:
        return state.updated(text=(state["text"] @ self.weight).tanh())


def test_activations_by_hand() -> None:
    layout = StepLayout("image_text", 3, 1)
    with torch.device("meta"):
        chain = Chain({"a": Product(8), "b": Product(8)})
        state = State({"text": torch.zeros(3, 5, 8)}, layout)
    # a keeps its input for the weight's gradient and its own result for tanh's; b finds a's result kept already.
    rows = 4 * 3 * 5 * 8
    assert activation_bytes(chain, [state]) == {("a", 0): 2 * rows, ("b", 0): rows}


def test_each_pass_of_a_layer_keeps_its_own() -> None:
    layout = StepLayout("image_text", 3, 1)
    with torch.device("meta"):
        chain = Chain({"a": Product(8)}, ["a", "a"])
        state = State({"text": torch.zeros(3, 5, 8)}, layout)
    rows = 4 * 3 * 5 * 8
    assert activation_bytes(chain, [state]) == {("a", 0): 2 * rows, ("a", 1): rows}


def test_a_recomputed_pass_keeps_its_input_and_no_pass_what_is_made_once() -> None:
    """The mask is made by the pass that first needs it, and kept by whoever made it for all later steps."""
    for device in ("meta", "cpu"):
        with torch.device(device):
            chain = Chain({"a": MaskedProduct(8), "b": MaskedProduct(8)})
            state = State({"text": torch.zeros(3, 5, 8)}, StepLayout("image_text", 3, 1))
        rows = 4 * 3 * 5 * 8
        first, second = activation_bytes(chain, [state]), activation_bytes(chain, [state])
        assert first == second
        assert first["a", 0] == rows, "the input of b, which a made; a's own is the caller's"


@pytest.mark.parametrize("ffn", ["dense", "limoe"])
def test_activations_without_memory_are_those_of_a_device(ffn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # The accelerator's kernels, wherever this runs: a CPU leaves padding out and multiplies experts in a batch.
    monkeypatch.setattr("omnivl.parts.padding.Padding.worth_dropping", lambda mask, kept=None: None)
    if ffn == "dense":
        plan = load_plan(PLANS / "emoji.yaml", SMALL, 1)
    else:
        grouped = "stages.0.model.ffn={kind: limoe, num_experts: 4, implementation: grouped}"
        plan = load_plan(PLANS / "quickstart.yaml", [*SMALL, grouped], 1)
    stage, tokenizer = plan.stages[0], load_tokenizer(plan.tokenizer)

    def counted(device: torch.device) -> dict[tuple[str, int], int]:
        with device:
            chain = build_chain(stage.model, stage.objectives, tokenizer.special)
        return activation_bytes(chain, blank_states(stage, tokenizer, device))

    imagined, real = counted(torch.device("meta")), counted(torch.device("cpu"))
    assert imagined.keys() == real.keys()
    assert sum(imagined.values()) == pytest.approx(sum(real.values()), rel=0.1)
    for one, count in real.items():
        if one[0] not in ("losses", "contrast"):
            assert imagined[one] == pytest.approx(count, rel=0.15, abs=4096), one


def test_a_dearer_layer_takes_longer() -> None:
    layout = StepLayout("image_text", 64, 1)
    chain = Chain({"narrow": Product(512), "wide": Wide(512, 12)})
    seconds = layer_seconds(chain, [State({"text": torch.randn(64, 16, 512)}, layout)])
    assert seconds["wide", 0] > 3 * seconds["narrow", 0] > 0


class MaskedProduct(Product):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.masks: dict[int, torch.Tensor] = {}

    def forward(self, state: State) -> State:
        rows = state["text"]
        if rows.shape[1] not in self.masks:
            self.masks[rows.shape[1]] = torch.ones(rows.shape[1], 1, dtype=torch.bool, device=rows.device)
        mask = self.masks[rows.shape[1]]
        made = recomputed(True, lambda rows: (rows @ self.weight).tanh().sin().where(mask, 0.0), rows)
        return state.updated(text=made)


class Wide(ChainLayer):
    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(*(nn.Linear(width, width) for _ in range(depth)))

    def forward(self, state: State) -> State:
        return state.updated(text=self.inner(state["text"]))
