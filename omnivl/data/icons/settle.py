"""Animated icons as they look when their animations have ended.

A renderer of still pictures shows an animated drawing as it begins, and many begin empty.

Source: SVG Animations Level 2: ``animate`` and ``set`` with ``fill="freeze"`` keep their last value.
"""

from xml.etree import ElementTree

_SVG = "http://www.w3.org/2000/svg"
_XLINK = "http://www.w3.org/1999/xlink"
_KEEPING = (f"{{{_SVG}}}animate", f"{{{_SVG}}}set")


def is_animated(body: str) -> bool:
    """Whether a body has an animation that may keep its last value."""
    return "<animate" in body or "<set" in body


def settled(body: str) -> str:
    """A body with the last values of its animations that keep them, in the order in which they stand.

    A body that is no XML is returned as it is, for the renderer to refuse.
    """
    try:
        root = ElementTree.fromstring(f'<svg xmlns="{_SVG}" xmlns:xlink="{_XLINK}">{body}</svg>')
    except ElementTree.ParseError:
        return body
    for parent in root.iter():
        for child in parent:
            if child.tag in _KEEPING and child.get("fill") == "freeze":
                name, last = child.get("attributeName"), _last_value(child)
                if name is not None and last is not None:
                    parent.set(name, last)
    return "".join(ElementTree.tostring(child, encoding="unicode") for child in root)


def _last_value(animation: ElementTree.Element) -> str | None:
    values = [value.strip() for value in animation.get("values", "").split(";") if value.strip()]
    return values[-1] if values else animation.get("to")
