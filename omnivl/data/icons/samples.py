"""The icons of a set as samples: which are drawn, their texts, and where they belong."""

import hashlib
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from omnivl.data.emoji.iconify import Icon, read_contents
from omnivl.data.icons.job import IconTask, Refusal
from omnivl.data.icons.names import Themes, captions_of, family_of, share_of, split_of, words_of
from omnivl.data.icons.sets import SetInfo


@dataclass(frozen=True)
class HeldOut:
    """What other data and other sets hold out.

    Attributes:
        families: Split by family of names that the embedded drawings hold out.
        drawings: Digests of the drawings of unseen hands: a copy of one in another set is unseen as well.
    """

    families: Mapping[str, str]
    drawings: Collection[bytes]


def drawings_of(tree: Mapping[str, Any]) -> set[bytes]:
    """Digests of all drawings of a set."""
    return {digest_of(icon) for icon in read_contents(tree).icons.values()}


def digest_of(icon: Icon) -> bytes:
    """Equal for equal bodies, whatever their names."""
    return hashlib.blake2b(icon.body.encode("utf-8", "surrogatepass"), digest_size=12).digest()


def samples_of(info: SetInfo, tree: Mapping[str, Any], held_out: HeldOut) -> tuple[list[IconTask], list[Refusal]]:
    """The listed icons of a set in the order of their names, and the entries that are damaged.

    Hidden icons are left out, as Iconify leaves them out of its lists. Aliases that only rename an icon are further
    names of it, if they are in the same split; those that turn or mirror one are icons of their own.

    Args:
        info: The set.
        tree: Its JSON.
        held_out: See there.
    """
    contents, themes = read_contents(tree), Themes(tree)
    further: dict[str, list[str]] = defaultdict(list)
    for alias, owner in contents.aliases.items():
        further[owner].append(alias)
    categories = _categories(tree, contents.aliases)
    tasks = []
    for name, icon in contents.icons.items():
        if icon.hidden:
            continue
        identity = themes.identity(name)
        family = family_of(identity)
        split = split_of(family, held_out.families)
        names = [one for one in further[name] if split_of(family_of(themes.identity(one)), held_out.families) == split]
        unseen = info.unseen or digest_of(icon) in held_out.drawings
        fields = {
            "identity": identity,
            "name": words_of(name),
            "tags": list(dict.fromkeys([*map(words_of, names), *categories[name]])),
            "captions": captions_of(name, names, categories[name], info.title),
            **({"label": categories[name][0]} if categories[name] else {}),
            "group": info.category,
            "set": info.prefix,
            "author": info.author,
            "license": info.licence,
            "hand": "unseen" if unseen else "seen",
            "split": split,
            "family": family,
            "share": share_of(info.prefix, name),
        }
        tasks.append(IconTask(name, icon, fields))
    refusals = [
        Refusal(f"{info.prefix}:{name}", "damaged", detail) for name, detail in sorted(contents.damaged.items())
    ]
    return tasks, refusals


def _categories(tree: Mapping[str, Any], aliases: Mapping[str, str]) -> Mapping[str, list[str]]:
    """Categories of each icon in the set's order."""
    found: dict[str, list[str]] = defaultdict(list)
    declared = tree.get("categories")
    for title, names in declared.items() if isinstance(declared, dict) else ():
        for name in names if isinstance(names, list) and title.strip() else ():
            owner = aliases.get(name, name) if isinstance(name, str) else ""
            if title.strip() not in found[owner]:
                found[owner].append(title.strip())
    return found
