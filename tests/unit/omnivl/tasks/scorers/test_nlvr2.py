"""NLVR2's consistency."""

import pytest

from omnivl.errors import DataError
from omnivl.tasks.scorers.nlvr2 import consistent, sentence_of


def test_a_sentence_is_consistent_if_all_of_its_pairs_are_right() -> None:
    identifiers = ["dev-850-0-0", "dev-850-1-0", "dev-850-0-1", "dev-850-1-1", "test1-850-0-0"]
    found = consistent(identifiers, [True, True, False, True, True])
    assert found == {"dev-850--0": True, "dev-850--1": False, "test1-850--0": True}


def test_the_order_of_pairs_does_not_matter() -> None:
    assert consistent(["dev-1-0-0", "dev-1-1-0"], [False, True]) == {"dev-1--0": False}
    assert consistent(["dev-1-0-0", "dev-1-1-0"], [True, False]) == {"dev-1--0": False}


def test_identifiers_of_other_data_are_refused() -> None:
    with pytest.raises(DataError, match="identifier 'dev-850' of NLVR2"):
        sentence_of("dev-850")
