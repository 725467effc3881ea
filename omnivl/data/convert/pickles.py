"""Pickle files of public data sets, as far as they hold plain values: nothing that they ask for is looked up or called.

A pickle is a program for a machine with a stack. This one knows the instructions that make lists, tuples, dictionaries,
texts, bytes and numbers, and no others.
"""

import codecs
import io
import pickletools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from omnivl.errors import DataError, reason_of

_INSTRUCTIONS = {one.code.encode("latin-1"): one for one in pickletools.opcodes}
_NUMBERS = ("INT", "LONG", "LONG1", "LONG4", "BININT", "BININT1", "BININT2", "FLOAT", "BINFLOAT")
_LETTERS = ("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8")
_ARGUMENTS = frozenset({*_NUMBERS, *_LETTERS})
_TEXTS = frozenset({"BINSTRING", "SHORT_BINSTRING"})
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_PUTS = frozenset({"PUT", "BINPUT", "LONG_BINPUT"})
_GETS = frozenset({"GET", "BINGET", "LONG_BINGET"})
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_SINCE_MARK = frozenset({"APPENDS", "SETITEMS", "LIST", "TUPLE", "DICT", "POP_MARK"})
_NOTHING = frozenset({"PROTO", "FRAME"})


def load_pickle(file: Path) -> object:
    """What a pickle file holds, if these are plain values. Texts of Python 2 are read as UTF-8.

    Raises:
        DataError: It cannot be read, is no pickle, or holds anything else.
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file}: {reason_of(error)}; give the path of a readable file") from error
    try:
        return _run(io.BytesIO(content))
    except (ValueError, LookupError, TypeError, ArithmeticError) as error:
        raise DataError(
            f"{file}: no pickle of plain values: {error}; allowed: lists, dictionaries, texts and numbers; save it "
            "again from a program that you trust, without other objects"
        ) from error


def _run(program: io.BytesIO) -> object:
    """Runs a program whose instructions make plain values.

    Raises:
        ValueError: It has others, or is damaged; likewise ``LookupError``, ``TypeError`` and ``ArithmeticError``.
    """
    stack: list[object] = []
    marks: list[int] = []
    memo: dict[object, object] = {}
    while code := program.read(1):
        instruction = _INSTRUCTIONS.get(code)
        if instruction is None:
            raise ValueError(f"no instruction is {code!r}")
        name = instruction.name
        if name == "STRING":
            stack.append(_text(codecs.escape_decode(program.readline().strip()[1:-1])[0]))
            continue
        argument: Any = None if instruction.arg is None else instruction.arg.reader(program)
        if name in _ARGUMENTS:
            stack.append(argument)
        elif name in _PUTS:
            memo[argument] = stack[-1]
        elif name in _GETS:
            stack.append(memo[argument])
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in _TEXTS:
            stack.append(_text(argument.encode("latin-1")))
        elif name == "MARK":
            marks.append(len(stack))
        elif name == "STOP":
            return stack.pop()
        elif name not in _NOTHING:
            _build(name, argument, stack, marks)
    raise ValueError("it ends too early")


def _build(name: str, argument: object, stack: list[object], marks: list[int]) -> None:
    """Makes a container, or puts something into one."""
    values: list[object] = []
    if name in _SINCE_MARK:
        mark = marks.pop()
        values, stack[mark:] = stack[mark:], []
    elif name in ("APPEND", "SETITEM"):
        count = 1 if name == "APPEND" else 2
        values, stack[-count:] = stack[-count:], []
    if name in _CONSTANTS:
        stack.append(_CONSTANTS[name])
    elif name in ("EMPTY_LIST", "LIST"):
        stack.append(values)
    elif name in ("EMPTY_DICT", "DICT"):
        stack.append(dict(_pairs(values)))
    elif name == "TUPLE":
        stack.append(tuple(values))
    elif name in _TUPLES:
        count = _TUPLES[name]
        stack[-count:] = [tuple(stack[-count:])]
    elif name in ("APPEND", "APPENDS"):
        if not isinstance(stack[-1], list):
            raise TypeError(f"something is put into a {type(stack[-1]).__name__}")
        stack[-1].extend(values)
    elif name in ("SETITEM", "SETITEMS"):
        if not isinstance(stack[-1], dict):
            raise TypeError(f"something is put into a {type(stack[-1]).__name__}")
        stack[-1].update(_pairs(values))
    elif name == "POP":
        stack.pop()
    elif name == "DUP":
        stack.append(stack[-1])
    elif name != "POP_MARK":
        asked = "" if argument is None else f" {argument}"
        raise ValueError(f"it has an instruction that is not followed, {name}{asked}")


def _pairs(values: list[object]) -> Iterable[tuple[object, object]]:
    names = values[::2]
    if wrong := [type(name).__name__ for name in names if not isinstance(name, str | int | float | bytes | None)]:
        raise TypeError(f"a key is a {wrong[0]}")  # of a deep one not even the hash can be computed
    return zip(names, values[1::2], strict=True)


def _text(letters: bytes) -> str:
    return letters.decode("utf-8", "surrogateescape")
