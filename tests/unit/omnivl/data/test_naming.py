"""What is a bad sample, and what is a mistake of ours."""

import json
import pickle

import pytest

from omnivl.data.decode import decode_still
from omnivl.data.limits import DecodeLimits
from omnivl.data.quarantine import Quarantine
from omnivl.data.sources.base import BadSampleError, Sample, naming
from omnivl.errors import DataError


def raised_by(error: Exception) -> Exception:
    """What leaves the place that names the sample, if a library raises ``error``."""
    with pytest.raises(Exception) as caught, naming("broken_image", "s.tar:k"):  # noqa: PT011
        raise error
    return caught.value


@pytest.mark.parametrize("kind", [IndexError, AttributeError, TypeError, KeyError, MemoryError, RecursionError])
def test_whatever_a_library_raises_is_a_bad_sample_with_its_traceback(kind):
    error = raised_by(kind("odd"))
    assert isinstance(error, BadSampleError)
    assert (error.rejection.cause, error.rejection.where) == ("broken_image", "s.tar:k")
    assert kind.__name__ in error.rejection.detail
    assert "in raised_by" in error.rejection.traceback
    assert pickle.loads(pickle.dumps(error)).rejection.traceback == error.rejection.traceback


def test_the_log_keeps_the_traceback(tmp_path):
    error = raised_by(IndexError("odd"))
    assert isinstance(error, BadSampleError)
    quarantine = Quarantine(max_bad_fraction=1.0, min_samples_to_judge=10, log=tmp_path / "log.jsonl")
    quarantine.record(1, [error.rejection, BadSampleError("wrong_json", "s.tar:l", "foreseen").rejection])
    first, second = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
    assert first["traceback"].endswith("IndexError: odd\n")
    assert second == {"cause": "wrong_json", "where": "s.tar:l", "detail": "foreseen"}


def test_a_long_traceback_is_cut():
    error = raised_by(ValueError("x" * 100_000))
    assert isinstance(error, BadSampleError)
    assert len(error.rejection.traceback) == 4000


@pytest.mark.parametrize("mistake", ["undefined_name", "None.missing", "'1' + 1", "is_complete(1, 2, 3)"])
def test_a_mistake_in_our_own_lines_is_not_a_bad_sample(monkeypatch, mistake):
    import omnivl.data.decode as module

    monkeypatch.setattr(module, "is_complete", eval(compile(f"lambda _: {mistake}", module.__file__, "eval")))
    with pytest.raises((NameError, AttributeError, TypeError)) as caught, naming("unusable", "s.tar:k"):  # noqa: PT012
        monkeypatch.setattr(module, "picture_size", lambda _: (1, 1))
        with naming("broken_image", "s.tar:k"):
            decode_still(Sample("k", "s.tar:k", b"\x89PNG\r\n\x1a\n", "png"), DecodeLimits())
    assert not isinstance(caught.value, BadSampleError)
    assert caught.value.__notes__ == ["while s.tar:k was read"], "named once, though two places would name it"


def test_data_that_our_own_lines_cannot_read_is_a_bad_sample(monkeypatch):
    """Errors that bad data raises anywhere, as an index beyond an array, say nothing about who is wrong."""
    import omnivl.data.decode as module

    monkeypatch.setattr(module, "picture_size", eval(compile("lambda data: data[99]", module.__file__, "eval")))
    with pytest.raises(BadSampleError, match="unusable: IndexError"), naming("unusable", "s.tar:k"):
        decode_still(Sample("k", "s.tar:k", b"\x89PNG\r\n\x1a\n", "png"), DecodeLimits())


def test_what_the_user_has_to_mend_is_not_a_bad_sample():
    assert isinstance(raised_by(DataError("mend the plan")), DataError)
