"""Which positions of texts are computed, found where a batch is made: no host then waits for its device to learn it.

Shapes: R rows, L positions, n positions that are chosen.

The number of real positions changes from batch to batch, and CPU kernels are compiled for every shape and cached: after
60 steps they took 1.1 GB. Therefore n is rounded up to one of few numbers by choosing some padded positions.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from omnivl.chain.demands import CLEAN, TWIN
from omnivl.chain.state import State

SHARES = 64
"""Into how many parts all positions of a batch are divided where a part is the multiple of those that are chosen."""

IGNORED = -100
"""Target of a position without a loss."""


def most_filled(rows: int, length: int) -> int:
    """The most positions by which ``chosen_positions`` fills up rows, whatever its multiple is."""
    return min(rows * length, max(1, rows // 4, rows * length // SHARES))


def chosen_positions(mask: Tensor, multiple: int | None = None) -> Tensor:
    """Indices where ``mask``, bool ``[R, L]``, is true, counted over all rows; then some where it is false, to fill up.

    Args:
        mask: The positions that are wanted.
        multiple: Of which n is one; None: R / 4 (rounded down, at least 1).

    Returns:
        int64 ``[n]``, distinct; n is a multiple, or R * L.
    """
    places, multiple = mask.flatten(), max(1, mask.shape[0] // 4) if multiple is None else multiple
    chosen = places.nonzero()[:, 0]
    lacking = -len(chosen) % multiple
    return torch.cat([chosen, (~places).nonzero()[:lacking, 0]]) if lacking else chosen


def prepared_targets(segment: str, targets: Tensor) -> dict[str, Tensor]:
    """Targets of words, int64 ``[R, L]``, as ``{segment}/targets``, and ``{segment}/chosen`` for ``chosen_of``.

    To be called in a data worker: how many positions have a target is then known without waiting for a device.
    """
    return {f"{segment}/targets": targets, f"{segment}/chosen": chosen_positions(targets != IGNORED)}


def chosen_of(state: Mapping[str, Tensor], segment: str) -> Tensor:
    """``chosen_positions`` of a segment's targets, int64 ``[n]``; found here where nobody has prepared them."""
    chosen = state.get(f"{segment}/chosen")
    return chosen_positions(state[f"{segment}/targets"] != IGNORED) if chosen is None else chosen


def ids_name(segment: str) -> str:
    """The field of the state that holds the words of a text segment."""
    return "token_ids" if segment == CLEAN else f"{segment}/token_ids"


def kept_name(stream: str) -> str:
    """The field of the state that holds the positions of a stream's rows that are computed, int64 ``[n]``."""
    return f"kept/{stream}"


def kept_positions(
    state: State, reads: Callable[[Tensor], Tensor], texts: Sequence[str] | None = None
) -> dict[str, Tensor]:
    """The positions of texts that hold a token, and some others, for each stream of which that is known in advance.

    Texts that are joined with what is drawn in the step are not: their rows are known to the device alone.

    Args:
        state: At the head of the chain, on the host.
        reads: Maps token ids ``[R, L]`` to bool ``[R, L]``: where a text has tokens.
        texts: The segments that are encoded; None: all.

    Returns:
        ``chosen_positions`` by ``kept_name``, of the streams in which something is left out.
    """
    layout = state.layout
    streams: dict[str, Sequence[str]] = {
        "text": tuple(layout.text) if texts is None else texts,
        "generation": tuple(layout.joins[name].text for name in layout.generation),
        f"{TWIN}text": tuple(layout.twins.get("text", ())),
    }
    kept = {}
    for stream, segments in streams.items():
        if segments:
            mask = reads(torch.cat([state[ids_name(name)] for name in segments]))
            chosen = chosen_positions(mask)
            if len(chosen) < mask.numel():
                kept[kept_name(stream)] = chosen
    return kept
