"""The texts and metadata of a sample, from its JSON, txt and cls members.

``{"caption": "..."}`` or ``{"captions": [...]}`` or ``{"captions": {"en": [...], "de": "..."}}``; ``label``,
``identity`` and any other field. A ``txt`` member is a caption and a ``cls`` member a label where the JSON has none.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

from omnivl.data.sources.base import BadSampleError

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_MAX_DEPTH = 100
_OWN_FIELDS = ("caption", "captions", "identity")


@dataclass(frozen=True)
class Record:
    """Parsed text members of a sample.

    Attributes:
        captions: Captions by language; "" if the sample does not name the language.
        label: Class name.
        identity: Name of the concept shown.
        meta: All other fields, ``label`` included, so that it can be filtered by.
    """

    captions: Mapping[str, tuple[str, ...]]
    label: str | None
    identity: str | None
    meta: Mapping[str, object]

    def captions_in(self, language: str) -> tuple[str, ...]:
        """Captions in ``language``, or those that name no language."""
        return self.captions.get(language) or self.captions.get("", ())


def parse_record(members: Mapping[str, bytes], where: str) -> Record:
    """Parses a sample's text members.

    Args:
        members: Bytes by extension: ``json``, ``txt``, ``cls``.
        where: ``SHARD:KEY`` for messages.

    Raises:
        BadSampleError: ``invalid_utf8`` or ``wrong_json``.
    """
    texts: dict[str, str] = {}
    for extension, data in members.items():
        try:
            texts[extension] = data.decode("utf-8")
        except UnicodeDecodeError as error:
            detail = f".{extension}: byte {data[error.start]:#04x} at offset {error.start} is not UTF-8"
            raise BadSampleError("invalid_utf8", where, detail) from error
    fields: dict[str, object] = {}
    if "json" in texts:
        fields = _parse_json(texts["json"], where)
    captions = _captions(fields, where)
    if not captions and texts.get("txt", "").strip():
        captions = {"": (texts["txt"].strip(),)}
    label = fields.get("label")
    if label is None and texts.get("cls", "").strip():
        label = fields["label"] = texts["cls"].strip()
    if (label is not None and not isinstance(label, str | int)) or label == "":
        raise BadSampleError("wrong_json", where, f"label is {label!r}; allowed: a class name")
    identity = fields.get("identity")
    meta = {name: value for name, value in fields.items() if name not in _OWN_FIELDS}
    return Record(captions, None if label is None else str(label), None if identity is None else str(identity), meta)


def _parse_json(text: str, where: str) -> dict[str, object]:
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:  # a number of thousands of digits is a plain ValueError
        raise BadSampleError("wrong_json", where, str(error)) from error
    if not isinstance(fields, dict):
        raise BadSampleError("wrong_json", where, f"the JSON is a {type(fields).__name__}; allowed: an object")
    if text.count("[") + text.count("{") > _MAX_DEPTH and not _is_shallow(fields):
        raise BadSampleError("wrong_json", where, f"lists and objects are nested deeper than {_MAX_DEPTH}")
    if _SURROGATE.search(text) is not None:
        try:
            kept = {name: value for name, value in fields.items() if name not in ("caption", "captions")}
            json.dumps(kept, ensure_ascii=False).encode("utf-8")  # a caption matters only if it is chosen
        except UnicodeEncodeError as error:
            half = error.object[error.start]
            raise BadSampleError("invalid_utf8", where, f".json: {half!a} is half of a pair, no character") from error
    return fields


def _is_shallow(value: object) -> bool:
    """Whether lists and objects are nested no deeper than ``_MAX_DEPTH``: what is can be neither encoded nor sent."""
    level = [value]
    for _ in range(_MAX_DEPTH + 1):
        inner: list[object] = []
        for one in level:
            inner += one.values() if isinstance(one, dict) else one if isinstance(one, list) else ()
        if not inner:
            return True
        level = inner
    return False


def _captions(fields: Mapping[str, object], where: str) -> dict[str, tuple[str, ...]]:
    found = fields.get("captions")
    if found is None:
        found = fields.get("caption")
    if isinstance(found, dict):
        by_language = {str(language): _texts(value, where) for language, value in found.items()}
    else:
        language = fields.get("lang")
        by_language = {language if isinstance(language, str) else "": _texts(found, where)}
    return {language: captions for language, captions in by_language.items() if captions}


def _texts(value: object, where: str) -> tuple[str, ...]:
    """One text or a list of them; empty ones count as missing."""
    texts: list[str] = []
    for entry in value if isinstance(value, list) else [] if value is None else [value]:
        if not isinstance(entry, str):
            raise BadSampleError("wrong_json", where, f"a caption is {entry!r}; allowed: text")
        texts.append(entry.strip())
    return tuple(text for text in texts if text)
