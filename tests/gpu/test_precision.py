"""The chain and the plain host on a device: fp32 equals the CPU, bf16 is near it, forward and gradient."""

from functools import partial

import pytest
import torch

from engine.hosts.micro_batch import first_state
from engine.hosts.shards import KeptMemory
from omnivl.chain.layout import plan_layout
from omnivl.data.batch import DATA_KINDS, DataKind
from omnivl.objectives import LM, MCM, MFM, MLM, MRM, UniVLC

PAIRED = DATA_KINDS[:4]  # something to see, with a text

CPU = torch.device("cpu")
# Without VLM: its hard negatives are drawn from similarities, and another precision may draw another one.
SMOOTH = (MLM(), MRM(), MFM(), MCM(), UniVLC(queue_size=16), LM())


@pytest.mark.parametrize("kind", PAIRED)
@pytest.mark.parametrize(
    ("dtype", "loss_tolerance", "gradient_tolerance"),
    [(torch.float32, 1e-4, 1e-3), (torch.bfloat16, 0.02, 0.1)],
    ids=["fp32", "bf16"],
)
def test_losses_and_gradients_are_those_of_fp32_on_the_cpu(
    make_chain, make_batch, relative_distance, device, kind: DataKind, dtype, loss_tolerance, gradient_tolerance
):
    batch = make_batch(kind, 0, SMOOTH)
    found = []
    for where, precision in ((CPU, torch.float32), (device, dtype)):
        chain = make_chain(precision, SMOOTH).to(where)
        state = chain(first_state(batch, partial(plan_layout, SMOOTH), where))
        assert state["loss"].device.type == where.type
        state["loss"].backward()
        gradients = {name: p.grad for name, p in chain.named_parameters() if p.grad is not None}
        assert {gradient.dtype for gradient in gradients.values()} == {torch.float32}
        found.append(({name: loss.item() for name, loss in state.named("loss").items()}, gradients))
    (wanted_losses, wanted_gradients), (losses, gradients) = found
    assert losses == pytest.approx(wanted_losses, rel=loss_tolerance)
    assert relative_distance(gradients, wanted_gradients) < gradient_tolerance


def test_training_in_bf16_follows_fp32_on_the_cpu(make_host, make_batch, relative_distance, device):
    wanted, host = make_host(torch.float32, CPU, SMOOTH), make_host(torch.bfloat16, device, SMOOTH)
    before = wanted.full_weights()
    for step, kind in enumerate(PAIRED * 2):
        batch = make_batch(kind, step, SMOOTH)
        expected, result = wanted.step([batch], step), host.step([batch], step)
        assert result.loss == pytest.approx(expected.loss, rel=0.03), step
        if step == 0:  # later norms also differ by the weights, which Adam moves by the sign of small gradients
            assert result.gradient_norm == pytest.approx(expected.gradient_norm, rel=0.05)
    after = wanted.full_weights()
    assert before is not None and after is not None
    # Eight steps moved the weights; how far bf16 is off has to be small beside that.
    moved = relative_distance(after, before)
    assert moved > 0
    assert relative_distance(host.full_weights(), after) < 0.3 * moved


def test_a_snapshot_is_of_the_step_at_which_it_was_taken(make_host, make_batch, device, tmp_path):
    host = make_host(torch.bfloat16, device)
    host.step([make_batch("image_text", 0)], 0)
    host.save(tmp_path / "at once")
    kept = host.shard().kept(KeptMemory())
    assert all(piece.held.is_pinned() == (device.type == "cuda") for piece in kept.pieces)
    host.step([make_batch("image_text", 1)], 1)
    (tmp_path / "later").mkdir()
    for name in kept.write(tmp_path / "later", kept.placed()):
        assert (tmp_path / "later" / name).read_bytes() == (tmp_path / "at once" / name).read_bytes()


def test_resumes_on_the_device_bit_for_bit(make_host, make_batch, device, tmp_path):
    batches = [make_batch(kind, step) for step, kind in enumerate(PAIRED)]
    first = make_host(torch.bfloat16, device)
    for step in (0, 1):
        first.step([batches[step]], step)
    first.save(tmp_path)
    second = make_host(torch.bfloat16, device)
    second.load(tmp_path)
    for name, tensor in first.chain.state_dict().items():
        assert torch.equal(tensor, second.chain.state_dict()[name]), name
        assert tensor.device.type == device.type, name
    # Atomic sums of a GPU come in any order: equal to rounding there, exactly on a CPU.
    losses = [host.step([batches[2]], 2).loss for host in (first, second)]
    assert losses[1] == pytest.approx(losses[0], rel=0 if device.type == "cpu" else 1e-3)
