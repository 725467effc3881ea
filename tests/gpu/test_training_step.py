"""One training step of all objectives on all kinds: all parameters change, and all tensors stay on the device."""

import pytest
import torch

from omnivl.data.batch import DATA_KINDS

PAIRED = DATA_KINDS[:4]  # something to see, with a text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_step_on_every_kind_moves_weights_twins_and_queue(make_host, make_batch, device, dtype):
    host = make_host(dtype, device)
    before = {name: tensor.clone() for name, tensor in host.chain.state_dict().items()}
    seen: set[str] = set()
    for step, kind in enumerate(PAIRED):
        result = host.step([make_batch(kind, step)], step)
        assert not result.skipped, kind
        assert result.gradient_norm > 0, kind
        seen |= set(result.losses)
    assert seen == {"mlm", "mrm", "mfm", "mcm", "univlc", "vlm", "lm"}
    after = host.chain.state_dict()
    assert {tensor.device.type for tensor in after.values()} == {device.type}
    still = {name for name, tensor in after.items() if torch.equal(tensor, before[name])}
    assert not {name for name in still if name in dict(host.chain.named_parameters())}
    twins = [name for name in after if "momentum_" in name]
    assert twins and not still & set(twins)


def test_a_loss_that_is_not_finite_is_skipped_on_the_device(make_host, make_batch, device):
    host = make_host(torch.bfloat16, device)
    with torch.no_grad():
        next(p for name, p in host.chain.named_parameters() if name.startswith("visual_norm")).fill_(torch.nan)
    before = {name: tensor.clone() for name, tensor in host.chain.state_dict().items()}
    assert host.step([make_batch("image_text", 0)], 0).skipped
    for name, tensor in host.chain.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0, equal_nan=True, msg=name)
