"""Reuses the memory of the last step's gradients."""

import torch
from torch import Tensor


class GradientMemory:
    """Keeps the memory of a bank's gradients between steps, and reuses it once no other tensor uses it.

    Without it the allocator returns gradients of many megabytes to the system after every step, and the system fills
    the memory of the next step with zeros first.
    """

    def __init__(self) -> None:
        self._kept: dict[int, torch.UntypedStorage] = {}

    def __getstate__(self) -> dict[str, object]:
        return {"_kept": {}}

    def like(self, place: int, tensor: Tensor) -> Tensor:
        """An uninitialised tensor of the shape and dtype of ``tensor``; ``place`` tells a bank's tensors apart."""
        storage, needed = self._kept.get(place), tensor.numel() * tensor.element_size()
        if storage is None or storage.nbytes() != needed or torch._C._storage_Use_Count(storage._cdata) > 1:
            storage = self._kept[place] = torch.UntypedStorage(needed)  # type: ignore[no-untyped-call]
        return torch.empty(0, dtype=tensor.dtype).set_(storage).view(tensor.shape)
