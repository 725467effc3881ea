"""The section on inputs of docs/faults.md is what the recorded figures say."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_page_has_the_recorded_figures_and_names_what_exists() -> None:
    spec = importlib.util.spec_from_file_location("faults_page", ROOT / "tests" / "integration" / "faults_page.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    section = module.inputs_section()
    page = (ROOT / "docs" / "faults.md").read_text()
    assert page.endswith(section), "python tests/integration/faults_page.py"
    for row in module.json.loads(module.INPUTS.read_text())["rows"]:
        assert (ROOT / row["again"]).exists()
        places = row["kept_out_by"].split("; ")
        for place in places:
            file, *functions = place.split("`")[1::2]
            assert (ROOT / file).is_file(), file
            for function in functions:
                named = function.rpartition(".")[2]
                assert f"def {named}(" in (ROOT / file).read_text(), function
