"""How often a host waits for its device: counted on a CPU, where nothing waits."""

import traceback
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from engine.estimate.allocations import tensors_in
from engine.hosts.zero import norm
from omnivl.parts.padding import Padding

_WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique_dim", "_unique2")
"""Operations whose result, or its size, the host has to know."""
_READS = ("tolist", "numpy", "__array__")
_ON_HOST = ("_kept_positions", "_said", "receive_state", "receive_gradient")
"""Functions of the step that compute on the host's own tensors."""


class WaitCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts waits, as they would be on an accelerator.

    Tensors of the host itself cost no wait: texts before they are moved, the norm that was read back. Of texts only the
    padding is left out that the host knows of, as on an accelerator.

    Attributes:
        found: Where a host waits, by operation and place in the code.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: Counter[str] = Counter()
        self._on_host: list[Tensor] = []
        self._usual: dict[str, Any] = {}
        self._reading = False

    def __enter__(self) -> "WaitCounter":
        self._usual = {name: getattr(Tensor, name) for name in _READS}
        self._norm, self._padding = norm._on_host, Padding.worth_dropping
        for name, usual in self._usual.items():
            setattr(Tensor, name, self._counted(name, usual))

        def on_host(value: float) -> Tensor:
            made = self._norm(value)
            self._on_host.append(made)
            return made

        def known(mask: Tensor | None, kept: Tensor | None = None) -> Padding | None:
            return None if mask is None or kept is None else Padding(mask, kept)

        norm._on_host, Padding.worth_dropping = on_host, known  # type: ignore[method-assign]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        norm._on_host, Padding.worth_dropping = self._norm, self._padding  # type: ignore[method-assign]
        for name, usual in self._usual.items():
            setattr(Tensor, name, usual)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operation and looks whether the host has to know its result."""
        name, given = func.overloadpacket.__name__, list(tensors_in(args))
        by_mask = name == "index" and any(one is not None and one.dtype == torch.bool for one in args[1])
        if (name in _WAITS or by_mask) and not self._reading:
            self._note(name, given)
        out = func(*args, **(kwargs or {}))
        if given and all(self._is_on_host(one) for one in given) and isinstance(out, Tensor):
            self._on_host.append(out)
        return out

    def _counted(self, name: str, usual: Any) -> Any:
        def read(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self._reading:  # what a read is made of
                return usual(tensor, *args, **kwargs)
            self._note(name, [tensor])
            self._reading = True
            try:
                return usual(tensor, *args, **kwargs)
            finally:
                self._reading = False

        return read

    def _is_on_host(self, tensor: Tensor) -> bool:
        return any(tensor is one for one in self._on_host)

    def _note(self, name: str, given: list[Tensor]) -> None:
        frames = traceback.extract_stack()
        if any(frame.name in _ON_HOST for frame in frames) or all(map(self._is_on_host, given)):
            return
        places = [f"{frame.filename.rsplit('/', 1)[-1]}:{frame.lineno}" for frame in frames if _is_ours(frame.filename)]
        self.found[f"{name} {' '.join(places[-3:])}"] += 1


def _is_ours(file: str) -> bool:
    return "/site-packages/torch/" not in file and not file.endswith("/benchmarks/waits.py")
