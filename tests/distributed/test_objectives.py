"""Losses and gradients on several replicas equal those of one process on the joined batch."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from real_chain import LetterTokenizer

from engine.processes.collectives import ProcessGroupGather
from omnivl.architectures import OmniVL
from omnivl.architectures.build import build_chain
from omnivl.chain.chain import Chain
from omnivl.chain.gather import Gather, LocalGather
from omnivl.chain.layout import plan_layout
from omnivl.chain.state import State
from omnivl.data.batch import Batch, DataKind, is_video
from omnivl.data.special_tokens import SpecialTokens
from omnivl.data.tokenizer import TextReader
from omnivl.objectives import (
    LM,
    MCM,
    MFM,
    MLM,
    MRM,
    VLM,
    Classify,
    NegativeWeights,
    Objective,
    PrepareContext,
    UniVLC,
)
from omnivl.parts.sizes import MomentumConfig

TOTAL = 8
TOKENS = SpecialTokens(pad=0, cls=1, sep=2, mask=3, decode=4, vocab_size=40, num_reserved=5)
CONFIG = OmniVL(
    **{"hidden_size": 16, "num_heads": 2, "vision_layers": 1, "text_layers": 1, "projection_size": 8},
    **{"alignment_layers": 1, "generation_layers": 1, "image_size": 8, "video_size": 8, "patch_size": 4},
    **{"num_frames": 4, "text_length": 9, "vocab_size": 40, "momentum": MomentumConfig(decay=0.5)},
)
CASES: dict[str, tuple[Objective, ...]] = {
    "mlm": (MLM(),),
    "lm": (LM(),),
    "mrm": (MRM(),),
    "mfm": (MFM(),),
    "mcm": (MCM(targets="momentum", feature_loss="cosine"),),
    "univlc": (UniVLC(),),
    "univlc_sum": (UniVLC(positive_reduction="sum"),),
    "univlc_queue": (UniVLC(queue_size=13, negative_weights=NegativeWeights(video=0.5, label=2.0)),),
    "univlc_soft": (UniVLC(queue_size=5, batch_keys="momentum", soft_target_alpha=0.4),),
    "vlm": (VLM(negatives="global"),),
    "classify": (Classify(names=("ox", "cat", "hen", "bee")),),
    "all": (
        *(MLM(), MRM(targets="momentum"), MFM(), MCM(), UniVLC(queue_size=13)),
        *(VLM(negatives="global", include_labels=True), LM()),
    ),
}


def make_batch(kind: DataKind, step: int, rows: slice, objectives: tuple[Objective, ...]) -> Batch:
    """Part of a joined batch of ``TOTAL`` samples. Texts differ in length, so that replicas count differently."""
    random = torch.Generator().manual_seed(step)
    times = CONFIG.num_frames if is_video(kind) else 1
    frames = torch.randint(0, 256, (TOTAL, times, 3, 8, 8), dtype=torch.uint8, generator=random)
    token_ids = torch.randint(5, 24, (TOTAL, 9), generator=random)
    token_ids[:, 0] = TOKENS.cls
    for row in range(TOTAL):
        token_ids[row, 2 + row % 7 :] = TOKENS.pad
        token_ids[row, 2 + row % 7] = TOKENS.sep
    identity = torch.tensor([0, 1, 2, 0, 3, 4, 5, 4])
    position = torch.arange(TOTAL) + TOTAL * step
    shown = ("ox", "wolf", "owl", "cat", "bee", "bee", "hen", "ox")  # replicas have a different number in the list
    batch = Batch(
        **{"kind": kind, "frames": frames[rows], "token_ids": token_ids[rows], "identity": identity[rows]},
        **{"label": torch.full((TOTAL,), -1)[rows], "position": position[rows], "fields": {"name": shown[rows]}},
    )
    readers = {"text": TextReader(LetterTokenizer(), CONFIG.text_length)}
    grid = CONFIG.inputs.grid(is_video(kind))
    context = PrepareContext(seed=0, source="test", tokens=TOKENS, grid=grid, step=step, readers=readers)
    prepared = {}
    for objective in objectives:
        if objective.demands(kind, batch.size) is not None:
            prepared |= objective.prepare(batch, context)
    return replace(batch, prepared=prepared)


def make_chain(objectives: tuple[Objective, ...], gather: Gather) -> Chain:
    torch.manual_seed(0)
    chain = build_chain(CONFIG, objectives, TOKENS, gather=gather)
    with torch.no_grad():  # away from the start, where all embeddings are alike and temporal attention is off
        for name, parameter in chain.named_parameters():
            if parameter.requires_grad and "logit_scale" not in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return chain


def run_steps(chain: Chain, objectives: tuple[Objective, ...], kinds: list[DataKind], rows: slice) -> dict[str, Any]:
    """Three steps with updates between them; what is to be equal, averaged over replicas."""
    gather = chain.losses.gather  # type: ignore[union-attr]
    losses: list[dict[str, float]] = []
    gradients: dict[str, torch.Tensor] = {}
    for step, kind in enumerate(kinds):
        batch = make_batch(kind, step, rows, objectives)
        out = chain(State.from_batch(batch, plan_layout(objectives, kind, batch.size, batch.num_frames)))
        chain.zero_grad()
        out["loss"].backward()
        averaged = {name: gather.total(out[name]) / gather.replicas for name in out if name.startswith("loss")}
        losses.append({name: value.item() for name, value in averaged.items()})
        for name, parameter in chain.named_parameters():
            if parameter.grad is not None:
                parameter.grad = gather.total(parameter.grad) / gather.replicas
                gradients[f"{step}/{name}"] = parameter.grad.clone()
                parameter.data -= 0.05 * parameter.grad
        chain.after_step()
    buffers = {name: buffer.clone() for name, buffer in chain.named_buffers()}
    twins = {name: p.detach().clone() for name, p in chain.named_parameters() if "momentum_" in name}
    return {"losses": losses, "gradients": gradients, "buffers": buffers, "twins": twins}


def on_replica(cases: list[str]) -> dict[str, Any]:
    """All cases in one process group: starting processes takes longer than running them."""
    gather = ProcessGroupGather()
    share = TOTAL // gather.replicas
    rows = slice(gather.replica * share, (gather.replica + 1) * share)
    runs: dict[str, Any] = {
        case: run_steps(make_chain(CASES[case], gather), CASES[case], kinds_of(case), rows) for case in cases
    }
    if gather.replicas == 2:
        runs["local negatives"] = matching_on(gather, rows)
    return runs


def kinds_of(case: str) -> list[DataKind]:
    if case in ("mfm", "mcm"):
        return ["video_text", "video_label", "video_text"]
    if case == "all" or case.startswith("univlc"):
        return ["image_text", "video_text", "video_label"]
    return ["image_text", "image_text", "image_text"]


def assert_equal_runs(got: dict[str, Any], wanted: dict[str, Any]) -> None:
    for mine, theirs in zip(got["losses"], wanted["losses"], strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5, rel=1e-5)
    for group in ("gradients", "buffers", "twins"):
        assert got[group].keys() == wanted[group].keys()
        for name, tensor in wanted[group].items():
            torch.testing.assert_close(
                got[group][name], tensor, atol=1e-5, rtol=1e-4, msg=partial("{}: {}".format, name)
            )


_TWO_REPLICAS: list[dict[str, Any]] = []


@pytest.fixture
def two_replicas(run_distributed) -> list[dict[str, Any]]:
    """What each of two replicas made of every case; they run once for all tests."""
    if not _TWO_REPLICAS:
        _TWO_REPLICAS.extend(run_distributed(on_replica, processes=2, cases=list(CASES)))
    return _TWO_REPLICAS


def joined_run(case: str) -> dict[str, Any]:
    """The same steps in this process."""
    return run_steps(make_chain(CASES[case], LocalGather()), CASES[case], kinds_of(case), slice(0, TOTAL))


@pytest.mark.distributed
@pytest.mark.timeout(150)
@pytest.mark.parametrize("case", CASES)
def test_two_replicas_equal_the_joined_batch(two_replicas, case: str) -> None:
    wanted = joined_run(case)
    assert all(abs(loss) > 1e-3 for step in wanted["losses"] for loss in step.values())
    for got in two_replicas:
        assert_equal_runs(got[case], wanted)


@pytest.mark.distributed
@pytest.mark.timeout(150)
def test_four_replicas_equal_the_joined_batch(run_distributed) -> None:
    wanted = joined_run("all")
    for got in run_distributed(on_replica, processes=4, cases=["all"]):
        assert_equal_runs(got["all"], wanted)


def matching_on(gather: Gather, rows: slice) -> dict[str, Any]:
    """VLM with local negatives; the second half of the samples is of one class."""
    objectives = (VLM(),)
    chain = make_chain(objectives, gather)
    batch = make_batch("image_text", 0, rows, objectives)
    if rows.start == 4:
        batch = replace(batch, identity=torch.full((4,), 9))
    out = chain(State.from_batch(batch, plan_layout(objectives, batch.kind, batch.size, 1)))
    out["loss"].backward()
    gradients = {name: p.grad for name, p in chain.named_parameters() if p.grad is not None}
    return {"loss": out["loss"].detach(), "gradients": gradients}


@pytest.mark.distributed
@pytest.mark.timeout(150)
def test_local_negatives_average_over_all_pairs(two_replicas) -> None:
    """Replica 0 has 4 positive and 8 negative pairs, replica 1, of one class, its 4 positive ones: a mean over 16."""
    alone = [matching_on(LocalGather(), slice(4 * replica, 4 * replica + 4)) for replica in range(2)]
    got = [run["local negatives"] for run in two_replicas]
    shares = (12 / 16, 4 / 16)
    assert torch.stack([run["loss"] for run in got]).mean().item() == pytest.approx(
        sum(share * run["loss"].item() for share, run in zip(shares, alone, strict=True)), rel=1e-5
    )
    for name in alone[0]["gradients"]:
        averaged = (got[0]["gradients"][name] + got[1]["gradients"][name]) / 2
        expected = sum(share * run["gradients"][name] for share, run in zip(shares, alone, strict=True))
        torch.testing.assert_close(averaged, expected, atol=1e-6, rtol=1e-4)


@pytest.mark.distributed
@pytest.mark.timeout(150)
def test_every_replica_holds_the_same_queue_and_one_process_can_load_it(two_replicas) -> None:
    first, second = (run["univlc_soft"]["buffers"] for run in two_replicas)
    assert all(torch.equal(first[name], second[name]) for name in first)
    # Three steps of eight keys into five places: the last five of step 2 have the numbers 19 .. 23, key k lies at
    # k mod 5, so 20 .. 23 come first and 19 last. Identities of 19 .. 23 are those of samples 3 .. 7: 0 3 4 5 4.
    assert first["losses.heads.univlc.queue.identity"].tolist() == [3, 4, 5, 4, 0]
    alone = make_chain(CASES["univlc_soft"], LocalGather())
    missing, unexpected = alone.load_state_dict(first, strict=False)
    assert not unexpected
    assert not [name for name in missing if "queue" in name]
