"""Collates the fields of the samples of a batch into tensors of a fixed size and Python values.

Shapes: B samples, S side of the view, L token positions.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from omnivl.data.fields import Field, Placed
from omnivl.data.tokenizer import Tokenizer


def collate_fields(
    types: Mapping[str, Field], samples: Sequence[Mapping[str, object]], tokenizer: Tokenizer, size: int
) -> dict[str, Tensor | tuple[object, ...]]:
    """The fields of a batch as ``Batch.fields`` has them; see ``Field``.

    Args:
        types: Types by name.
        samples: The fields of each sample, from ``FieldReader``.
        tokenizer: Texts to ids.
        size: S.
    """
    collated: dict[str, Tensor | tuple[object, ...]] = {}
    for name, field in types.items():
        values = [sample[name] for sample in samples]
        match field.kind:
            case "raw":
                collated[name] = tuple(values)
            case "text":
                collated[name] = tuple(values)
                if field.length:
                    collated |= _token_ids(name, field, values, tokenizer)
            case "number":
                collated |= _padded(name, field, [_numbers(value) for value in values], ())
            case "boxes":
                collated |= _padded(name, field, [_placed(value, (4,)) for value in values], (4,))
            case "mask":
                shape = (size, size)
                collated |= _padded(name, field, [_placed(value, shape) for value in values], shape, np.bool_)
    return collated


def _token_ids(name: str, field: Field, values: Sequence[object], tokenizer: Tokenizer) -> dict[str, Tensor]:
    """``NAME/token_ids`` and ``NAME/present``; absent texts are all padding."""
    texts = [() if value is None else value if isinstance(value, tuple) else (value,) for value in values]
    token_ids = np.full((len(texts), field.most, field.length), tokenizer.special.pad, dtype=np.int64)
    present = np.arange(field.most)[None] < np.array([len(own) for own in texts])[:, None]
    if present.any():
        token_ids[present] = tokenizer.encode([str(text) for own in texts for text in own], field.length)
    return _tensors(field, {f"{name}/token_ids": token_ids, f"{name}/present": present})


def _numbers(value: object) -> Placed:
    values = np.array([] if value is None else value, dtype=np.float64).reshape(-1)
    return Placed(values, np.ones(len(values), dtype=np.bool_))


def _placed(value: object, shape: tuple[int, ...]) -> Placed:
    return value if isinstance(value, Placed) else Placed(np.zeros((0, *shape)), np.zeros(0, dtype=np.bool_))


def _padded(
    name: str, field: Field, samples: Sequence[Placed], shape: tuple[int, ...], dtype: type[np.generic] = np.float32
) -> dict[str, Tensor]:
    """``NAME`` and ``NAME/present``, every sample padded to ``most`` values."""
    values: NDArray[np.generic] = np.zeros((len(samples), field.most, *shape), dtype=dtype)
    present = np.zeros((len(samples), field.most), dtype=np.bool_)
    for row, sample in enumerate(samples):
        values[row, : len(sample.values)] = sample.values
        present[row, : len(sample.values)] = sample.present
    return _tensors(field, {name: values, f"{name}/present": present})


def _tensors(field: Field, arrays: Mapping[str, NDArray[np.generic]]) -> dict[str, Tensor]:
    """Stacks tensors, without the dimension of the values if there is only one."""
    return {name: torch.from_numpy(array[:, 0] if field.most == 1 else array) for name, array in arrays.items()}
