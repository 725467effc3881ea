"""A finished stage with fewer experts: a run that loads as any other, and figures of each step."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from complete_run import write_complete_run
from typer.testing import CliRunner

from engine.disk.trained import find_trained, load_encoder
from engine.finished.evaluate import choose_tasks
from engine.finished.experts import Step, check_keeps, expert_use, reduce_experts, slots_of, write_run
from engine.finished.export import export
from launcher.cli import app
from launcher.commands.experts import parse_keep
from moe.config import DenseConfig
from omnivl.errors import UserError
from omnivl.hub import OmniVLModel
from omnivl.inference.pictures import PictureSet

PLAN = """
name: sparse
parallel: {precision: fp32}
model: {preset: tiny, hidden_size: 24, num_heads: 2, vision_layers: 1, text_layers: 1, alignment_layers: 1,
  generation_layers: 1, patch_size: 16,
  ffn: {kind: limoe, num_experts: 4, every: 1, router: {kind: token_choice, renormalise: true%s}%s}}
stages:
  - name: one
    steps: 3
    data: [{source: emoji, kind: image_text}]
    objectives: [univlc, vlm]
    evaluate:
      tasks:
        - {kind: retrieval, name: drawings, where: {style: [twemoji]}, max_samples: 12}
        - {kind: routing, name: routes, where: {style: [twemoji]}, max_samples: 12}
"""
ROUTES = "        - {kind: routing, name: routes, where: {style: [twemoji]}, max_samples: 12}\n"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_complete_run(tmp_path_factory.mktemp("runs") / "sparse", PLAN % ("", ""), stages=1, spread=3.0)


def steps_of(run: Path, keeps: list[Any], how: Any = "merge", similarity: Any = "router") -> list[Step]:
    trained = find_trained(run)
    with torch.no_grad():
        encoder = load_encoder(trained, torch.device("cpu"))
        pictures = PictureSet("emoji", "image", {}, sizes=encoder.model.inputs, max_samples=12)
        tasks = choose_tasks(trained)
        return list(reduce_experts(trained, encoder, keeps, how, similarity, pictures, tasks))


def embedded(chain: Any) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (4, 1, 3, 64, 64), dtype=torch.uint8, generator=random)
    words = torch.randint(200, 400, (4, 6), generator=random)
    with torch.no_grad():
        return chain.encode_visual(frames), chain.encode_text(words)


@pytest.mark.parametrize(("how", "similarity"), [("prune", "router"), ("merge", "router"), ("merge", "outputs")])
def test_each_step_is_a_run_that_loads_as_any_other(run: Path, tmp_path: Path, how: Any, similarity: Any) -> None:
    before, half, dense = steps_of(run, [2, "dense"], how, similarity)
    assert before.parameters > half.parameters > dense.parameters
    named = [{score.task for score in step.scores} for step in (before, half, dense)]
    assert named == [{"drawings", "routes"}, {"drawings", "routes"}, {"drawings"}]
    assert len(half.groups) == len(slots_of(before.encoder.chain)) == 4
    assert all(len(groups) == 2 for groups in half.groups.values())
    assert all(sum(map(len, groups)) == (2 if how == "prune" else 4) for groups in half.groups.values())
    assert all(slot.experts.fc1_weight.shape[0] == 2 for slot in slots_of(half.encoder.chain).values())
    assert all(slot.router.get_parameter("gate.weight").shape[0] == 2 for slot in slots_of(half.encoder.chain).values())
    assert isinstance(dense.encoder.model.ffn, DenseConfig)
    assert not slots_of(dense.encoder.chain)
    for name, step in (("half", half), ("dense", dense)):
        made = find_trained(write_run(step, tmp_path / name))
        assert (made.step, made.stage.name) == (3, "one")
        wanted = embedded(step.encoder.chain)
        for got, own in zip(embedded(load_encoder(made, torch.device("cpu")).chain), wanted, strict=True):
            torch.testing.assert_close(got, own, rtol=0, atol=0)
        hub = OmniVLModel.from_pretrained(export(made, tmp_path / f"hub-{name}").folder)
        for got, own in zip(embedded(hub.chain), wanted, strict=True):
            torch.testing.assert_close(got, own)


def test_experts_without_tokens_go_without_a_trace(tmp_path: Path) -> None:
    """A bias keeps expert 2 of each layer from being chosen."""
    folder = write_complete_run(tmp_path / "run", PLAN % (", selection_bias_rate: 0.1", ""), stages=1, spread=3.0)
    trained = find_trained(folder)
    encoder = load_encoder(trained, torch.device("cpu"))
    for slot in slots_of(encoder.chain).values():
        slot.router.get_buffer("bias_E")[2] = -2.0
    pictures = PictureSet("emoji", "image", {}, sizes=encoder.model.inputs, max_samples=6)
    before, after = reduce_experts(trained, encoder, [3], "prune", "router", pictures, choose_tasks(trained))
    seen = {name: counts for name, counts in after.counts.items() if sum(counts)}
    assert all(counts[2] == 0 for counts in seen.values())
    kept = [groups for name, groups in after.groups.items() if name.startswith(("visual", "text"))]
    assert kept == [[[0], [1], [3]]] * len(kept)
    for got, own in zip(embedded(after.encoder.chain), embedded(before.encoder.chain), strict=True):
        torch.testing.assert_close(got, own)


def test_choices_are_counted_once_for_each_token(run: Path) -> None:
    encoder = load_encoder(find_trained(run), torch.device("cpu"))
    pictures = PictureSet("emoji", "image", {}, sizes=encoder.model.inputs, max_samples=5)
    uses = expert_use(encoder, pictures)
    (visual,) = [use for name, use in uses.items() if name.startswith("visual")]
    assert visual.counts.sum() >= 5 * 17  # 16 patches and a class token, and once more beside the captions
    assert visual.counts.sum() % (5 * 17) == 0
    (fused,) = [use for name, use in uses.items() if name.startswith("alignment")]
    assert fused.counts.sum() > 0


def problem(run: Path, keeps: list[Any]) -> str:
    with pytest.raises(UserError) as raised:
        check_keeps(find_trained(run), keeps)
    return str(raised.value)


def test_steps_that_do_not_fit(run: Path, tmp_path: Path) -> None:
    assert problem(run, [2, 3]) == "--keep: got 2,3; allowed are falling numbers, dense the last; sort them"
    assert "got dense,2;" in problem(run, ["dense", 2])
    doubled = write_complete_run(tmp_path / "two", PLAN % (", top_k: 2", ", shared_experts: 1"), stages=1)
    assert problem(doubled, [1]) == (
        "--keep: stack 'visual': keep: got 1 experts, allowed is 2 or more, as many as a token gets; raise it"
    )
    assert problem(doubled, ["dense"]) == (
        "--keep: got 'dense' for stack 'visual' with ffn.shared_experts 1; allowed is 0, as a dense layer has one "
        "perceptron of its own size; leave 'dense' out"
    )
    dense = PLAN.replace(
        "{kind: limoe, num_experts: 4, every: 1, router: {kind: token_choice, renormalise: true%s}%s}", "{}"
    )
    plain = write_complete_run(
        tmp_path / "plain", dense.replace("ffn: {}", "ffn: {kind: dense}").replace(ROUTES, ""), stages=1
    )
    assert "got a stage with feed-forward layers 'dense'; allowed is one with sparse experts" in problem(plain, [2])


@pytest.mark.parametrize(("text", "wanted"), [("6,4,dense", [6, 4, "dense"]), (" 2 ", [2])])
def test_what_is_kept_is_read(text: str, wanted: list[Any]) -> None:
    assert parse_keep(text) == wanted


@pytest.mark.parametrize("text", ["", "0", "4,,2", "two"])
def test_other_words_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="allowed are whole numbers above 0 and 'dense'"):
        parse_keep(text)


def test_the_command_prints_each_step_and_writes_the_last(run: Path, tmp_path: Path) -> None:
    arguments = ["experts", str(run), str(tmp_path / "small"), "--keep", "3,1", "--max-samples", "6", "--json"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    said = json.loads(done.output[done.output.index("{") :])
    assert [one["keep"] for one in said["steps"]] == [None, 3, 1]
    assert all(one["scores"] for one in said["steps"])
    assert find_trained(tmp_path / "small").stage.model.ffn.num_experts == 1
    again = CliRunner().invoke(app, arguments)
    assert isinstance(again.exception, UserError)
    assert "got a place that is taken" in str(again.exception)
