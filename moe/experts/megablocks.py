"""The grouped product of megablocks, an optional package (``pip install 'megablocks[gg]'``).

Shapes: E experts, N rows in the experts' order, I inputs, O outputs.
"""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

REMEDY = "pip install 'megablocks[gg]'"

Product = Callable[[Tensor, Tensor, bool], Tensor]
"""``product(rows, weight, transposed)``: rows ``[N, I]`` to ``[N, O]``, the weight ``[E, O, I]`` if transposed, else
``[E, I, O]``.

Rows after those of the last expert belong to no expert; their results are undefined.
"""


def import_problem() -> str | None:
    """Why megablocks' grouped product does not import; None where it does."""
    try:
        _load()
    except ImportError as error:
        return str(error)
    return None


def megablocks_product(tokens_per_expert_E: Tensor) -> Product:
    """The product of each expert's rows with its weight by ``grouped_gemm.ops.gmm``.

    The package multiplies in bf16 on a GPU only and needs the numbers of rows on the host: every layer reads them back,
    unlike with ``torch.nn.functional.grouped_mm``.

    Args:
        tokens_per_expert_E: int64, rows of each expert.

    Raises:
        ImportError: The package cannot be imported; ``import_problem`` says so beforehand.

    Source: Gale et al., MegaBlocks, arXiv 2211.15841.
    """
    gmm, counts_E = _load(), tokens_per_expert_E.cpu()
    used = int(counts_E.sum())

    def product(rows_NI: Tensor, weight: Tensor, transposed: bool) -> Tensor:
        made: Tensor = gmm(rows_NI[:used].contiguous(), weight.contiguous(), counts_E, trans_b=transposed)
        return F.pad(made, (0, 0, 0, len(rows_NI) - used))

    return product


def _load() -> Any:
    """``gmm(a, b, batch_sizes, trans_b)``: ``[N, I]``, ``[E, I, O]`` or transposed, int64 ``[E]`` on the CPU."""
    from grouped_gemm.ops import gmm  # the package that megablocks uses; imported here, because it is optional

    return gmm
