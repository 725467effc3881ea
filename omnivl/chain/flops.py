"""Floating-point operations of a step, summed over the layers of a chain.

A multiplication and its addition count as two. Only matrix products and convolutions count: normalisations, softmax,
the losses' similarities, projections and patch heads are left out, and what follows the backward pass (the optimizer,
``after_step``). Activation recomputation does not count, since MFU is defined by useful work. What is frozen has no
gradient of its weights, and none of its inputs where nothing before it is trained (``omnivl.chain.backward``). Padding
does not count in blocks that leave it out; inside attention, which computes whole rows, it counts. Patches that
``patch_dropout`` drops do not count.

Layers use the sizes of their configuration, since this process may hold only a share of their parameters or none.
"""

from collections.abc import Mapping

from omnivl.chain.chain import Chain
from omnivl.chain.state import StepLayout


def chain_flops(chain: Chain, layout: StepLayout, text_tokens: int | None = None, listed_tokens: int = 0) -> float:
    """Operations of one step's forward and backward pass, the momentum twins' forward pass included.

    Args:
        chain: Built on any device, ``meta`` included.
        layout: The step.
        text_tokens: Tokens of the batch's texts, with start and end tokens but without padding; None: the text length
            for each. Texts that are drawn as negatives count with the mean length.
        listed_tokens: Tokens of ``StepLayout.embedded_texts``, counted likewise, where ``text_tokens`` is given. All
            texts then count with the mean length of those that encoders read.
    """
    tokens = None if text_tokens is None else text_tokens / layout.batch_size
    if tokens is not None and layout.embedded_texts:
        listed = num_rows({name: layout.text[name] for name in layout.embedded_texts})
        every = num_rows(layout.text)
        tokens = ((every - listed) * tokens + listed_tokens) / every
    layers = chain.named_layers
    return sum((layers[name].flops(layout, tokens, number) for name, number in chain.passes), start=0.0)


def num_rows(segments: Mapping[str, slice]) -> int:
    """Rows of a stream's stack."""
    return sum(rows.stop - rows.start for rows in segments.values())


def twin_rows(layout: StepLayout, stream: str) -> int:
    """Rows of a stream that its momentum twin computes."""
    return num_rows(layout.twins.get(stream, {}))


def written(text_length: int, tokens: float | None, length: int | None = None) -> float:
    """Positions of a text that the causal stream reads and predicts: one less than the tokens of the text.

    Of texts that are not the batch's own all positions count, since nothing is known of their tokens.

    Args:
        text_length: L.
        tokens: See ``ChainLayer.flops``.
        length: Positions of a text that is none of the batch's own; see ``Join.length``.
    """
    if length is not None:
        return length
    return text_length if tokens is None else tokens - 1
