"""X-VLM and X2-VLM: what texts say of regions of a picture is aligned with these regions, as its own text is with it.

Shapes: T frames, N patches of a frame.

The picture is encoded once. A box is represented by the mean of the features of the patches that it touches, and by
these patches; the whole picture likewise. Objectives with ``regions`` take both (``omnivl.chain.regions``). A clip is
the mean of its frames, each encoded as an image and marked by a learnt embedding (X2-VLM).

Source: Zeng et al., X-VLM, arXiv 2111.08276, section 3; Zeng et al., X2-VLM, arXiv 2211.12402, section 3; their
    released code. X2-VLM has the same parts, of other sizes: 12 blocks read texts, 6 fuse.
Differs: the image encoder is a ViT, whose class token is dropped after it; X-VLM's is Swin-B, X2-VLM's BEiT-2, which
    has positions by distance. X-VLM's ViT, a variant in its code, limits the attention of its last blocks to the box
    instead. Pairs that are contrasted or matched in one step are those of one data entry. Words are hidden without an
    upper number and no runs of them; there up to three in a run, 8 or 12 at most. What ``albef`` says of temperature,
    positions and the map to words holds here too.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from torch import Tensor

from moe.ranges import Range
from omnivl.architectures.albef import AlignBeforeFuse
from omnivl.architectures.base import Layers
from omnivl.architectures.misfits import twin_misfits
from omnivl.architectures.xvlm_names import as_albef
from omnivl.data.batch import Visual
from omnivl.errors import Misfit
from omnivl.parts.regions import VisualRegions
from omnivl.parts.sizes import MomentumConfig, Patches


@dataclass(frozen=True)
class XVLM(AlignBeforeFuse):
    """X-VLM and X2-VLM.

    Attributes:
        num_frames: Frames of a training clip; 1: it is not trained on clips.
    """

    kind: Literal["xvlm"] = "xvlm"
    image_size: Annotated[int, Range(1)] = 224
    text_length: Annotated[int, Range(3)] = 40
    momentum: MomentumConfig | None = None
    num_frames: Annotated[int, Range(1)] = 1

    reads_patches: ClassVar[bool] = True
    streams: ClassVar[tuple[str, ...]] = (
        *("visual", "text", "regions", "embedding", "fused", "generation", "fused_generation"),
    )
    shows: ClassVar[tuple[Visual, ...]] = ("image", "clip")

    @property
    def patches(self) -> Patches:
        """Sizes of images and patches."""
        return Patches.of_images(self.image_size, self.patch_size, self.num_frames, **self.shown_as)

    @property
    def seen(self) -> int:
        """Visual positions that fused texts look at: those of one frame."""
        rows, columns = self.patches.grid(is_video=False)
        return 1 + rows * columns

    def visual_end(self) -> Layers:
        """The mean of frames and patches, and regions."""
        yield "visual_regions", VisualRegions(self.vision.hidden_size, self.patches)

    def from_foreign(self, weights: Mapping[str, Tensor], path: Path) -> Mapping[str, Tensor] | None:
        """Weights of the released code with a ViT, or what ALBEF takes; as ``text`` alone also RoBERTa's and XLM-R's.

        Raises:
            ModelError: The folder's configuration asks for other options than the model has.
        """
        return super().from_foreign(as_albef(weights), path)

    def misfits(self) -> Iterator[Misfit]:
        """Options that do not fit together."""
        yield from super().misfits()
        yield from twin_misfits(self.kind, self.momentum)
        if self.native:
            yield Misfit(("sizes",), "'native'", "'fixed' or 'stretched': boxes are cut from square grids", "change it")
