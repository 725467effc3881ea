"""Every model on every host reproduces its record: losses, gradient norms, metrics and weights of 20 steps.

The results are equal to the bit on a machine like that of the record (``machine`` in the record), within ``LIMITS`` on
any other. If a change is meant to change results, ``python tests/golden/record.py --replace`` records them again; its
commit says why.
"""

from collections.abc import Callable

import pytest
from golden.runs import (
    RUNS,
    Record,
    Run,
    carry_out,
    deviations,
    fingerprint,
    first_difference,
    read_recorded,
    record_file,
    too_far,
)

pytestmark = [pytest.mark.integration, pytest.mark.distributed, pytest.mark.timeout(180)]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Run], dict[str, Record]]:
    """``results(run)``: the records of a run's models. A run is carried out once for all of them, even if it fails."""
    done: dict[Run, dict[str, Record] | BaseException] = {}

    def get(run: Run) -> dict[str, Record]:
        if run not in done:
            try:
                done[run] = carry_out(run, tmp_path_factory.mktemp(f"{run.plan}-{run.host}"))
            except Exception as error:
                done[run] = error
        found = done[run]
        if isinstance(found, BaseException):
            raise found
        return found

    return get


@pytest.mark.parametrize(
    ("run", "model"),
    [
        pytest.param(run, model, id=f"{model}-{run.host}", marks=pytest.mark.full if run.long else ())
        for run in RUNS
        for model in run.models
    ],
)
def test_a_model_comes_to_what_was_recorded(results: Callable[[Run], dict[str, Record]], run: Run, model: str) -> None:
    expected, got = read_recorded(record_file(model, run.host)), results(run)[model]
    alike = expected["machine"] == fingerprint()
    beyond = too_far(deviations(got, expected), to_the_bit=alike)
    assert not beyond, (
        f"{len(beyond)} figures and tensors are off, compared {'to the bit' if alike else 'within the limits'}: "
        f"{'; '.join(beyond[:8])}. {first_difference(got, expected)}"
    )


def test_every_record_is_compared() -> None:
    known = {record_file(model, run.host) for run in RUNS for model in run.models}
    assert known == set(record_file("", "").parent.glob("*.json"))


def test_a_deviation_is_found() -> None:
    """One bit of one loss and one bit of one weight, and more than the limits allow."""
    expected = read_recorded(record_file("towers", "plain"))
    assert too_far(deviations(expected, expected), to_the_bit=True) == []
    got = read_recorded(record_file("towers", "plain"))
    got["figures"]["losses: vlm"][5] *= 1 + 1e-7
    name = "visual_00.block.attention.qkv.weight"
    got["tensors"][name][0] = "float32:other"
    got["tensors"][name][2] *= 1 + 1e-7
    assert len(too_far(deviations(got, expected), to_the_bit=True)) == 2
    assert too_far(deviations(got, expected), to_the_bit=False) == []
    assert first_difference(got, expected).startswith("first in step 6: losses: vlm ")
    got["figures"]["losses: lm"][0] *= 1 + 2e-6
    got["tensors"][name][3] += 2e-6 * got["tensors"][name][2]
    assert {text.split(" by ")[0] for text in too_far(deviations(got, expected), to_the_bit=False)} == {
        "losses: lm",
        f"tensor {name}",
    }
    del got["tensors"][name]
    assert too_far(deviations(got, expected), to_the_bit=False)[0] == f"tensor {name} by inf"
