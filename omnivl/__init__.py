"""Images, videos and text: data, model, objectives and evaluation. Knows nothing of ranks, optimizers or DeepSpeed.

For programs and notebooks (``docs/python.md``):

    import omnivl

    model = omnivl.load("runs/quickstart")

``load`` and ``train`` need files of runs and processes, which upper layers know. They are looked up there by name when
they are first asked for, so that ``import omnivl`` imports none of these layers.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.finished.load import load as load
    from launcher.start.train import train as train
    from omnivl.api import Match as Match
    from omnivl.api import Model as Model
    from omnivl.api import Routing as Routing
    from omnivl.errors import UserError as UserError

_PUBLIC = {
    "load": "engine.finished.load",
    "train": "launcher.start.train",
    "Match": "omnivl.api",
    "Model": "omnivl.api",
    "Routing": "omnivl.api",
    "UserError": "omnivl.errors",
}


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'omnivl' has no attribute {name!r}")
    if _PUBLIC[name].partition(".")[0] != "omnivl":
        from omnivl.__main__ import shadows

        if found := shadows():
            raise ImportError("\n".join(found))
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
