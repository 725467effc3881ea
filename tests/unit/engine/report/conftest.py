"""The run folder of the report's tests."""

from pathlib import Path

import pytest
from report_pages import write_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "somewhere")
