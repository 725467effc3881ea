"""The eight attributes of a token that attribute routing looks at."""

Attributes = tuple[int, ...]

NAMES = (
    *("visual_in_inputs", "text_in_inputs", "visual_in_targets", "text_in_targets"),
    *("token_is_visual", "token_is_text", "causal", "token_is_input"),
)


def attributes_of(modality: str, *, fused: bool = False, causal: bool = False) -> Attributes:
    """Eight bits in the order of ``NAMES``.

    An image or clip is 1001 1000 and a text 0101 0100, as in the paper's table for images and masked texts; joined
    sequences have both inputs. The target modality is set to text everywhere, because one pass serves several
    objectives; the last bit is 0 as in the paper's examples.

    Source: Zhu et al., Uni-Perceiver-MoE, arXiv 2206.04674, section 3.2 and its table of attributes.

    Args:
        modality: One of ``MODALITIES``.
        fused: Whether the sequence joins modalities, or attends to another one.
        causal: Whether a token sees itself and earlier ones only.
    """
    visual = modality != "text"
    return int(visual or fused), int(not visual or fused), 0, 1, int(visual), int(not visual), int(causal), 0
