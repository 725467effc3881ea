"""The source of scenes: pixels, boxes, masks, clips, options."""

import pickle
import re
from collections import Counter

import cv2
import numpy as np
import pytest

from omnivl.data.batch import DataKind
from omnivl.data.config import DataEntryConfig
from omnivl.data.fields import Field, FieldReader
from omnivl.data.sources import open_source
from omnivl.data.sources.motion_poses import MOVES
from omnivl.data.sources.scenes import TASKS, SceneSource
from omnivl.data.sources.scenes.cast import Cast
from omnivl.data.sources.scenes.clips import clip_question, clip_statement
from omnivl.data.sources.scenes.sentiment import WORDS
from omnivl.data.sources.scenes.source import HIDDEN_TEXT
from omnivl.data.sources.scenes.world import GROUNDS
from omnivl.errors import DataError
from omnivl.randomness import generator

KINDS: dict[str, DataKind] = {"image": "image_text", "set": "images_text", "clip": "video_text"}
FOOD = {"style": ("fluent",), "group": ("food & drink",)}


def source(task: str, seed: int = 0, **where: tuple[str, ...]) -> SceneSource:
    kept = {"task": (task,), **({} if task == "sentiment" else FOOD), **where}
    opened = open_source(DataEntryConfig(source="scenes", kind=KINDS[TASKS[task]], where=kept), seed=seed)
    assert isinstance(opened, SceneSource)
    return opened


@pytest.mark.parametrize("task", list(TASKS))
def test_a_sample_is_a_function_of_its_index(task: str) -> None:
    """Whatever was read before, in whichever process; other seeds and parts have other samples."""
    first = source(task)
    for index in range(5):
        first.read(index)
    again = pickle.loads(pickle.dumps(first))
    one, other = first.read(7), again.read(7)
    assert one.key == other.key and one.captions == other.captions and one.meta == other.meta
    assert one.members == other.members
    assert (one.frames is None) == (TASKS[task] == "set") and np.array_equal(one.frames, other.frames)  # type: ignore[arg-type]
    assert one.captions and all(one.captions)
    different = [source(task, seed=1).read(7), source(task, part=("test",)).read(7)]
    assert len({each.where for each in (one, *different)}) == 3
    shown = [each.members or np.asarray(each.frames).tobytes() for each in (one, *different)]
    assert shown[0] not in shown[1:]


def test_boxes_and_masks_are_where_the_things_are() -> None:
    """A box encloses what differs from the ground, and so does the mask; fields can be read as objectives ask."""
    opened = source("expressions")
    entry = DataEntryConfig(
        source="scenes", kind="image_text", fields={"box": "box", "mask": "mask.png", "candidates": "candidates"}
    )
    types = {"box": Field("boxes"), "mask": Field("mask"), "candidates": Field("boxes", most=8)}
    reader = FieldReader(entry, types)
    for index in range(40):
        sample = opened.read(index)
        assert sample.frames is not None
        pixels = sample.frames[0].astype(int)
        fields = reader.read(sample)
        mask, box, candidates = fields["mask"][0], fields["box"][0], fields["candidates"]  # type: ignore[index]
        colour = np.array(Counter(map(tuple, pixels.reshape(-1, 3).tolist())).most_common(1)[0][0])
        assert tuple(colour) in GROUNDS.values()
        drawn = np.abs(pixels - colour).max(axis=2) > 40
        size = len(drawn)
        left, top, right, bottom = np.rint(box * size).astype(int)
        inside = np.zeros_like(drawn)
        inside[top:bottom, left:right] = True
        assert not (mask & ~inside).any()
        assert mask[top].any() and mask[bottom - 1].any() and mask[:, left].any() and mask[:, right - 1].any()
        everything = np.zeros_like(drawn)
        for one in np.rint(np.asarray(candidates) * size).astype(int):
            everything[one[1] : one[3], one[0] : one[2]] = True
        soft = cv2.dilate(everything.astype(np.uint8), np.ones((3, 3), np.uint8)).astype(bool)
        assert not (drawn & ~soft).any(), "all that is drawn is in a candidate's box"


def test_clips_do_what_is_said() -> None:
    """The poses of the thing that a true statement names move as it says; those of a false one do not."""
    moves = {name: (("x", "y", "turn", "zoom").index(along), sign) for name, (along, sign) in MOVES.items()}
    cast, seen = Cast(FOOD, "train"), Counter[bool]()
    for index in range(300):
        clip = clip_statement(generator(index, "clip"), cast, 8, ("does",))
        name, said = clip.captions[0].removeprefix("the ").split(" ", 1)
        if said not in moves:
            continue
        (mover,) = [one for one in clip.movers if one.name == name]
        column, sign = moves[said]
        steps = sign * np.diff(mover.poses.values[:, column]) % 1.0  # along a circle
        holds = bool((steps > 0).all() and steps.sum() < 0.6)
        assert clip.fields["answer"] == str(holds).lower()
        seen[holds] += 1
    assert seen[True] > 60 and seen[False] > 60


def test_one_thing_takes_the_place_of_another() -> None:
    opened = source("clip_questions", question_type=("first",))
    for index in range(50):
        frames = opened.read(index).frames
        assert frames is not None and frames.shape == (8, 96, 96, 3)
        changes = [np.abs(frames[t].astype(int) - frames[t + 1]).max() > 0 for t in range(len(frames) - 1)]
        assert sum(changes) == 1
    cast = Cast(FOOD, "train")
    for index in range(50):
        clip = clip_question(generator(index, "first"), cast, 8, ("first",))
        (first,) = [one for one in clip.movers if one.shown[0]]
        assert clip.fields["answer"] == first.name and not first.shown[-1]


def test_a_sentiment_is_the_sum_of_words_and_face() -> None:
    opened = source("sentiment")
    found = []
    for index in range(600):
        sample = opened.read(index)
        word = next(word for word in sample.captions[0].split()[::-1] if word in WORDS)
        assert sample.meta["sentiment"] == WORDS[word] + float(str(sample.meta["shown"]))
        found.append((float(str(sample.meta["said"])), float(str(sample.meta["shown"]))))
    said, shown = np.array(found).T
    assert abs(np.corrcoef(said, shown)[0, 1]) < 0.15 and set(shown) == {-1.5, 0.0, 1.5}


def test_what_is_hidden_is_not_there() -> None:
    shown, dark = source("questions").read(3), source("questions", hide=("picture",)).read(3)
    assert dark.frames is not None and not dark.frames.any()
    assert dark.captions == shown.captions and dark.meta == shown.meta
    silent = source("questions", hide=("text",)).read(3)
    assert silent.captions == (HIDDEN_TEXT,) and silent.meta["question"] == HIDDEN_TEXT
    assert np.array_equal(silent.frames, shown.frames)  # type: ignore[arg-type]
    assert silent.meta["answer"] == shown.meta["answer"]
    for task in ("pairs", "documents"):
        dark = source(task, hide=("picture",)).read(3)
        assert dark.members.keys() == source(task).read(3).members.keys()
        assert all(not cv2.imdecode(np.frombuffer(media, np.uint8), 1).any() for media in dark.members.values())


def test_lists_of_answers_hold_every_answer() -> None:
    for task in ("questions", "clip_questions", "entailment", "pairs", "clip_statements", "documents"):
        opened = source(task)
        answers = opened.answers()
        assert len(set(answers)) == len(answers)
        assert {str(opened.read(index).meta["answer"]) for index in range(200)} <= set(answers)
    known, unseen = (source("documents", called=("own",), part=(part,)) for part in ("train", "concepts"))
    assert known.answers() == unseen.answers() == Cast(FOOD, "train").names
    for opened in (known, unseen):
        assert {str(opened.read(index).meta["answer"]) for index in range(50)} <= set(opened.answers())


def test_documents_have_a_picture_for_each_sentence_and_one_more() -> None:
    for shots in (1, 2, 8):
        sample = source("documents", shots=(str(shots),)).read(5)
        assert list(sample.members) == [*(f"{number}.png" for number in range(1, shots + 1)), "query.png"]
        assert sample.captions[0].count("this is a ") == shots
        pictures = [cv2.imdecode(np.frombuffer(media, np.uint8), 1) for media in sample.members.values()]
        assert all(picture.shape == (64, 64, 3) and picture.std() > 5 for picture in pictures)
    brief = source("documents", shots=("2",), wording=("brief",)).read(5)
    assert re.fullmatch(r"\w+\. \w+\. what\?", brief.captions[0]) and brief.meta["question"] == "what?"
    few = source("documents", part=("concepts",), shots=("8",), label=("fruit", "drink"))
    with pytest.raises(DataError, match=r"[1-7] of \d concepts of part 'concepts' can be seen on \w+ ground, for doc"):
        few.read(0)


def test_questions_of_some_types() -> None:
    opened = source("questions", question_type=("count", "place"))
    assert {opened.read(index).meta["question_type"] for index in range(40)} == {"count", "place"}


@pytest.mark.parametrize(
    ("kind", "where", "message"),
    [
        (
            "image_text",
            {"task": ("pairs",)},
            "kind is 'image_text'; allowed for task 'pairs': 'images_text'; change it",
        ),
        ("image_text", {"task": ("dance",)}, "where.task is ['dance']; allowed: one of questions, captions"),
        ("image_text", {"part": ("train", "val")}, "where.part is ['train', 'val']; allowed: one of train, val, test"),
        ("image_text", {"question_type": ("who",)}, "where.question_type is ['who']; allowed: exist, count"),
        ("images_text", {"question_type": ("exist",)}, "where.question_type is ['exist']; allowed: none; change it"),
        ("image_text", {"hide": ("all",)}, "where.hide is ['all']; allowed: one of picture, text"),
        ("image_text", {"label": ("dishware",)}, "where leaves"),
        (
            "images_text",
            {"task": ("documents",), "shots": ("9",)},
            "where.shots is ['9']; allowed: one of 1, 2, 3, 4, 5, 6, 7, 8; change it",
        ),
        ("images_text", {"shots": ("4",)}, "where.shots is of task 'documents', got 'pairs'; remove it"),
        ("images_text", {"called": ("own",)}, "where.called is of task 'documents', got 'pairs'; remove it"),
        ("images_text", {"wording": ("brief",)}, "where.wording is of task 'documents', got 'pairs'; remove it"),
        (
            "images_text",
            {"task": ("documents",), "called": ("aloud",)},
            "where.called is ['aloud']; allowed: one of made_up, own; change it",
        ),
        (
            "images_text",
            {"task": ("documents",), "part": ("pairs",)},
            "where.part is 'pairs'; allowed for task 'documents', whose things never stand together: train, val, test, "
            "concepts; change it",
        ),
    ],
)
def test_options_are_checked(kind: DataKind, where: dict[str, tuple[str, ...]], message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        open_source(DataEntryConfig(source="scenes", kind=kind, where=where), seed=0)


def test_documents_say_where_their_pictures_stand() -> None:
    sample = source("documents", shots=("2",), wording=("brief",)).read(5)
    first, second = sample.meta["options"]
    marked = f"<image>{first}.<EOC><image>{second}.<EOC><image>what? {sample.meta['answer']}<EOC>"
    assert sample.meta["interleaved"] == marked
    assert marked.count("<image>") == len(sample.members)
