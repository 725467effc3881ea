"""What a pipeline stage reads of a state, and which tensors therefore have to cross to it."""

import pytest
import real_chain as real
import torch

from engine.hosts.micro_batch import first_state
from engine.hosts.pipeline.reads import Notes, ReadState, Wanted, notes_of, unread
from engine.step.report import scalars
from omnivl.chain.gather import LocalGather
from omnivl.chain.state import State


def state_of(*names: str) -> State:
    return State({name: torch.zeros(1) for name in names}, real.plan_layout("image_text", 2, 1))


@pytest.mark.parametrize(
    ("use", "read"),
    [
        (lambda state: state["frames"], {"frames"}),
        (lambda state: state.get("label"), {"label"}),  # absent now, but a layer may do otherwise where it is there
        (lambda state: "pooled" in state, {"pooled"}),
        (lambda state: state.named("router"), {"router/"}),
        (lambda state: state.under(("loss",)), {"loss", "loss/"}),
        (lambda state: state.rows("visual", "clean"), {"visual", "visual/clean"}),
        (lambda state: state.updated(text=state["text"]), {"text"}),
        (lambda state: state.merged({"loss/a": torch.zeros(1)})["loss/a"], set()),
        (lambda state: list(state.updated(drop=("frames",))), {""}),
        (lambda state: dict(state.items()), {""}),
        (lambda state: {**state}, {""}),
    ],
)
def test_every_way_to_read_is_noted(use, read) -> None:
    state = ReadState.of(state_of("frames", "text", "visual", "router/visual_00"))
    use(state)
    assert read <= state.read
    assert "" in read or state.read == read


def test_a_state_made_of_another_notes_for_both() -> None:
    state = ReadState.of(state_of("frames", "text", "identity"))
    after = state.updated(drop=("frames",), visual=torch.zeros(1))
    assert isinstance(after, ReadState)
    _ = after["text"], after["visual"]
    assert list(unread(after)) == ["text", "identity", "visual"]
    notes = notes_of(state, after)
    assert notes == Notes(frozenset({"text"}), frozenset({"frames", "visual"}))
    # The next stage wants the identity, which passes through, and what is made here, which nobody has to send.
    assert notes.wanted({"identity", "visual"}) == {"text", "identity"}


def test_wanted_names_may_stand_for_all_below_them() -> None:
    wanted = Wanted({"visual", "router/", "mdm/pair/"})
    inside, outside = ("visual", "router/a", "mdm/pair/rows"), ("visual/mrm", "router", "mdm/x")
    assert [name in wanted for name in inside + outside] == [True] * 3 + [False] * 3
    assert "anything/at/all" in Wanted({""})
    assert "visual" not in Wanted()


@pytest.mark.parametrize("unified", [False, True])
@pytest.mark.parametrize("kind", real.PAIRED)
def test_the_rest_of_a_chain_needs_no_more_than_was_noted(kind, unified: bool) -> None:
    chain = real.build_real_chain(LocalGather(), unified=unified)
    plan_layout = real.plan_unified_layout if unified else real.plan_layout
    objectives = real.UNIFIED_OBJECTIVES if unified else real.OBJECTIVES
    (batch,) = real.step_batches(0, 1, 4, LocalGather(), objectives, of=(kind,))
    state = first_state(batch, plan_layout, torch.device("cpu"))
    crossed: set[int] = set()
    for place in range(1, len(chain.program)):
        state = chain.program[place - 1](state)
        ends = []
        wanted: Wanted | None = None
        for _ in range(2):
            given = State({name: one for name, one in state.items() if wanted is None or name in wanted}, state.layout)
            received = after = ReadState.of(given)
            torch.manual_seed(0)
            for layer in chain.program[place:]:
                after = layer(after)
            ends.append(scalars(after))
            wanted = notes_of(received, after).wanted()
        assert ends[0].keys() == ends[1].keys()
        assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items()), f"cut before pass {place}"
        crossed.add(len(given))
        assert len(given) < len(state)
    assert len(crossed) > 1
