"""How many patches a step has, and how many are left after patch dropout."""

from omnivl.chain.demands import CLEAN
from omnivl.chain.state import StepLayout
from omnivl.data.batch import visual_of
from omnivl.parts.sizes import Patches


def num_kept(places: int, rate: float) -> int:
    """How many of ``places`` patches of a frame are left after a share ``rate`` is dropped; at least one."""
    return max(1, round(places * (1.0 - rate)))


def num_times(sizes: Patches, layout: StepLayout) -> int:
    """Time positions of a row: as many as a clip has tubelets; one for each picture of a set."""
    return layout.num_frames if visual_of(layout.kind) == "set" else sizes.time_positions(layout.num_frames)


def num_patches(sizes: Patches, layout: StepLayout) -> float:
    """Patches of a frame; where pictures keep their sizes the most that it can have, or the average if it is given."""
    if layout.patches is not None:
        return layout.patches
    rows, columns = sizes.grid(layout.is_video)
    return rows * columns


def kept_patches(sizes: Patches, layout: StepLayout) -> float:
    """Patches of a frame that the visual blocks see. Only training steps without a masked pass drop any."""
    patches = num_patches(sizes, layout)
    if layout.mode != "train" or sizes.patch_dropout == 0 or layout.visual.keys() - {CLEAN}:
        return patches
    return num_kept(round(patches), sizes.patch_dropout)


def visual_positions(sizes: Patches, layout: StepLayout) -> float:
    """Positions of a row of the visual stream: the class token and the patches that are kept."""
    return 1 + num_times(sizes, layout) * kept_patches(sizes, layout)
