from collections.abc import Callable
from pathlib import Path

import pytest

from engine.hosts.pipeline.profile import read_profile
from omnivl.errors import UserError

Edit = Callable[[Path], object]


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda path: None, "which is no profile of stage 'spatial'"),
        (lambda path: path.write_text("[]"), "which is no profile of stage 'spatial'"),
        (lambda path: path.write_text('{"stages": {}}'), "which is no profile of stage 'spatial'"),
        (lambda path: path.write_text('{"stages": {"spatial": {}}}'), "is of another chain: it differs in embed"),
    ],
)
def test_a_bad_profile_is_named(tmp_path: Path, edit: Edit, said: str) -> None:
    edit(tmp_path / "layers.json")
    with pytest.raises(UserError, match=r"parallel.pipeline_profile: .*omnivl profile PLAN --out FILE") as error:
        read_profile(tmp_path / "layers.json", "spatial", [("embed", 0)])
    assert said in str(error.value)
