"""Names and what they hold out, sets and licences, colours, animations, and the watch over the renderer."""

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from omnivl.data.emoji.iconify import Icon
from omnivl.data.icons.crew import Crew
from omnivl.data.icons.draw import LEAST_CONTRAST, UndrawableError, contrast, draw_icon, seeded_colours
from omnivl.data.icons.job import NO_ICON, IconTask, Part, Refusal, ShardJob
from omnivl.data.icons.names import Themes, family_of, held_out_names, share_of, split_of
from omnivl.data.icons.samples import HeldOut, samples_of
from omnivl.data.icons.sets import LICENCES, SEEN_AUTHORS, read_set_info
from omnivl.data.icons.settle import settled

THEMES = Themes({"suffixes": {"": "Regular", "fill": "Fill", "20-filled": "Small"}, "prefixes": {"ios": "iOS"}})
NOBODY = HeldOut({}, frozenset())


@pytest.mark.parametrize(
    ("name", "identity", "family"),
    [
        ("arrow-left", "arrow-left", "arrow-left"),
        ("left-arrow-20-filled", "left-arrow", "arrow-left"),
        ("ios-home-fill", "home", "home"),
        ("home-2", "home-2", "home"),
        ("home-outline", "home", "home"),
        ("fill", "fill", "fill"),
        ("waving-hand-medium-dark-skin-tone", "waving-hand", "hand-waving"),
        ("flag-1x1", "flag-1x1", "flag"),
        ("24", "24", "24"),
    ],
)
def test_concept_and_family_of_a_name(name: str, identity: str, family: str) -> None:
    assert THEMES.identity(name) == identity
    assert family_of(THEMES.identity(name)) == family


def test_a_tenth_of_the_families_is_held_out_and_given_ones_go_before() -> None:
    splits = [split_of(f"word{number}", {}) for number in range(4000)]
    assert splits.count("test") / 4000 == pytest.approx(0.05, abs=0.01)
    assert splits.count("val") / 4000 == pytest.approx(0.05, abs=0.01)
    assert split_of("dog-face", {"dog-face": "val"}) == "val"


def test_names_that_the_embedded_drawings_hold_out() -> None:
    named = [("Dog face", "test"), ("face: dog", "val"), ("cat", "train"), ("waving hand", "val")]
    assert held_out_names(named) == {"dog-face": "test", "hand-waving": "val"}


def test_a_further_name_of_another_split_is_not_said() -> None:
    tree = {"icons": {"house": {"body": "<g/>"}}, "aliases": {"home": {"parent": "house"}, "hut": {"parent": "house"}}}
    info = read_set_info("a", {"name": "A", "license": {"spdx": "MIT"}})
    held_out = HeldOut({"house": "train", "home": "test", "hut": "train"}, frozenset())
    (task,), _ = samples_of(info, tree, held_out)
    assert task.fields["captions"] == ["house", "house, hut", "house, A"]


def test_shares_are_even_and_lie_within_each_other() -> None:
    shares = [share_of("a", f"icon{number}") for number in range(2000)]
    assert sum(share < 0.1 for share in shares) / 2000 == pytest.approx(0.1, abs=0.02)
    assert max(shares) < 1


def test_a_licence_that_is_not_known_is_unclear() -> None:
    assert read_set_info("a", {"license": {"spdx": "X-1"}}).licence_group == "unclear"
    assert read_set_info("a", {}).licence_group == "unclear"
    assert read_set_info("a", {}).reason_to_leave_out(["free"]) == "licence is unclear: none is stated"
    assert read_set_info("a", {"license": {"spdx": "CC-BY-NC-4.0"}}).licence_group == "non-free"
    assert {LICENCES[name] for name in ("MIT", "CC-BY-4.0", "CC0-1.0")} == {"free"}
    assert {LICENCES[name] for name in ("CC-BY-SA-4.0", "GPL-3.0", "OFL-1.1", "MPL-2.0")} == {"share-alike"}


def test_hands_are_held_out_by_author() -> None:
    unseen = [read_set_info("a", {"author": {"name": f"author {number}"}}).unseen for number in range(2000)]
    assert sum(unseen) / 2000 == pytest.approx(0.1, abs=0.02)
    assert not any(read_set_info("a", {"author": {"name": name}}).unseen for name in SEEN_AUTHORS)
    assert read_set_info("twemoji", {}).unseen


def test_seeded_colours_can_be_told_apart() -> None:
    assert contrast((0, 0, 0), (255, 255, 255)) == pytest.approx(21)
    assert contrast((255, 255, 255), (255, 255, 255)) == 1
    pairs = {seeded_colours(0, "set", f"icon{number}") for number in range(50)}
    assert len(pairs) == 50
    assert all(contrast(*pair) >= LEAST_CONTRAST for pair in pairs)
    assert seeded_colours(0, "a", "b") == seeded_colours(0, "a", "b") != seeded_colours(1, "a", "b")


@pytest.mark.parametrize(
    "body",
    [
        '<image href="file.png"/>',
        "<image xlink:href='http://x.example/a.png'/>",
        '<path fill="url(http://x.example/a.svg#b)"/>',
        '<path fill="url( &quot;a.svg#b&quot;)"/>',
        '<image href="&#47;etc/passwd"/>',
        "<style>@import 'a.css'</style>",
    ],
)
def test_references_to_other_files_are_refused(body: str) -> None:
    with pytest.raises(UndrawableError) as caught:
        draw_icon(Icon(body), 16, 0)
    assert caught.value.cause == "outside_reference"


def test_references_within_a_drawing_are_followed() -> None:
    clip = '<defs><path id="a" d="M0 0h16v16H0z"/></defs><use href="#a" fill="red"/>'
    gradient = '<linearGradient id="b"><stop stop-color="red"/></linearGradient>'
    quoted = f'<defs>{gradient}</defs><path fill="url(&quot;#b&quot;)" d="M0 0h16v16H0z"/>'
    for body in (clip, quoted, quoted.replace("&quot;", ""), quoted.replace("&quot;", "'")):
        assert draw_icon(Icon(body), 16, 0).colour is None


def test_an_animated_icon_is_drawn_as_it_ends() -> None:
    body = (
        '<path d="M0 0" opacity="0"><animate attributeName="d" fill="freeze" values="M0 0;M1 1h9v9H1z"/>'
        '<set attributeName="opacity" fill="freeze" to="1"/><animate attributeName="opacity" values="0;1"/></path>'
    )
    assert 'd="M1 1h9v9H1z"' in settled(body)
    assert 'opacity="1"' in settled(body)
    assert draw_icon(Icon(body), 16, 0).webp
    assert settled("<path") == "<path"


def _misbehave(job: ShardJob, given_up: Mapping[int, Refusal], mark: Callable[[int], None]) -> Part:
    """In place of ``run_job``: icons named crash and hang do so, unless they are given up."""
    refusals = []
    for place, task in enumerate(job.icons):
        mark(place)
        if place in given_up:
            refusals.append(given_up[place])
        elif task.name == "crash":
            os._exit(7)
        elif task.name == "hang":
            time.sleep(60)
        elif task.name == "fail":
            raise OSError("the disk is full")
    mark(NO_ICON)
    if any(task.name == "late" for task in job.icons):
        os._exit(8)
    return Part(None, tuple(refusals), {"drawn": len(job.icons) - len(refusals)})


def jobs(*shards: tuple[str, ...]) -> list[ShardJob]:
    icons = [tuple(IconTask(name, Icon("<g/>"), {}) for name in names) for names in shards]
    return [ShardJob("s", Path(f"s-{number}.tar"), one, 16, 0) for number, one in enumerate(icons)]


def test_an_icon_that_crashes_or_hangs_costs_itself_only() -> None:
    work = jobs(("a", "crash", "b", "crash"), ("c", "hang"), ("d",))
    parts = Crew(iter(work), 2, longest_seconds=0.5, work=_misbehave).parts()
    done = {job.path.name: part for job, part in parts}
    assert [done[job.path.name].counts["drawn"] for job in work] == [2, 1, 1]
    refusals = [one for job in work for one in done[job.path.name].refusals]
    assert [(one.where, one.cause) for one in refusals] == [("s:crash", "crashed")] * 2 + [("s:hang", "too_slow")]
    assert "status 7" in refusals[0].detail


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [("fail", OSError, "the disk is full"), ("late", RuntimeError, "ended, and not while it drew an icon")],
)
def test_what_is_no_fault_of_an_icon_ends_the_build(name: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        list(Crew(iter(jobs((name,))), 1, work=_misbehave).parts())
