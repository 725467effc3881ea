"""What holds for every reader of a public data set: counts, places, fields that nobody knows, missing files."""

import csv
import json
import pickle
import random
import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest
import typer
from converter_inputs import INPUTS, FormInput

from launcher.commands.data_convert import app
from omnivl.data.convert import FORMS, ConvertOptions, FormReader, convert
from omnivl.data.sources.base import Rejection
from omnivl.docstrings import attribute_texts
from omnivl.errors import DataError

READERS = {cls.form: cls for cls in FORMS}
OPTIONS = ConvertOptions()


def made(form: str, folder: Path) -> tuple[FormReader, FormInput]:
    given = INPUTS[form]
    given.write(folder)
    return READERS[form](**given.arguments(folder)), given


def test_each_form_has_an_input_and_a_command():
    assert set(INPUTS) == set(READERS)
    assert len(READERS) == len(FORMS)
    assert set(READERS) < {command.name for command in app.registered_commands}


@pytest.mark.parametrize("form", READERS)
def test_every_field_is_described(form):
    texts = attribute_texts(READERS[form])
    assert set(texts) >= {one.name for one in fields(READERS[form])}


@pytest.mark.parametrize("form", READERS)
@pytest.mark.filterwarnings("error::UserWarning")
def test_what_is_kept_and_what_is_left_out(form, tmp_path):
    reader, given = made(form, tmp_path)
    manifest = convert(reader, tmp_path / "out", OPTIONS)
    assert (manifest.form, manifest.samples, dict(manifest.rejected)) == (form, given.samples, given.rejected)
    for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines():
        where = json.loads(line)["where"]
        file = re.sub(r"(:.*|\[\d+\].*)$", "", where)
        assert Path(file).is_file(), f"{where} begins with a file"
        assert where != file or file.endswith(".xml") or Path(file).parent.name == "Sentences"


@pytest.mark.parametrize("form", READERS)
def test_fields_that_nobody_knows_are_named_once(form, tmp_path):
    reader, given = made(form, tmp_path)
    file = main_file(form, tmp_path)
    if form == "msvd":
        pytest.skip("its lines have no fields")
    add_field(file)
    if form == "paragraphs":
        with pytest.raises(
            DataError, match=r"Stanford's paragraphs is not known to have 'surprise'; allowed: image_id"
        ):
            list(reader.entries())
        return
    with pytest.warns(UserWarning, match="surprise") as caught:
        manifest = convert(reader, tmp_path / "out", OPTIONS)
    (said,) = [str(one.message) for one in caught if "surprise" in str(one.message)]
    assert said.startswith(
        f"{file}: fields that files of {reader.title} are not known to have are not read: 'surprise' ("
    )
    assert manifest.samples == given.samples


def main_file(form: str, folder: Path) -> Path:
    """The first file that a form is given."""
    first = next(iter(INPUTS[form].arguments(folder).values()))
    return first / "Annotations" / "1000.xml" if form == "entities" else first


def add_field(file: Path) -> None:
    """A field that no form has, in every object of a file."""

    def grown(value: object) -> object:
        if isinstance(value, dict):
            return {name: grown(one) for name, one in value.items()} | {"surprise": 1}
        return [grown(one) for one in value] if isinstance(value, list) else value

    text = "" if file.suffix == ".p" else file.read_text()
    if file.suffix == ".p":
        file.write_bytes(pickle.dumps(grown(pickle.loads(file.read_bytes())), protocol=2))
    elif file.suffix == ".xml":
        file.write_text(text.replace("<object>", "<surprise/><object>"))
    elif file.suffix == ".csv":
        rows = list(csv.reader(text.splitlines()))
        with file.open("w", newline="") as opened:
            csv.writer(opened).writerows([*row, "1" if number else "surprise"] for number, row in enumerate(rows))
    else:
        whole = not text.rstrip().count("\n")
        lines = [text] if whole else text.splitlines()
        file.write_text("\n".join(line if line == "{" else json.dumps(grown(json.loads(line))) for line in lines))


@pytest.mark.parametrize("form", READERS)
def test_a_missing_file_is_named(form, tmp_path):
    reader, _ = made(form, tmp_path)
    for name, value in INPUTS[form].arguments(tmp_path).items():
        moved = value[0] if isinstance(value, tuple) else value
        moved.rename(tmp_path / "moved")
        with pytest.raises(DataError) as caught:
            convert(reader, tmp_path / "out", OPTIONS)
        expected = "is no folder; give the folder of the pictures" if name == "images" else "does not exist; give the"
        assert str(caught.value).startswith(f"{moved} {expected}")
        (tmp_path / "moved").rename(moved)


@pytest.mark.parametrize("form", READERS)
def test_a_file_of_another_form_is_refused(form, tmp_path):
    """Nothing in it is a sample: the message says what was found and what is allowed."""
    reader, _ = made(form, tmp_path)
    file = main_file(form, tmp_path)
    for content in ("[]", '"text"', "{\n}", "7", "", "[" * 100_000):
        file.write_text(content)
        with pytest.raises(DataError) as caught:
            convert(reader, tmp_path / "out", OPTIONS)
        assert re.search(r"allowed|no usable sample|no picture or clip|the columns are|mend|header", str(caught.value))
        assert not (tmp_path / "out").exists()


def documented() -> list[tuple[str, list[str], set[str]]]:
    """Form, words and fields of each command in the table of docs/converters.md."""
    text = (Path(__file__).parents[5] / "docs" / "converters.md").read_text()
    table = text.partition("## Public data sets")[2].partition("\n\nWhat holds")[0]
    rows = [row.split("|")[2:5:2] for row in table.splitlines() if row.startswith("|")]
    lines = [
        (command, set(re.findall(r"`(\w+)`", names))) for text, names in rows for command in re.findall("`(.+?)`", text)
    ]
    words = [(shlex.split(command), names) for command, names in lines]
    return [(first, rest, names) for (first, *rest), names in words if first in READERS]


def test_the_documented_commands_and_fields_are_there(tmp_path):
    """Every form is in the table; its words are a command's; its fields are in the samples of the small files."""
    commands = typer.main.get_command(app).commands
    assert {form for form, _, _ in documented()} == set(READERS)
    for form, words, names in documented():
        commands[form].make_context(form, [*words, "--out", "shards"])
        if form != "coco":  # NoCaps and others have fields of their own
            found = [one for one in made(form, tmp_path / form)[0].entries() if not isinstance(one, Rejection)]
            assert names <= {name for one in found for name in (*one.fields(), *one.boxes, *one.masks)}


ODD = (
    None,
    True,
    -1,
    7,
    2.5,
    "",
    " ",
    "x",
    "a\0b",
    "a" * 5000,
    "../x",
    [],
    {},
    [[]],
    {"x": 1},
    [None],
    10**30,
    "\ud800",
)


@pytest.mark.parametrize("form", READERS)
@pytest.mark.filterwarnings("ignore:.*are not known to have")
def test_odd_values_are_left_out_or_refused_by_name(form, tmp_path):
    """Any value in any place is a sample, a bad one with a cause, or a refusal, never another error."""
    reader, _ = made(form, tmp_path)
    files = [path for path in (main_file(form, tmp_path), *reader.inputs) if path.is_file()]
    draw = random.Random(form)
    for file in dict.fromkeys(files):
        original = file.read_bytes()
        for _ in range(60):
            file.write_bytes(damaged(file.suffix, original, draw))
            try:
                found = list(reader.entries())
            except DataError:
                continue
            for entry in found:
                if not isinstance(entry, Rejection):
                    json.dumps(entry.fields(), allow_nan=False)
        file.write_bytes(original)


def damaged(suffix: str, content: bytes, draw: random.Random) -> bytes:
    """A file in which a value is another one, or a few bytes are."""
    if suffix in (".p", ".json", ".jsonl"):
        values = (
            pickle.loads(content)
            if suffix == ".p"
            else [json.loads(one) for one in content.splitlines() if one != b"{"]
        )
        place: object = values
        while isinstance(place, dict | list) and place:
            name = draw.choice(list(place) if isinstance(place, dict) else range(len(place)))
            if not isinstance(place[name], dict | list) or not place[name] or draw.random() < 0.2:
                place[name] = draw.choice(ODD)
                break
            place = place[name]
        return pickle.dumps(values, 2) if suffix == ".p" else "\n".join(map(json.dumps, values)).encode()
    cut = bytearray(content)
    for _ in range(3):
        cut[draw.randrange(len(cut))] = draw.randrange(256)
    return bytes(cut)
