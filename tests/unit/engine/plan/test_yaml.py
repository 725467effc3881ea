import random

import pytest
import yaml

from engine.plan.yaml import read_yaml, show_path, show_value, write_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E3", 1000.0),
        ("-2.5e+2", -250.0),
        (".5", 0.5),
        ("3.", 3.0),
        ("7", 7),
        ("1_000", 1000),
        ("-0", 0),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        # What YAML 1.1 makes False, 8, 90, 16 and a date of:
        ("no", "no"),
        ("on", "on"),
        ("010", "010"),
        ("1:30", "1:30"),
        ("0x10", "0x10"),
        ("2020-01-01", "2020-01-01"),
        ("'1e-4'", "1e-4"),
    ],
)
def test_scalars_are_what_they_look_like(text: str, value: object) -> None:
    read = read_yaml(f"key: {text}").tree["key"]
    assert read == value
    assert type(read) is type(value)


def test_every_value_has_the_line_of_its_key() -> None:
    document = read_yaml("a: 1\nb:\n  - c: 2\n  - d:\n      3\n", "p.yaml")
    assert document.places == {
        (): "p.yaml:1",
        ("a",): "p.yaml:1",
        ("b",): "p.yaml:2",
        ("b", 0): "p.yaml:3",
        ("b", 0, "c"): "p.yaml:3",
        ("b", 1): "p.yaml:4",
        ("b", 1, "d"): "p.yaml:4",
    }
    assert document.place(("b", 1, "not there", 7)) == "p.yaml:4", "the nearest thing that holds it"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "a: 1\na: 2",
            "p:2: a: got a second 'a' (the first is in line 1); allowed each key once; remove one of the two",
        ),
        ("a: .nan", "p:1: a: got .nan; allowed a finite number; change it to a finite number"),
        ("a: -.inf", "p:1: a: got -.inf; allowed a finite number; change it to a finite number"),
        ("a: 1e999", "p:1: a: got 1e999; allowed a finite number; change it to a finite number"),
        (
            "a: !!python/object:os.system {}",
            "p:1: a: got the tag tag:yaml.org,2002:python/object:os.system; allowed plain YAML without tags; remove the tag",
        ),
        ("a: !env HOME", "p:1: a: got the tag !env; allowed plain YAML without tags; remove the tag"),
        ("a: &x {b: *x}", "p:1: a.b: got an alias of what it stands in; allowed a tree; write the value out"),
        (
            "a:\n  ? [1]\n  : 2",
            "p:1: a: got a key that is itself a collection; allowed plain words as keys; change the key",
        ),
        (
            "a: b: c",
            "p:1: plan: got text that is no YAML (mapping values are not allowed here); allowed YAML; "
            "change this line or the one above",
        ),
        (
            "a: 1\nb: \x00",
            "p:2: plan: got a character that YAML does not allow; allowed printable Unicode; save the file as UTF-8 text",
        ),
    ],
)
def test_traps_are_problems(text: str, message: str) -> None:
    document = read_yaml(text, "p")
    assert [f"{document.place(problem.path)}: {problem.text}" for problem in document.problems] == [message]


def test_the_first_of_two_equal_keys_is_kept() -> None:
    assert read_yaml("a: 1\na: 2").tree == {"a": 1}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('!!int "abc"', "plan: got 'abc' with the tag !!int; allowed a value of it; remove the tag"),
        ('a: !!float ""', "a: got '' with the tag !!float; allowed a value of it; remove the tag"),
        ("a: !!bool yes", "a: got 'yes' with the tag !!bool; allowed a value of it; remove the tag"),
        ("a: !!bool ja", "a: got 'ja' with the tag !!bool; allowed a value of it; remove the tag"),
        ("a: !!null x", "a: got 'x' with the tag !!null; allowed a value of it; remove the tag"),
        ("a: !!map [1]", "a: got the tag tag:yaml.org,2002:map; allowed plain YAML without tags; remove the tag"),
        ("a: !!seq {b: 1}", "a: got the tag tag:yaml.org,2002:seq; allowed plain YAML without tags; remove the tag"),
        (f"a: {'9' * 5000}", "a: got an integer of 5,000 digits; allowed at most 30 digits; change the number"),
        (f"a: -{'9' * 31}", "a: got an integer of 31 digits; allowed at most 30 digits; change the number"),
        (r'a: "\ud800"', r"a: got '\ud800' with a control character; allowed printable text; leave the character out"),
        (
            r'a: "\e[31m"',
            r"a: got '\x1b[31m' with a control character; allowed printable text; leave the character out",
        ),
        (r'"\e": 1', r"plan: got the key '\x1b'; allowed printable words as keys; change the key"),
        (
            "[" * 900,
            "plan: got text that is no YAML (nested more than 64 levels deep); allowed YAML; change this line or the one above",
        ),
        (
            "- " * 900,
            "plan: got text that is no YAML (nested more than 64 levels deep); allowed YAML; change this line or the one above",
        ),
        ("#" * (2**20 + 1), "plan: got text of 1,048,577 characters; allowed at most 1,048,576; name another file"),
    ],
)
def test_what_is_no_value_is_told(text: str, told: str) -> None:
    document = read_yaml(text, "p")
    assert [problem.text for problem in document.problems] == [told]


@pytest.mark.parametrize(
    ("text", "value"), [("!!str 3", "3"), ("!!float 3", 3.0), ("!!int 3", 3), ("!!bool true", True)]
)
def test_a_tag_that_fits_is_read(text: str, value: object) -> None:
    document = read_yaml(f"a: {text}", "p")
    assert (document.tree, document.problems) == ({"a": value}, [])


@pytest.mark.parametrize("text", [r'"\UFFFFFFFF"', f"%YAML {'1' * 6000}.1\n---\na"])
def test_what_pyyaml_stumbles_over_is_told(text: str) -> None:
    (problem,) = read_yaml(text, "p").problems
    assert problem.got.startswith("text that is no YAML (")


def test_expanding_aliases_are_told_in_time() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]  # 10 ** 12 values
    (problem,) = read_yaml("\n".join(lines), "p").problems
    assert problem.text == "plan: got aliases that stand for more values than fit; allowed 200,000 values; use fewer"


def test_aliases_are_copies() -> None:
    tree = read_yaml("a: &x [1]\nb: *x").tree
    assert tree == {"a": [1], "b": [1]}
    assert tree["a"] is not tree["b"]


def test_what_is_written_reads_back_equal_here_and_with_plain_pyyaml() -> None:
    words: list[object] = [
        "1e-4",
        "no",
        "010",
        "nan",
        "true",
        "",
        "~",
        "x: y",
        "é",
        "1_000",
        "=",
        "0x1",
        "2020-01-01",
        ".inf",
        "<<",
        "a\nb",
    ]
    numbers: list[object] = [0.0001, 1e-05, 1e20, -0.5, 0, 10**20, True, False, None, 1 / 3]
    draw = random.Random(0)
    for _ in range(50):
        tree: dict[str, object] = {
            f"k{index}": draw.choice(
                [draw.choice(words), draw.choice(numbers), draw.choices(words + numbers, k=3), {}, []]
            )
            for index in range(6)
        }
        text = write_yaml(tree)
        assert read_yaml(text).tree == tree
        assert yaml.safe_load(text) == tree


def test_paths_and_values_are_shown_as_they_are_written() -> None:
    assert show_path(("stages", 0, "lr")) == "stages.0.lr"
    assert [show_value(v) for v in (None, True, "a", 1.5, [1, 2], {}, {"a": 1})] == [
        "null",
        "true",
        "'a'",
        "1.5",
        "a list of 2",
        "an empty mapping",
        "a mapping",
    ]
