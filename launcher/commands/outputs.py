"""The files that commands write."""

import tempfile
from pathlib import Path

from omnivl.errors import UserError


def require_writable(out: Path, said: str = "--out") -> None:
    """Refuses a file that cannot be written, before the work for it is done. Makes its folder.

    Args:
        out: The file, which need not exist.
        said: How its user names it.

    Raises:
        UserError: It is a folder, or nothing can be written beside it.
    """
    try:
        if out.is_dir():
            raise UserError(f"{said}: got {out}, which is a folder; allowed the name of a file; name one in it")
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=out.parent, prefix=f".{out.name[:40]}."):
            pass
    except OSError as error:
        raise UserError(
            f"{said}: got {out}, which cannot be written ({error.filename}: {error.strerror}); allowed a file in a "
            "folder of yours; choose another one"
        ) from error
