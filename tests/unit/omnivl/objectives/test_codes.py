"""Codes of patches: the codebook, what it leaves fixed, and the masked objectives that restore codes."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from omnivl.chain.gather import LocalGather
from omnivl.chain.layout import plan_layout
from omnivl.chain.objective import Heads
from omnivl.chain.sizes import HeadSizes
from omnivl.chain.state import State
from omnivl.objectives import MDM, MMM, MRM
from omnivl.objectives.codes import RandomCodebook, RandomCodes
from omnivl.objectives.masked_visual import PatchHead, feature_targets

WIDTHS = dict.fromkeys(("visual", "text", "fused"), 6)
SIZES = HeadSizes(WIDTHS, text_length=6, vocab_size=30, projection_size=0, patch_size=2, tubelet_size=1, image_size=4)
CODEBOOK = RandomCodebook(num_codes=5, width=2, seed=3)


def test_a_patch_has_the_code_that_is_nearest_to_its_projection() -> None:
    codes = RandomCodes(RandomCodebook(num_codes=3, width=2), values=2)
    codes.projection.copy_(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
    codes.codes.copy_(torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]]))
    # Projections (1, 0), (2, 0), (2, 2.2): nearest to (0, 0), (3, 0), and by 7.24 against 5.84 to (3, 0) again, as
    # (2, 2.2) is at 4 + 4.84 from (0, 0), at 1 + 4.84 from (3, 0) and at 4 + 3.24 from (0, 4).
    patches = torch.tensor([[1.0, 0.0], [2.0, 0.0], [2.0, 1.1], [0.0, 1.5]])
    assert codes(patches).tolist() == [0, 1, 1, 2]


def test_equal_codebooks_have_equal_codes_wherever_they_are_built() -> None:
    patches = torch.randn(64, 12)
    torch.manual_seed(5)
    first = RandomCodes(CODEBOOK, 12)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), drawn), "torch's own generator is left as it is"
    second = RandomCodes(CODEBOOK, 12)
    assert torch.equal(first(patches), second(patches))
    assert not torch.equal(first(patches), RandomCodes(replace(CODEBOOK, seed=4), 12)(patches))
    assert not list(first.parameters())
    with torch.device("meta"):
        assert RandomCodes(CODEBOOK, 12).codes.is_meta


def test_codes_are_used_evenly_enough_by_patches_of_unit_variance() -> None:
    codes = RandomCodes(RandomCodebook(num_codes=64, width=8), 48)
    used = torch.bincount(codes(torch.randn(20_000, 48)), minlength=64)
    assert (used > 0).all()
    assert used.max() < 0.1 * used.sum()


def masked_state(objective: MRM) -> State:
    random = torch.Generator().manual_seed(0)
    layout = plan_layout((objective,), "image", 2, 1)
    mask = torch.tensor([[[True, False, False, True]], [[False, True, False, False]]])
    given = {
        **{"frames": torch.randint(0, 256, (2, 1, 3, 4, 4), dtype=torch.uint8, generator=random)},
        **{"mrm/rows": torch.arange(2), "mrm/mask": mask, "mrm/masked": mask.flatten().nonzero()[:, 0]},
        **{"visual/mrm": torch.randn(2, 5, 6, generator=random, requires_grad=True)},
    }
    return State(given | {"momentum_visual": torch.randn(2, 5, 6, generator=random)}, layout)


@pytest.mark.parametrize("targets", ["pixels", "momentum"])
def test_the_loss_is_the_cross_entropy_of_the_masked_patches_codes(targets) -> None:
    """Loss and gradient against each patch by itself."""
    torch.manual_seed(0)
    objective = MRM(codebook=CODEBOOK, targets=targets)
    head = objective.build_head(SIZES)
    assert isinstance(head, PatchHead)
    assert head.codes is not None
    assert head.output is None
    state = masked_state(objective)
    made = objective.loss(state, Heads(head), LocalGather())
    (gradient,) = torch.autograd.grad(made.loss, state["visual/mrm"])
    losses = []
    for row, place in ((0, 0), (0, 3), (1, 1)):
        top, left = 2 * (place // 2), 2 * (place % 2)
        patch = state["frames"][row, 0, :, top : top + 2, left : left + 2].flatten().float() / 127.5 - 1.0
        if targets == "momentum":
            patch = feature_targets(state["momentum_visual"], torch.tensor([4 * row + place]))[0]
        scores = head.codes.scores(state["visual/mrm"][row, 1 + place])
        losses.append(F.cross_entropy(scores[None], head.codes.codebook(patch[None])))
    wanted = torch.stack(losses).mean()
    torch.testing.assert_close(made.loss, wanted)
    torch.testing.assert_close(gradient, torch.autograd.grad(wanted, state["visual/mrm"])[0])


def test_every_masked_objective_on_images_may_restore_codes() -> None:
    for objective in (MRM(codebook=CODEBOOK), MDM(codebook=CODEBOOK)):
        head = objective.build_head(SIZES)
        assert isinstance(head, PatchHead)
        assert head.codes is not None
    assert MMM().codebook == RandomCodebook()
    assert MMM(codebook=None).build_head(SIZES).patches.output is not None  # type: ignore[attr-defined]
