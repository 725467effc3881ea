"""Samples of an archive: neighbouring members with one key, and what is wrong with them."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from omnivl.data.archive import ArchiveError, Member, matters
from omnivl.data.formats import MEDIA_EXTENSIONS, TEXT_EXTENSIONS
from omnivl.data.sources.base import BadSampleError, Cause

Part = TypeVar("Part")

_MEDIA = "*"  # stands for the one picture or clip that has the sample's own name


@dataclass
class Group(Generic[Part]):
    """The members of one sample.

    Attributes:
        key: The sample's name.
        media: The picture or clip with the sample's own name, and its extension.
        text: The JSON, txt and cls members.
        members: Further pictures and clips by what follows the key and a dot.
        unknown: The first extension that is not read; "" for none.
        problem: Why the sample cannot be used; None if it can.
    """

    key: str
    media: tuple[Part, str] | None = None
    text: dict[str, Part] = field(default_factory=dict)
    members: dict[str, Part] = field(default_factory=dict)
    unknown: str = ""
    problem: tuple[Cause, str] | None = None

    @property
    def parts(self) -> frozenset[str]:
        """What the sample has, to be compared with other samples of its name."""
        return frozenset({*self.text, *self.members, *([] if self.media is None else [_MEDIA])})

    def add(self, member: Member, part: Part) -> None:
        """Takes a member in."""
        extension = member.extension
        if member.refused is not None and matters(extension):
            self.problem = self.problem or ("unusable_member", member.refused)
        if extension in TEXT_EXTENSIONS:
            self._refuse_second(extension, extension in self.text)
            self.text.setdefault(extension, part)
        elif extension in MEDIA_EXTENSIONS:
            self._refuse_second(extension, self.media is not None)
            self.media = self.media or (part, extension)
        else:
            self.unknown = self.unknown or extension
            if matters(extension):
                self._refuse_second(extension, extension in self.members)
                self.members.setdefault(extension, part)

    def _refuse_second(self, extension: str, repeated: bool) -> None:
        if repeated:
            self.problem = self.problem or ("duplicate_key", f"the sample has two members for .{extension}")


def lacking_media(extension: str, texts: Iterable[str], where: str) -> BadSampleError:
    """Why a sample without a picture or clip cannot be used for it.

    Args:
        extension: Of a member that is not read; "" for none.
        texts: Extensions of its text members.
        where: ``SHARD:KEY``.
    """
    if extension:
        known = ", ".join(sorted(MEDIA_EXTENSIONS))
        return BadSampleError("unknown_extension", where, f".{extension} is not read; known: {known}")
    return BadSampleError("missing_media", where, f"the sample has only {', '.join(sorted(texts))}")


def group_members(members: Iterable[tuple[Member, Part]]) -> Iterator[Group[Part]]:
    """Joins neighbouring members of one key, and finds those that come again.

    Raises:
        ArchiveError: From ``members``, after the samples before it. The last one is given only if an end mark lies
            behind it, or if it has a picture and a text and nothing known of it is cut: others may have lost a part.
    """
    seen: dict[str, frozenset[str]] = {}
    shared: dict[frozenset[str], frozenset[str]] = {}  # most samples have the same parts
    group: Group[Part] | None = None
    archive = 0
    try:
        for member, part in members:
            if group is not None and (group.key, archive) != (member.key, member.archive):
                yield _compared(group, seen, shared)
                group = None
            group, archive = group or Group(member.key), member.archive
            group.add(member, part)
    except ArchiveError as error:
        whole = group is not None and group.key != error.key and group.media is not None and bool(group.text)
        if group is not None and (whole or error.behind_end):
            yield _compared(group, seen, shared)
        raise
    if group is not None:
        yield _compared(group, seen, shared)


def _compared(
    group: Group[Part], seen: dict[str, frozenset[str]], shared: dict[frozenset[str], frozenset[str]]
) -> Group[Part]:
    """The group, with a problem if an earlier one has its key."""
    parts = group.parts
    earlier = seen.get(group.key)
    if earlier is None:
        seen[group.key] = shared.setdefault(parts, parts)
    elif earlier & parts or not parts or not earlier:
        group.problem = ("duplicate_key", "an earlier sample of the shard has this key")
    else:
        detail = (
            "the sample's members do not lie beside each other, as if all pictures came before all texts; write the "
            "archive with tar --sort=name"
        )
        group.problem = ("scattered_members", detail)
    return group
