"""Conversion of model sections from before architectures had a ``kind`` into today's form.

One set of fields served two architectures then: ``{architecture: unified, vision_layers: 6}``. Today each has its own
fields: ``{kind: unified, depth: 6}``.
"""

from collections.abc import Mapping
from typing import Any

KINDS = {"towers": "omnivl", "unified": "unified"}
"""Today's kind for each value that ``architecture`` had."""

MOVED = {"unified": {"vision_layers": "depth"}}
"""Fields that have another name today, by kind."""

MEANINGLESS: Mapping[str, Mapping[str, tuple[object, ...] | None]] = {
    "omnivl": {"multiway": (False,)},
    "unified": {
        "text_layers": None,
        "alignment_layers": None,
        "generation_layers": None,
        "text_norm": None,
        "vision": (
            {},
            {"activation": "gelu", "norm_eps": 1e-6, "norm_embeddings": False, "relative_positions": False},
        ),
    },
}
"""Fields that an earlier plan could have without an effect, by kind; with the values that had none."""


def upgraded(model: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """A model section, or a part of one, in today's form.

    Args:
        model: Its fields, as YAML or JSON has them.
        kind: Kind of the section if ``model`` names none.
    """
    fields = dict(model)
    if "architecture" in fields:
        named = fields.pop("architecture")
        fields.setdefault("kind", KINDS.get(named, named))
    kind = str(fields.get("kind", kind))
    for name, allowed in MEANINGLESS.get(kind, {}).items():
        if name in fields and (allowed is None or fields[name] in allowed):
            del fields[name]
    for before, now in MOVED.get(kind, {}).items():
        if before in fields:
            value = fields.pop(before)
            fields.setdefault(now, value)
    return fields


def successor(name: str, kind: str) -> str:
    """Today's name of a field of a model section."""
    return "kind" if name == "architecture" else MOVED.get(kind, {}).get(name, name)
