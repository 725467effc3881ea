import pytest

from omnivl.data.templates import filled, unknown_places


@pytest.mark.parametrize(
    ("template", "unknown"),
    [
        ("a {label}", []),
        ("{name}: {label}", []),
        ("plain", []),
        ("{colour} {label}", ["{colour}"]),
        ("{label} {} {0}", ["{}", "{0}"]),
        ("{label.__class__}{label!r}{label:9}", ["{label.__class__}", "{label!r}", "{label:9}"]),
        ("{label", ["{"]),
        ("label}", ["}"]),
        ("{{label}}", ["{", "}"]),
    ],
)
def test_unknown_places(template, unknown):
    assert unknown_places(template, ("label", "name")) == unknown


def test_values_are_put_in_at_once():
    """A class that is called like a place stays what it is."""
    assert filled("{label}, {name}", {"label": "{name}", "name": "{label}"}) == "{name}, {label}"
    assert filled("a {label}", {"label": "c{a}t\\1 {0}"}) == "a c{a}t\\1 {0}"
    assert filled("{other} {label}{label}", {"label": "x"}) == "{other} xx"
