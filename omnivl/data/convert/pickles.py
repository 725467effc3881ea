"""Pickle files of public data sets, read without running anything that they ask for."""

import pickle
from pathlib import Path

from omnivl.errors import DataError, reason_of


class _PlainUnpickler(pickle.Unpickler):
    """Makes lists, tuples, dictionaries, texts, bytes, numbers and None, which need nothing to be called."""

    def find_class(self, module: str, name: str) -> object:
        """Whatever a pickle names would be called: nothing is given.

        Raises:
            UnpicklingError: Always.
        """
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which reading would run")


def load_pickle(file: Path) -> object:
    """What a pickle file holds, if these are plain values.

    Raises:
        DataError: It cannot be read, is no pickle, or holds anything else.
    """
    try:
        with file.open("rb") as opened:
            loaded: object = _PlainUnpickler(opened, encoding="utf-8", errors="surrogateescape").load()
    except OSError as error:
        raise DataError(f"{file}: {reason_of(error)}; give the path of a readable file") from error
    except Exception as error:  # a damaged pickle raises nearly everything
        raise DataError(
            f"{file}: no pickle of plain values: {type(error).__name__}: {error}; allowed: lists, dictionaries, texts "
            "and numbers; save it again from a program that you trust, without other objects"
        ) from error
    return loaded
