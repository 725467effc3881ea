"""Tasks that are in no union: a toy and the tutorial's task are run, written and shown like any other."""

import importlib.util
import io
import json
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from documentation import TUTORIALS, blocks
from pydantic import ConfigDict, TypeAdapter
from rich.console import Console

from engine.report import score_table
from omnivl.architectures import OmniVL
from omnivl.architectures.build import build_chain
from omnivl.chain.gather import LocalGather
from omnivl.data.tokenizer import load_tokenizer
from omnivl.errors import DataError, UserError
from omnivl.inference.encoder import Encoder
from omnivl.objectives import VLM, UniVLC
from omnivl.tasks import Gallery, GalleryRow, Lack, Need, Provided, ResultFile, Score, Task, TaskResult
from omnivl.tasks.results import write_files
from omnivl.tasks.run import run_tasks

TOKENIZER = load_tokenizer("emoji")
MODEL = replace(
    OmniVL.presets["tiny"],
    **{"hidden_size": 16, "num_heads": 2, "vision_layers": 1, "text_layers": 1, "alignment_layers": 1},
    **{"generation_layers": 1, "image_size": 16, "text_length": 12, "vocab_size": TOKENIZER.special.vocab_size},
)
OBJECTIVES = (UniVLC(), VLM())
WHERE = {"style": ("twemoji",), "label": ("bugs", "fruit")}


@dataclass(frozen=True)
class Depth(Need):
    """A visual encoder of so many layers at least."""

    layers: int

    def lack(self, stage: Provided) -> Lack | None:
        deep = stage.model.vision_layers >= self.layers
        return None if deep else Lack("is too shallow", "add layers", "layers", stage.model.vision_layers)


@dataclass(frozen=True)
class TagTask(Task):
    """Whether a picture lies nearer to its first tag than to its last one.

    Attributes:
        layers: Fewest layers that the model may have.
    """

    kind: Literal["tag"] = "tag"
    layers: int = 1

    @property
    def needs(self) -> tuple[Need, ...]:
        return (Depth(self.layers),)

    def run(self, encoder: Encoder) -> TaskResult:
        pictures = self.picture_set(encoder)
        tags = [[str(tag) for tag in sample.meta["tags"]] for sample in pictures.samples]  # type: ignore[attr-defined]
        first, last = (encoder.texts([own[place] for own in tags]) for place in (0, -1))
        own = encoder.pictures(pictures)
        nearer = (own * first).sum(1) >= (own * last).sum(1)
        score = Score(self.name, "first tag nearer", float(nearer.double().mean()), 0.5, None, len(pictures))
        row = GalleryRow(tags[0][0], pictures.thumbnail(0), (tags[0][0], tags[0][-1]), ("", ""), (True, False))
        file = ResultFile("tags.txt", lambda path: path.write_text("\n".join(own[0] for own in tags)) and None)
        return TaskResult((score,), (Gallery(self.name, (row,)),), (file,))


def make_encoder() -> Encoder:
    torch.manual_seed(0)
    chain = build_chain(MODEL, OBJECTIVES, TOKENIZER.special)
    with torch.no_grad():
        for parameter in chain.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)  # or all pictures would look alike
    return Encoder(chain, MODEL, TOKENIZER, LocalGather(), torch.device("cpu"), batch_size=16)


def read(kind: type[Task], tree: dict[str, Any]) -> Task:
    """Types a task as a plan would."""
    adapter = TypeAdapter(tuple[kind], config=ConfigDict(strict=True, extra="forbid"))  # type: ignore[valid-type]
    return adapter.validate_json(json.dumps([tree]))[0]


def test_a_task_in_no_union_runs_and_its_result_is_written_and_shown_as_others(tmp_path: Path) -> None:
    task = read(TagTask, {"kind": "tag", "where": {name: list(values) for name, values in WHERE.items()}})
    assert asdict(task) == {
        **{"kind": "tag", "name": "tag", "source": "emoji", "media": "image", "where": WHERE, "max_samples": 4096},
        **{"pictures": (), "layers": 1},
    }
    encoder = make_encoder()
    (result,) = run_tasks([task], encoder)
    assert encoder.chain.training, "as it was before"
    (score,) = result.scores
    assert (score.task, score.metric, score.count, score.chance) == ("tag", "first tag nearer", 35, 0.5)
    assert 0 < score.value < 1
    written = json.loads(json.dumps(result.as_json()))
    assert [Score(**one) for one in written["scores"]] == [score]
    assert written["galleries"][0]["rows"][0]["query_text"] == "animal"
    (file,) = write_files([result], tmp_path, "evaluation-")
    assert file.name == "evaluation-tags.txt"
    assert file.read_text().count("animal") > 5
    console = Console(file=io.StringIO(), width=100)
    console.print(score_table(result.scores, "toy"))
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert "first tag nearer" in printed
    assert f"{score.value:.3f}" in printed


class ErrorTask(TagTask):
    """The same, of which less is better."""

    lower_is_better = ("first tag *",)


def test_a_task_in_no_union_says_of_which_of_its_figures_less_is_better() -> None:
    (more,), (less,) = (
        result.scores for result in run_tasks([TagTask(where=WHERE), ErrorTask(where=WHERE)], make_encoder())
    )
    assert (more.lower_is_better, less.lower_is_better) == (False, True)
    assert replace(less, lower_is_better=False) == more
    for score in (more, less):
        console = Console(file=io.StringIO(), width=100)
        console.print(score_table([score], "toy"))
        printed = console.file.getvalue()  # type: ignore[attr-defined]
        assert ("first tag nearer \N{DOWNWARDS ARROW}" in printed) == score.lower_is_better


def test_a_need_of_its_own_says_what_is_lacking() -> None:
    stage = Provided(MODEL, OBJECTIVES)
    assert TagTask().lacks(stage) == []
    assert TagTask(layers=2).lacks(stage) == [Lack("is too shallow", "add layers", "layers", 1)]


@pytest.fixture
def foil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The tutorial's file, as a module."""
    file = tmp_path / "foil.py"
    file.write_text(blocks(TUTORIALS / "add-a-task.md", "python")[0])
    spec = importlib.util.spec_from_file_location("foil", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "foil", module)
    spec.loader.exec_module(module)
    return module


def test_the_task_of_the_tutorial(foil: Any) -> None:
    task = read(foil.FoilTask, {"kind": "foil", "where": {name: list(values) for name, values in WHERE.items()}})
    assert task.lacks(Provided(MODEL, OBJECTIVES)) == []
    assert task.lacks(Provided(MODEL, (UniVLC(),), (VLM(),))) == [
        Lack("does not train 'vlm'", "add the objective 'vlm'")
    ], "an earlier stage's head is no part of the chain"
    encoder = make_encoder()
    (result,) = run_tasks([task], encoder)
    (score,) = result.scores
    assert score.count == 35
    assert 0 < score.value < 1

    class Knowing(Encoder):
        """Right about the first 7 pictures, wrong about the others."""

        def predict(self, objective: str, pictures: Any, texts: Any = (), candidates: Any = None, **_: Any) -> Any:
            assert objective == "vlm"
            labels = [pictures.samples[j].label for j in candidates[:, 1].tolist()]
            assert all(label != sample.label for label, sample in zip(labels, pictures.samples, strict=True))
            assert candidates[:, 0].tolist() == list(range(35))
            return torch.tensor([[1.0, 0.0]] * 7 + [[0.0, 1.0]] * 28)

    knowing = Knowing(**vars(encoder))
    assert run_tasks([task], knowing)[0].scores[0].value == pytest.approx(7 / 35)
    with pytest.raises(DataError, match=r"foil: got pictures of one style only; allowed are several; change `where`"):
        run_tasks([replace(task, differs="style")], encoder)
    with pytest.raises(
        UserError,
        match=r"predict: got the objective 'univlc'; allowed are those of the stage that predict \('vlm'\); name",
    ):
        run_tasks([replace(task, objective="univlc")], encoder)
