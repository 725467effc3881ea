"""The page of systems: it is up to date but for counts of lines, names what there is, and leaves no system out."""

import re

import pytest
import systems_page
from systems_page import PAGE, PLANS, ROOT, SYSTEMS, System, module, page

OF_NO_SYSTEM = {
    *("beit", "distil", "drawing", "picture_codes", "vqa"),
}
"""Debug plans of objectives and tasks."""


def without_lines(text: str) -> str:
    return re.sub(r"\| \d+( \+ \d+)? \|", "| |", text)


def test_the_page_is_up_to_date() -> None:
    assert without_lines(PAGE.read_text(encoding="utf-8")) == without_lines(page()), "python tests/systems_page.py"


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: system.name)
def test_what_is_named_is_there(system: System) -> None:
    for plan in (system.debug, *system.papers):
        assert (PLANS / f"{plan}.yaml").is_file(), plan
    for place in system.parity:
        file, name = place.split("::")
        assert f"def {name}(" in (ROOT / file).read_text(), place
    assert (ROOT / system.layouts).is_file()
    assert {"time", "result"} <= systems_page._header(system.debug).keys()


def test_no_architecture_and_no_debug_plan_is_left_out() -> None:
    files = {module(system.architecture).name for system in SYSTEMS}
    every = (ROOT / "omnivl" / "architectures").glob("*.py")
    kinds = {path.name for path in every if "    kind: Literal[" in path.read_text()}
    assert kinds == files
    debug = {path.stem for path in PLANS.glob("*_tiny.yaml")} - {f"{name}_tiny" for name in OF_NO_SYSTEM}
    assert debug == {system.debug for system in SYSTEMS if system.debug != "quickstart"}


def test_further_lines_of_a_header_belong_to_their_entry() -> None:
    header = systems_page._header("albef_base")
    assert header["size"].endswith("momentum twins beside them")
    assert "\n" not in header["size"]
