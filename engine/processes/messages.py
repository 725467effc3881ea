"""What processes tell each other besides tensors: plain data of a stated kind, as JSON.

Nothing that arrives is unpickled, and nothing in it names code. The receiver states the kind that it expects, in
Python's annotations, and refuses whatever is not of it. Kinds: None, bool, int, float, str, ``Path``, ``Literal``,
lists, tuples, mappings with text as keys, typed dictionaries, dataclasses, unions of None and one more, and ``Any``,
which is what JSON has. Floats that are not finite travel as JSON's usual extension (``NaN``, ``Infinity``), integers up
to 64 bits, and texts with lone surrogates, as in names of files that are no UTF-8, as escapes.
"""

import dataclasses
import functools
import json
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints, is_typeddict

import torch
import torch.distributed as dist
from torch import Tensor

LARGEST = 1 << 28
"""Bytes of a message. The largest are positions in the data of thousands of processes."""

_LARGEST_INTEGER = 1 << 63
_REFUSED = -1
"""Stands in the place of a message's size where its sender could not make it, so that nobody waits for it."""

_hints = functools.cache(get_type_hints)


class MessageError(ValueError):
    """A message is not of the kind that was expected, or too large."""


def broadcast(value: Any, kind: Any, group: dist.ProcessGroup | None = None) -> Any:
    """Returns the ``value`` of a group's first process on every process of it. Called by every process.

    Args:
        value: Of that kind; ignored elsewhere.
        kind: The same on every process.
        group: None is the default group of all processes.

    Raises:
        MessageError: It is of another kind, or larger than ``LARGEST``; on every process.
    """
    first = dist.get_rank(group) == 0
    content, problem = _packed(value, kind) if first else (b"", None)
    device = _device(group)
    size = torch.tensor([_REFUSED if problem else len(content)], dtype=torch.int64, device=device)
    dist.broadcast(size, group=group, group_src=0)
    count = _checked_size(int(size.item()), 0, problem)
    message = _as_tensor(content, count, device)
    if count:
        dist.broadcast(message, group=group, group_src=0)
    return unpack(_as_bytes(message, count), kind)


def gather(value: Any, kind: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Returns every process' ``value`` in the order of ranks. Called by every process.

    Args:
        value: Of that kind.
        kind: The same on every process.
        group: None is the default group of all processes.

    Raises:
        MessageError: One is of another kind, or larger than ``LARGEST``; on every process.
    """
    content, problem = _packed(value, kind)
    device, processes = _device(group), dist.get_world_size(group)
    own = torch.tensor([_REFUSED if problem else len(content)], dtype=torch.int64, device=device)
    sizes = [torch.empty_like(own) for _ in range(processes)]
    dist.all_gather(sizes, own, group=group)
    counts = [_checked_size(int(size.item()), rank, problem) for rank, size in enumerate(sizes)]
    most = max(counts)
    messages = [torch.empty(most, dtype=torch.uint8, device=device) for _ in counts]
    if most:
        dist.all_gather(messages, _as_tensor(content, most, device), group=group)
    return [unpack(_as_bytes(message, count), kind) for message, count in zip(messages, counts, strict=True)]


def pack(value: Any, kind: Any) -> bytes:
    """The message that says ``value``.

    Raises:
        MessageError: It is not of that kind, or too large.
    """
    try:
        plain = _converted(value, kind, "value", sending=True)
        content = json.dumps(plain, separators=(",", ":")).encode("ascii")
    except RecursionError as error:
        raise MessageError("message: got values in each other that have no end; allowed is plain data") from error
    if len(content) > LARGEST:
        raise MessageError(f"message: got {len(content)} bytes; allowed are {LARGEST}")
    return content


def unpack(content: bytes, kind: Any) -> Any:
    """The value that a message says; equal to what was packed.

    Raises:
        MessageError: It is no JSON, or not of that kind.
    """
    try:
        return _converted(json.loads(content, object_pairs_hook=_without_doubles), kind, "value", sending=False)
    except MessageError:
        raise
    except (ValueError, RecursionError) as error:
        raise MessageError(f"message: got {content[:80]!r}, which is no message of this run ({error})") from error


def _packed(value: Any, kind: Any) -> tuple[bytes, str | None]:
    """The message, or why there is none: an error that only one process raised would leave the others waiting."""
    try:
        return pack(value, kind), None
    except MessageError as error:
        return b"", str(error)


def _checked_size(size: int, rank: int, own_problem: str | None) -> int:
    if not 0 <= size <= LARGEST:
        why = own_problem or f"message of process {rank}: got size {size}; allowed are 0 to {LARGEST} bytes"
        raise MessageError(why)
    return size


def _device(group: dist.ProcessGroup | None) -> torch.device:
    """Where the group's backend expects its tensors."""
    return (
        torch.device("cuda", torch.cuda.current_device()) if dist.get_backend(group) == "nccl" else torch.device("cpu")
    )


def _as_tensor(content: bytes, size: int, device: torch.device) -> Tensor:
    """``content`` and zeros behind it, ``[size]`` bytes."""
    return torch.frombuffer(bytearray(content.ljust(size, b"\0")) or bytearray(1), dtype=torch.uint8)[:size].to(device)


def _as_bytes(message: Tensor, size: int) -> bytes:
    return message[:size].cpu().numpy().tobytes()


def _converted(value: Any, kind: Any, where: str, *, sending: bool) -> Any:
    """One value between Python and JSON; both ways check the kind."""
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any:
        return _plain(value, where)
    if kind is None or kind is type(None):
        return _require(value, value is None, "nothing", where)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in inner:
            return None
        (one,) = (member for member in inner if member is not type(None))
        return _converted(value, one, where, sending=sending)
    if origin is Literal:
        return _require(value, any(type(value) is type(one) and value == one for one in inner), repr(inner), where)
    if kind in (bool, str):
        return _require(value, type(value) is kind, kind.__name__, where)
    if kind is int:
        fits = type(value) is int and -_LARGEST_INTEGER <= value < _LARGEST_INTEGER
        return _require(value, fits, "an integer of 64 bits", where)
    if kind is float:
        return float(_require(value, type(value) in (int, float), "a number", where))
    if kind is Path:
        if sending:
            return str(_require(value, isinstance(value, Path), "a path", where))
        return Path(_require(value, type(value) is str, "the text of a path", where))
    if origin in (list, tuple, Sequence):
        return _sequence(value, origin, inner, where, sending=sending)
    if origin in (dict, Mapping):
        _require(value, isinstance(value, Mapping) and all(type(key) is str for key in value), "a mapping", where)
        return {key: _converted(one, inner[1], f"{where}.{key}", sending=sending) for key, one in value.items()}
    if dataclasses.is_dataclass(kind) or is_typeddict(kind):
        return _record(value, kind, where, sending=sending)
    raise TypeError(f"{where}: got the kind {kind!r}, which no message has")


def _sequence(value: Any, origin: Any, inner: tuple[Any, ...], where: str, *, sending: bool) -> Any:
    wanted = (list, tuple) if sending else list
    _require(value, isinstance(value, wanted), "a list", where)
    if origin is not tuple or inner[1:] == (...,):
        kinds: Sequence[Any] = [inner[0]] * len(value)
    else:
        kinds = inner
        _require(value, len(value) == len(kinds), f"{len(kinds)} values", where)
    made = [
        _converted(one, kind, f"{where}[{place}]", sending=sending)
        for place, (one, kind) in enumerate(zip(value, kinds, strict=True))
    ]
    return tuple(made) if origin is tuple and not sending else made


def _record(value: Any, kind: Any, where: str, *, sending: bool) -> Any:
    """A dataclass or a typed dictionary, as a mapping with all its fields."""
    hints = _hints(kind)
    typed = is_typeddict(kind)
    if sending and not typed:
        _require(value, type(value) is kind, kind.__name__, where)
        value = {name: getattr(value, name) for name in hints}
    _require(
        value, isinstance(value, Mapping) and value.keys() == hints.keys(), f"the fields {', '.join(hints)}", where
    )
    fields = {name: _converted(value[name], hints[name], f"{where}.{name}", sending=sending) for name in hints}
    return fields if sending or typed else kind(**fields)


def _plain(value: Any, where: str) -> Any:
    """What JSON has, unchanged, apart from tuples, which become lists on the way."""
    if value is None or type(value) in (bool, str, float):
        return value
    if type(value) is int:
        return _converted(value, int, where, sending=True)
    if isinstance(value, list | tuple):
        return [_plain(one, f"{where}[{place}]") for place, one in enumerate(value)]
    _require(value, isinstance(value, Mapping) and all(type(key) is str for key in value), "plain data", where)
    return {key: _plain(one, f"{where}.{key}") for key, one in value.items()}


def _require(value: Any, right: bool, allowed: str, where: str) -> Any:
    if not right:
        raise MessageError(f"message, {where}: got {type(value).__name__} {str(value)[:80]!r}; allowed is {allowed}")
    return value


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands there twice")
    return found
