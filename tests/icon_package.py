"""A package of icon sets in miniature."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tar_files import write_tar

HOUSE = '<path fill="currentColor" d="M2 8l6-6l6 6v6H2z"/>'
BALL = '<circle cx="8" cy="8" r="6" fill="#c03040"/>'
SETS: dict[str, tuple[dict[str, Any], dict[str, Any] | str]] = {
    "alpha": (
        {"name": "Alpha Icons", "author": {"name": "Ann", "url": "https://a.example"}, "license": {"spdx": "MIT"}},
        {
            "icons": {
                "cottage": {"body": HOUSE},
                "cottage-outline": {"body": HOUSE.replace("fill", "stroke")},
                "old-cottage": {"body": HOUSE, "hidden": True},
                "nothing": {"body": "<g/>"},
                "torn": {"body": "<path"},
                "leak": {"body": '<image href="/etc/passwd" width="16" height="16"/>'},
                "flat": {"body": HOUSE, "width": 0},
                "arrow-left": {"body": '<path fill="currentColor" d="M2 8l8-6v12z"/>'},
            },
            "aliases": {"villa": {"parent": "cottage"}, "arrow-right": {"parent": "arrow-left", "hFlip": True}},
            "categories": {"Buildings": ["cottage", "old-cottage"], "Places": ["villa"]},
            "suffixes": {"": "Filled", "outline": "Outline"},
        },
    ),
    "beta": (
        {"name": "Beta", "author": {"name": "Bob"}, "license": {"spdx": "CC-BY-4.0"}, "category": "Emoji", "total": 2},
        {"icons": {"ball": {"body": BALL}, "ghost": {"body": BALL.replace("#c03040", "#fafafa")}}},
    ),
    "broken": ({"name": "Broken", "license": {"spdx": "ISC"}}, "[1]"),
    "openmoji": ({"name": "OpenMoji", "license": {"spdx": "MIT"}}, {"icons": {"ball": {"body": BALL}}}),
    "copies": ({"name": "Open Moji copies", "license": {"spdx": "MIT"}}, {"icons": {"ball": {"body": BALL}}}),
    "shared": ({"name": "Shared", "license": {"spdx": "CC-BY-SA-4.0"}}, {"icons": {"ball": {"body": HOUSE}}}),
    "mystery": ({"name": "Mystery", "license": {"title": "Ask us"}}, {"icons": {"ball": {"body": HOUSE}}}),
    "twemoji": (
        {"name": "Twitter Emoji", "author": {"name": "Twitter"}, "license": {"spdx": "CC-BY-4.0"}},
        {"icons": {"star": {"body": BALL.replace("#c03040", "#f0c000")}, "circle": {"body": BALL}}},
    ),
}


def write_package(path: Path, sets: Mapping[str, tuple[Any, Any]] = SETS) -> Path:
    """Writes an archive as npm has it."""
    files = {"collections.json": json.dumps({prefix: info for prefix, (info, _) in sets.items()})}
    for prefix, (_, tree) in sets.items():
        files[f"json/{prefix}.json"] = tree if isinstance(tree, str) else json.dumps({"prefix": prefix, **tree})
    return write_tar(path, {f"package/{name}": text.encode() for name, text in files.items()}, "w:gz")
