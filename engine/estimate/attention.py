"""What share of its rate on long rows fused attention reaches: it loses time at the ends of rows and in narrow heads.

For each block of queries a kernel starts and ends once, and takes an exponential for each score whatever the width of a
head is: both take as much time as some further keys or columns would. Their numbers follow from the rates that
FlashAttention-2 reaches on an H100 at 512 to 16,384 keys. The formula meets those of heads of 128 within 8 % (forward
and backward together, and forward with a causal mask), of heads of 64 within 6 % with a causal mask, within 8 % without
one from 2,048 keys on, and is 17 % below the forward rate at 512.

Source: Shah et al., FlashAttention-3, arXiv 2407.08608, figures 5 and 6.
"""

WIDTH = 128
"""Of the heads for which a machine's rate is given."""

_KEYS, _COLUMNS = 200, 21


def reached(keys: int, width: int) -> float:
    """The share, 1 for long rows of heads of ``WIDTH``.

    Args:
        keys: That a query looks at on average.
        width: Of a head.
    """
    return keys / (keys + _KEYS) * (width / (width + _COLUMNS)) * (WIDTH + _COLUMNS) / WIDTH
