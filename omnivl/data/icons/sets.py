"""What is known of an icon set before it is opened: author, licence, whether it is used, whether its hand is unseen."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from omnivl.randomness import stable_hash

Group = Literal["free", "share-alike", "non-free", "unclear"]
GROUPS: tuple[Group, ...] = get_args(Group)

LICENCES: Mapping[str, Group] = {
    "0BSD": "free",
    "Apache-2.0": "free",
    "BSD-2-Clause": "free",
    "BSD-3-Clause": "free",
    "CC-BY-3.0": "free",
    "CC-BY-4.0": "free",
    "CC0-1.0": "free",
    "ISC": "free",
    "MIT": "free",
    "Unlicense": "free",
    "CC-BY-SA-3.0": "share-alike",
    "CC-BY-SA-4.0": "share-alike",
    "GPL-2.0-only": "share-alike",
    "GPL-2.0-or-later": "share-alike",
    "GPL-3.0": "share-alike",
    "GPL-3.0-only": "share-alike",
    "GPL-3.0-or-later": "share-alike",
    "MPL-2.0": "share-alike",
    "OFL-1.1": "share-alike",
    "CC-BY-NC-4.0": "non-free",
    "CC-BY-NC-SA-4.0": "non-free",
    "CC-BY-ND-4.0": "non-free",
}
"""Group of a licence by SPDX identifier; a set with another licence, or none, is ``unclear``."""

KEPT_FOR_CHECKS = "openmoji"
"""This set is never opened, whatever is asked for: its drawings are kept for checks from outside."""

UNSEEN_SETS = frozenset({"twemoji"})
"""Always unseen: Twemoji is the unseen style of the embedded drawings."""

SEEN_AUTHORS = frozenset({"Emoji One", "Google", "Google Inc", "Microsoft Corporation", "Mozilla", "Streamline"})
"""Never unseen: they draw the embedded emoji, which a plan may train on as well."""

UNSEEN_SHARE = 0.1
"""Share of the other authors whose hand is unseen, in all their sets."""


@dataclass(frozen=True)
class SetInfo:
    """A set. Texts are empty where it does not state them.

    Attributes:
        prefix: Name of its file.
        title: Name in words.
        author: Who drew it.
        author_address: Web address of the author.
        licence: SPDX identifier, else the licence's title.
        licence_address: Web address of the licence.
        licence_group: What the licence allows.
        category: What kind of set it is, such as ``Emoji`` or ``Logos``.
        total: Number of icons that the package counts; 0 if it does not say.
    """

    prefix: str
    title: str
    author: str
    author_address: str
    licence: str
    licence_address: str
    licence_group: Group
    category: str
    total: int

    @property
    def unseen(self) -> bool:
        """Whether the hand is held out. A function of the set and its author alone."""
        if self.prefix in UNSEEN_SETS:
            return True
        return self.author not in SEEN_AUTHORS and stable_hash("icons", "hand", self.author) / 2**63 < UNSEEN_SHARE

    def reason_to_leave_out(self, groups: Collection[Group]) -> str | None:
        """Why the set is not used; None if it is.

        Args:
            groups: Groups of licences that are wanted.
        """
        if any(KEPT_FOR_CHECKS in text.lower().replace(" ", "") for text in (self.prefix, self.title, self.author)):
            return "kept for checks from outside"
        if self.licence_group in groups:
            return None
        return f"licence is {self.licence_group}: {self.licence or 'none is stated'}"


def read_set_info(prefix: str, info: Mapping[str, Any]) -> SetInfo:
    """Reads the entry of a set in the package's ``collections.json``."""
    total = info.get("total")
    author, licence = _mapping(info.get("author")), _mapping(info.get("license"))
    spdx = _text(licence.get("spdx"))
    return SetInfo(
        prefix=prefix,
        title=_text(info.get("name")) or prefix,
        author=_text(author.get("name")),
        author_address=_text(author.get("url")),
        licence=spdx or _text(licence.get("title")),
        licence_address=_text(licence.get("url")),
        licence_group=LICENCES.get(spdx, "unclear"),
        category=_text(info.get("category")),
        total=total if isinstance(total, int) else 0,
    )


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(value: object) -> str:
    return value.strip() if isinstance(value, str) else ""
