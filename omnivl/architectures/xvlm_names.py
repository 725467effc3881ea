"""Weights of X-VLM's and X2-VLM's released code under the names of ALBEF's, from which they grew, and under ours."""

from collections.abc import Mapping

from torch import Tensor

_ENCODER = "vision_encoder."
_FRAMES, _OUR_FRAMES = "absolute_frame_pos_embed", "visual_regions.block.times"
_HEADS: Mapping[str, str] = {"itm_head.": "losses.heads.vlm.", "bbox_head.": "losses.heads.locate."}
_MAPS: Mapping[str, str] = {"0.": "hidden.", "1.": "norm.", "3.": "output."}


def as_albef(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a ViT, of texts and of projections under ALBEF's names, heads and frames' embeddings under ours.

    All others keep theirs: those of Swin and BEiT-2 have no counterpart.
    """
    found = dict[str, Tensor]()
    for name, tensor in weights.items():
        head = next((prefix for prefix in _HEADS if name.startswith(prefix)), None)
        if name == _FRAMES:
            found[_OUR_FRAMES] = tensor.flatten(0, 2)
        elif head is None:
            begins = name.startswith(_ENCODER)
            found["visual_encoder." + name.removeprefix(_ENCODER) if begins else name] = tensor
        else:
            place = name.removeprefix(head)
            number, end = place[:2], place[2:]
            found[_HEADS[head] + _MAPS.get(number, number) + end] = tensor
    return found
