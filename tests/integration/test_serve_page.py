"""The page in a headless Chromium: typing, drawing and uploading, and what is then to be read on it."""

from collections.abc import Iterator
from pathlib import Path

import browser
import pytest
from browser import Browser
from colour_gallery import gif, picture, png, served
from colour_model import ColourModel

from launcher.serve.server import PageServer

_WHY = browser.missing()
pytestmark = [pytest.mark.integration, pytest.mark.skipif(_WHY is not None, reason=_WHY or "")]


@pytest.fixture(scope="module")
def window() -> Iterator[Browser]:
    with Browser() as one:
        yield one


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PageServer]:
    with served(tmp_path_factory.mktemp("data"), ColourModel()) as running:
        yield running


@pytest.fixture
def page(window: Browser, server: PageServer) -> Browser:
    window.open(server.url)
    window.until(lambda: window.texts("#examples button"), "the page never heard of the run")
    return window


def first_result(page: Browser) -> str:
    return (page.texts("#results li span") or [""])[0]


def test_a_sentence_is_answered_while_it_is_typed(page: Browser) -> None:
    assert "colours, stage joint, step 7; searches 12 pictures and 2 clips" in page.texts("#about")[0]
    page.press("#sentence", "something green")
    page.until(lambda: first_result(page).startswith("green"), "the green pictures never came first")
    assert [text.split() for text in page.texts("#words .word")] == [["something", "none"], ["green", "1"]]
    assert page.texts("#legend li")[1].split() == ["expert", "1", "50", "%"]
    assert page.run("return [...document.querySelectorAll('#results img')].every(i => i.alt)")
    page.clear("#sentence")
    page.press("#sentence", "now blue{ENTER}")
    page.until(lambda: first_result(page).startswith("blue"), "the blue pictures never came first")
    assert page.texts("#trouble") == []
    page.until(
        lambda: page.run("return [...document.querySelectorAll('#results img')].every(i => i.naturalWidth === 144)"),
        "the pictures were not shown",
    )


def test_an_upload_gets_caption_labels_and_coloured_patches(page: Browser, tmp_path: Path) -> None:
    file = tmp_path / "half red.png"
    file.write_bytes(png(picture("red", share=0.5)))
    page.press("#file", str(file))
    page.until(lambda: page.texts("#caption") == ["a red picture"], "there was no caption")
    assert page.texts("#shares .bar span:first-child")[0] == "red"
    assert first_result(page).startswith("red")
    assert page.texts("#layers button") == ["visual_00", "visual_01", "generation_00"]
    page.until(lambda: page.run("return document.querySelectorAll('#maps canvas').length") == 1, "no patches")
    told = page.run("return document.querySelector('#maps canvas').getAttribute('aria-label')")
    assert told == "Expert of each patch, row by row: " + "; ".join(["0 0 3 3"] * 4)
    left, right = page.run(
        "const c = document.querySelector('#maps canvas'), p = c.getContext('2d');"
        "return [0.12, 0.88].map(x => [...p.getImageData(x * c.width, 0.2 * c.height, 1, 1).data].slice(0, 3))"
    )
    assert left != right, "patches of two experts have two colours"
    page.click("#legend li:nth-child(4) button")
    page.until(
        lambda: page.run("return document.querySelector('#legend li:nth-child(4) button').ariaPressed") == "true", ""
    )
    words = [["a", "none"], ["red", "0"], ["picture", "none"]]
    assert [text.split() for text in page.texts("#words .word")] == words, "of the caption, beside the patches"
    assert page.texts("#words")[0].startswith("generation_00:")
    page.click("#layers button:last-child")
    page.until(lambda: page.run("return document.querySelectorAll('#maps canvas').length") == 0, "no words alone")
    assert [text.split() for text in page.texts("#words .word")] == words


def test_a_sentence_whose_words_have_no_experts_shows_pictures_alone(window: Browser, tmp_path: Path) -> None:
    with served(tmp_path, ColourModel(routes_words=False)) as other:
        window.open(other.url)
        window.until(lambda: window.texts("#examples button"), "the page never heard of the run")
        window.press("#sentence", "green{ENTER}")
        window.until(lambda: first_result(window).startswith("green"), "no answer")
        assert window.run("return document.getElementById('experts').hidden")
        file = tmp_path / "blue.png"
        file.write_bytes(png(picture("blue")))
        window.press("#file", str(file))
        window.until(lambda: window.texts("#layers button"), "the picture's experts were not shown")


def test_a_clip_shows_the_experts_of_its_frames(page: Browser, tmp_path: Path) -> None:
    file = tmp_path / "clip.gif"
    file.write_bytes(gif(["blue", "white", "blue"]))
    page.press("#file", str(file))
    page.until(lambda: page.run("return document.querySelectorAll('#maps canvas').length") == 3, "no frames")
    assert page.texts("#caption") == ["a blue picture"]


def test_what_is_drawn_is_answered(page: Browser) -> None:
    page.click("#inks button[title=green]")
    page.drag("#canvas", (-60, -60), (60, -60), (60, 60), (-60, 60))
    page.until(lambda: page.texts("#caption") == ["a green picture"], "the drawing was not answered")
    page.click("#clear")
    page.click("#inks button[title=blue]")
    page.press("#canvas", f" {'{RIGHT}' * 15}{'{DOWN}' * 15} ")
    page.until(lambda: page.texts("#caption") == ["a blue picture"], "the keyboard's drawing was not answered")


def test_a_result_can_be_looked_at(page: Browser) -> None:
    page.press("#sentence", "red")
    page.until(lambda: first_result(page).startswith("red"), "no answer")
    page.click("#results li:first-child button")
    page.until(lambda: page.texts("#caption") == ["a red picture"], "it was not looked at")


def test_bad_input_is_a_sentence_and_the_page_goes_on(page: Browser, tmp_path: Path) -> None:
    file = tmp_path / "notes.png"
    file.write_text("a text that says it is a picture")
    page.press("#file", str(file))
    page.until(lambda: page.texts("#trouble"), "nothing was said")
    assert page.texts("#trouble")[0].startswith("picture: got a file that is neither a picture nor a clip")
    page.press("#sentence", " {ENTER}")
    page.until(lambda: page.texts("#trouble")[:1] == ["sentence: got none; type one, such as: a red heart"], "")
    page.press("#sentence", "green{ENTER}")
    page.until(lambda: first_result(page).startswith("green"), "the page did not go on")
    assert page.texts("#trouble") == []


def test_labels_themes_and_small_windows(page: Browser, tmp_path: Path) -> None:
    file = tmp_path / "blue.png"
    file.write_bytes(png(picture("blue")))
    page.click("summary")
    page.press("#labels", "a red one, a blue one")
    page.press("#file", str(file))
    page.until(
        lambda: page.texts("#shares .bar span:first-child") == ["a blue one", "a red one"], "labels of one's own"
    )
    assert page.run("return getComputedStyle(document.body).backgroundColor") == "rgb(246, 247, 249)"
    page.click("#theme")
    page.click("#theme")
    assert page.texts("#theme") == ["Theme: dark"]
    assert page.run("return getComputedStyle(document.body).backgroundColor") == "rgb(15, 18, 22)"
    page.click("#theme")
    page.resize(420, 900)
    assert page.run("return document.documentElement.scrollWidth <= innerWidth"), "nothing sticks out"
    page.resize(1280, 1000)


def test_nothing_breaks_the_policy_or_leaves_this_machine(page: Browser, server: PageServer) -> None:
    page.console()
    page.press("#sentence", "red{ENTER}")
    page.until(lambda: first_result(page).startswith("red"), "no answer")
    loaded = page.run("return performance.getEntriesByType('resource').map(e => e.name)")
    assert loaded and all(name.startswith((server.url, "data:", "blob:")) for name in loaded)
    assert [line for line in page.console() if line["level"] == "SEVERE"] == []
    assert server.failures == []
