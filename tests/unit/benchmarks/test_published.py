"""The table of published figures: the definition of the error, and that the page agrees with the code."""

import pytest

from benchmarks.published import PAGE, Row, rows, table


@pytest.mark.parametrize(("estimated", "error"), [(44.0, 0.1), (36.0, -0.1), (41.0, 0.0)])
def test_an_error_is_against_the_nearest_published_value(estimated: float, error: float) -> None:
    row = Row("model", "MFU, %", (40.0, 42.0) if error <= 0 else (38.0, 40.0), estimated, "")
    assert row.error == pytest.approx(error)


def test_the_page_has_the_table_of_today() -> None:
    assert table(rows()) in PAGE.read_text(encoding="utf-8"), "run `python -m benchmarks.published --write`"
