"""Rows of lists: separators, quotes, line ends, Parquet."""

import datetime

import pyarrow
import pytest
from pyarrow import parquet

from omnivl.data.convert.lists import count_rows, read_list
from omnivl.data.sources.base import Rejection
from omnivl.errors import DataError


def rows_and_bad(file, columns=(), **options):
    rows, bad = {}, {}
    for found in read_list(file, columns, **options):
        if isinstance(found, Rejection):
            bad[found.where.removeprefix(str(file))] = found.detail
        else:
            rows[found[0].removeprefix(str(file))] = dict(found[1])
    return rows, bad


def test_quotes_of_tab_separated_lists_are_letters(tmp_path):
    table = tmp_path / "train.tsv"
    table.write_text('caption\tfile\n"one stray quote\ta.jpg\nplain\tb.jpg\nends with it"\tc.jpg\n"both"\td.jpg\n')
    rows, bad = rows_and_bad(table, ("caption", "file"))
    assert not bad
    assert [row["caption"] for row in rows.values()] == ['"one stray quote', "plain", 'ends with it"', '"both"']
    assert [row["file"] for row in rows.values()] == ["a.jpg", "b.jpg", "c.jpg", "d.jpg"]


def test_quotes_can_be_said_to_enclose_values(tmp_path):
    table = tmp_path / "frame.tsv"
    table.write_text('file\tcaption\na.jpg\t"a ""tab""\there"\n')
    assert rows_and_bad(table, quotes=True)[0][":2"] == {"file": "a.jpg", "caption": 'a "tab"\there'}
    table = tmp_path / "plain.csv"
    table.write_text('file,caption\na.jpg,"stray\nb.jpg,next\n')
    rows, bad = rows_and_bad(table, quotes=False)
    assert (rows[":2"]["caption"], rows[":3"]["caption"], bad) == ('"stray', "next", {})


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_a_stray_quote_takes_no_row_silently(tmp_path, line_end):
    table = tmp_path / "list.csv"
    lines = ["file,caption", "1.jpg,fine", '2.jpg,"stray', "3.jpg,lost", '4.jpg,ends" here', "5.jpg,fine again"]
    table.write_text(line_end.join([*lines, ""]), newline="")
    rows, bad = rows_and_bad(table, ("file", "caption"))
    assert {place: row["caption"] for place, row in rows.items()} == {":2": "fine", ":6": "fine again"}
    assert sorted(bad) == [":3", ":4", ":5"]
    lines[4] = '4.jpg,ends"'
    table.write_text(line_end.join([*lines, ""]), newline="")
    rows, bad = rows_and_bad(table, ("file", "caption"))
    assert {place: row["caption"] for place, row in rows.items()} == {":2": "fine", ":6": "fine again"}
    assert sorted(bad) == [":3", ":4", ":5"]
    assert bad[":3"].startswith("quotes from line 3 to 5 enclose line ends")


def test_a_quote_that_is_never_closed_names_all_lines_behind_it(tmp_path):
    table = tmp_path / "list.csv"
    table.write_text('file,caption\n1.jpg,fine\n2.jpg,"open\n3.jpg,x\n4.jpg,y\n')
    rows, bad = rows_and_bad(table, ("file", "caption"))
    assert list(rows) == [":2"]
    assert sorted(bad) == [":3", ":4", ":5"]


def test_a_carriage_return_within_a_text_ends_no_row(tmp_path):
    table = tmp_path / "list.tsv"
    table.write_bytes(b"file\tcaption\na.jpg\tone\rtwo\nb.jpg\tfine\r\n")
    rows, bad = rows_and_bad(table)
    assert {place: row["caption"] for place, row in rows.items()} == {":3": "fine"}
    assert list(bad) == [":2"]
    old = tmp_path / "old.csv"
    old.write_bytes(b"file,caption\ra.jpg,one\rb.jpg,two\r")
    assert [row["caption"] for row in rows_and_bad(old)[0].values()] == ["one", "two"]


@pytest.mark.parametrize("letter", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl"])
def test_only_line_ends_end_lines(tmp_path, letter, suffix):
    table = tmp_path / f"list.{suffix}"
    text = f"one{letter}two"
    head, row = {
        "csv": ("file,caption", f"a.jpg,{text}"),
        "tsv": ("file\tcaption", f"a.jpg\t{text}"),
        "jsonl": ('{"file": "0.jpg", "caption": "zero"}', f'{{"file": "a.jpg", "caption": "{text}"}}'),
    }[suffix]
    table.write_text(f"{head}\n{row}\n", encoding="utf-8")
    rows, bad = rows_and_bad(table)
    if suffix == "jsonl" and letter < " ":
        assert list(bad) == [":2"]  # JSON has no control characters within texts
    else:
        assert (rows[":2"]["caption"], bad) == (text, {})


def test_separator(tmp_path):
    table = tmp_path / "list.csv"
    table.write_text("file;caption\na.jpg;one, two\n")
    assert rows_and_bad(table, ("file",), separator=";")[0][":2"]["caption"] == "one, two"
    with pytest.raises(DataError) as error:
        rows_and_bad(table, ("file",))
    assert str(error.value) == f"{table}:1: one column, 'file;caption'; if ';' parts columns, say --separator ';'"
    other = tmp_path / "list.json"
    other.write_text("[]")
    with pytest.raises(DataError, match=r"only \.csv and \.tsv lists have separators"):
        rows_and_bad(other, separator=";")


def test_a_header_that_is_not_utf8_is_said_to_be_so(tmp_path):
    (table := tmp_path / "list.csv").write_text("file,caption\na.jpg,one\n", encoding="utf-16")
    with pytest.raises(DataError) as error:
        rows_and_bad(table, ("file",))
    assert str(error.value) == f"{table}:1: the header line is not UTF-8; save the file as UTF-8"


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_a_column_that_stands_twice_is_refused_if_it_is_asked_for(tmp_path, suffix):
    table, between = tmp_path / f"list.{suffix}", "," if suffix == "csv" else "\t"
    table.write_text(between.join(["file", "caption", "caption"]) + "\n" + between.join(["a.jpg", "one", "two"]) + "\n")
    with pytest.raises(DataError, match=r":1: 2 columns are named 'caption'; give each a name of its own"):
        rows_and_bad(table, ("file", "caption"))
    assert rows_and_bad(table, ("file",))[0][":2"]["file"] == "a.jpg"


def test_parquet(tmp_path):
    table = tmp_path / "list.parquet"
    columns = {
        "file": ["a.jpg", "b.jpg", "c.jpg"],
        "captions": [["one", "two"], [], ["three"]],
        "width": [640, None, 3],
        "share": [0.5, float("nan"), 1.0],
        "day": [datetime.date(2020, 1, 2)] * 3,
        "raw": [b"x", b"y", b"z"],
    }
    parquet.write_table(pyarrow.table(columns), table, row_group_size=2)
    wanted = ("file", "captions", "width", "share", "day")
    rows, bad = rows_and_bad(table, wanted)
    assert (count_rows(table), list(rows), bad) == (3, ["[0]", "[1]", "[2]"], {})
    assert rows["[0]"] == dict(zip(wanted, ("a.jpg", ["one", "two"], 640, 0.5, "2020-01-02"), strict=True))
    assert (rows["[1]"]["width"], rows["[1]"]["share"]) == (None, None)
    assert list(rows_and_bad(table, ("raw",))[1]) == ["[0]", "[1]", "[2]"]
    with pytest.raises(DataError, match=r"no column 'caption'; .*did you mean 'captions'"):
        rows_and_bad(table, ("caption",))


def test_damaged_parquet_is_one_clear_error(tmp_path):
    table = tmp_path / "list.parquet"
    parquet.write_table(pyarrow.table({"file": [f"{number}.jpg" for number in range(2000)]}), table)
    whole = table.read_bytes()
    for damaged in (b"", b"PAR1", whole[:100], whole[len(whole) // 2 :], whole[:50] + bytes(400) + whole[450:]):
        table.write_bytes(damaged)
        with pytest.raises(DataError, match=r"list\.parquet: .*mend the file"):
            rows_and_bad(table, ("file",))
