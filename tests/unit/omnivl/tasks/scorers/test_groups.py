"""Means by group."""

from omnivl.tasks.scorers.groups import by_group


def test_means_of_groups() -> None:
    assert by_group(["b", "a", "b"], [1.0, 0.5, 0.0]) == {"a": 0.5, "b": 0.5}
    assert list(by_group(["b", "a"], [1.0, 0.5])) == ["a", "b"]
