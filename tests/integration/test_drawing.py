"""Drawings of a finished stage: the task's figures and gallery, and ``Model.draw``."""

from pathlib import Path

import pytest
import torch
from complete_run import write_complete_run

import omnivl
from omnivl.errors import UserError
from omnivl.inference.draw import kept_outside
from omnivl.inference.pictures import PictureSet
from omnivl.tasks import BaselineReference, DrawingTask
from omnivl.tasks.run import run_tasks

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.integration

DENOISER = "denoiser: {hidden_size: 32, num_heads: 2, layers: 3}"
PLAN = f"""
name: draws
model: {{preset: {ROOT / "configs" / "models" / "debug.yaml"}}}
stages:
  - name: learn
    steps: 3
    data: [{{source: emoji, kind: image_text}}]
    objectives: [univlc, {{kind: quantize, width: 2, quantizer: {{kind: vq, num_codes: 9, size: 4}}}}]
    optimizer: {{warmup_steps: 1}}
  - name: draw
    init_from: learn
    freeze: ["visual_*", "text_*", embed]
    steps: 3
    data: [{{source: emoji, kind: image_text}}]
    objectives:
      - univlc
      - {{kind: diffusion, steps: 2, latents: quantize, latent_size: 4, {DENOISER}}}
      - {{kind: quantize, learns: false, width: 2, quantizer: {{kind: vq, num_codes: 9, size: 4}}}}
    optimizer: {{warmup_steps: 1}}
  - name: pixels
    init_from: learn
    steps: 3
    data: [{{source: emoji, kind: image_text}}]
    objectives: [univlc, {{kind: diffusion, name: pixels, given: embedding, steps: 2, {DENOISER}}}]
    optimizer: {{warmup_steps: 1}}
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_complete_run(tmp_path_factory.mktemp("runs") / "draws", PLAN, stages=3, spread=5)


def drawer(run, stage):
    """A stage whose denoiser says something: a new one says zero."""
    model = omnivl.load(run, stage=stage, device="cpu")
    torch.manual_seed(0)
    for name, parameter in model.encoder.chain.named_parameters():
        if name.endswith("denoiser.outer.weight"):
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope="module")
def model(run):
    return drawer(run, "draw")


def pictures_of(model, count):
    return PictureSet("emoji", "image", {"style": ("twemoji",)}, model.encoder.model.inputs, count, "caption")


def test_the_task_draws_judges_and_shows(run, model):
    style = {"where": {"style": ("twemoji",)}, "max_samples": 10}
    known = BaselineReference(where={"style": ("noto",)}, max_samples=20)
    (result,) = run_tasks([DrawingTask(gallery=3, training=known, **style)], model.encoder)
    scores = {one.metric: one for one in result.scores}
    assert list(scores) == [
        "R-precision",
        "R-precision, own pictures",
        "R-precision, nearest training pictures",
        "cosine to the nearest training picture",
    ]
    pictures = pictures_of(model, 10)
    captions = pictures.captions
    assert scores["R-precision"].chance == 1 / len(set(captions)) and scores["R-precision"].count == 10
    texts = model.encode_text(captions)
    with torch.no_grad():
        own = model.encoder.pictures(pictures)
        drawn = model.encoder.squares_embedded(model.draw(captions))
    for metric, embedded in (("R-precision, own pictures", own), ("R-precision", drawn)):
        found = [
            captions[place] == caption
            for place, caption in zip((embedded @ texts.t()).argmax(1), captions, strict=True)
        ]
        assert scores[metric].value == pytest.approx(sum(found) / 10)
    with torch.no_grad():
        near = (drawn @ model.encoder.pictures(known.picture_set(model.encoder, "caption")).t()).amax(1)
    assert scores["cosine to the nearest training picture"].value == pytest.approx(float(near.mean()), abs=1e-5)
    (gallery,) = result.galleries
    assert len(gallery.rows) == 3 and {len(row.answer_images) for row in gallery.rows} == {4}
    assert all(image.startswith("data:image/png") for row in gallery.rows for image in row.answer_images)
    (plain,) = run_tasks([DrawingTask(objective="pixels", gallery=0, **style)], drawer(run, "pixels").encoder)
    assert [one.metric for one in plain.scores] == ["R-precision", "R-precision, own pictures"] and not plain.galleries


def test_drawings_follow_from_text_place_and_seed(model):
    drawn = model.draw(["a red apple", "a ship"])
    side = model.encoder.model.inputs.side(False)
    assert drawn.shape == (2, 3, side, side) and drawn.dtype == torch.uint8
    assert torch.equal(model.draw(["a red apple", "a ship"], batch_size=1), drawn)
    assert torch.equal(model.draw("a red apple"), drawn[:1])
    assert not torch.equal(model.draw("a red apple", seed=1), drawn[:1])
    assert not torch.equal(model.draw("a ship"), drawn[:1])
    assert "draw" in repr(model)


def test_a_region_of_a_picture_is_drawn_anew(run):
    """By a stage that draws pixels, so that kept ones can be told from drawn ones."""
    model = drawer(run, "pixels")
    samples = pictures_of(model, 2)
    files = [sample.media for sample in samples.samples]
    drawn = model.draw(["a red apple", "a ship"], beside=files, region=(0.5, 0.0, 1.0, 0.5))
    squares, half = samples.frames([0, 1])[:, 0], drawn.shape[-1] // 2
    changed = (drawn != squares).any(1)
    assert not changed[:, half:].any() and not changed[:, :, :half].any()
    assert changed[:, :half, half:].float().mean() > 0.5


def test_regions_cover_every_patch_that_they_touch():
    kept = kept_outside((0.3, 0.0, 0.5, 0.26), (4, 4)).view(4, 4)
    assert kept.tolist() == [[True, False, True, True], [True, False, True, True], [True] * 4, [True] * 4]


def test_what_cannot_be_drawn_gets_a_sentence(run, model):
    def said(call, *arguments, **options):
        with pytest.raises(UserError) as found:
            call(*arguments, **options)
        return str(found.value)

    file = pictures_of(model, 1).samples[0].media
    assert "got one of beside and region" in said(model.draw, "a ship", beside=file)
    assert "region: got (0.5, 0, 0.2, 1)" in said(model.draw, "a ship", beside=file, region=(0.5, 0, 0.2, 1))
    assert "got 2 texts and 1 pictures" in said(model.draw, ["a", "b"], beside=file, region=(0, 0, 1, 1))
    learn = omnivl.load(run, stage="learn", device="cpu")
    assert said(learn.draw, "a ship") == (
        "draw: got stage 'learn', which does not train 'diffusion'; allowed are stages 'draw' of the plan; load one: "
        "omnivl.load(run, stage='draw')"
    )
