"""What an evaluation sees of wide pictures by the model's ``sizes``, and where boxes and masks are then."""

from dataclasses import dataclass, replace

import cv2
import numpy as np
import pytest
import torch
from oracle import MODEL, encoder_of
from torch import Tensor

from omnivl.api.given import picture_sets
from omnivl.data.augment import evaluation_view
from omnivl.data.config import AugmentConfig, DataEntryConfig
from omnivl.data.example import ExampleReader
from omnivl.data.limits import DecodeLimits
from omnivl.data.sources.base import Sample
from omnivl.data.sources.scenes.picture import as_png
from omnivl.inference.encoder import Encoder
from omnivl.inference.pictures import PictureSet
from omnivl.objectives import Locate, Region, Segment
from omnivl.tasks import GroundingTask, PredictingTask, SegmentationTask, Task
from omnivl.tasks.run import run_tasks

MODELS = {name: replace(MODEL, sizes=name) for name in ("fixed", "native", "stretched")}  # type: ignore[arg-type]
WHOLE = AugmentConfig(crop_scale=(1, 1), crop_ratio=(1, 1), flip=0)

LEFT = [0.0, 0.25, 0.125, 0.75]
"""A box that the middle square of a picture of twice its height does not show."""
MIDDLE = [0.375, 0.0, 0.625, 0.5]


def wide(box: list[float] = LEFT, name: str = "a") -> Sample:
    """A black picture of 128 x 64 pixels, white in a box, which is also its mask."""
    left, top, right, bottom = (round(edge) for edge in np.array(box) * [128, 64, 128, 64])
    pixels = np.zeros((64, 128, 3), np.uint8)
    pixels[top:bottom, left:right] = 255
    meta = {"box": box, "candidates": [LEFT, MIDDLE], "target": [LEFT, MIDDLE].index(box)}
    return Sample(name, name, as_png(pixels), "png", captions=("it",), meta=meta, members={"mask.png": as_png(pixels)})


def media(sample: Sample) -> bytes:
    assert sample.media is not None
    return sample.media


class Shown(Task):
    """Reads samples of its own instead of a source's."""

    def picture_set(self, encoder: Encoder) -> PictureSet:
        return PictureSet.of([wide(), wide(MIDDLE, "b")], "image", encoder.model.inputs)


@dataclass(frozen=True)
class Boxes(Shown, GroundingTask):
    """Boxes of the wide pictures."""


@dataclass(frozen=True)
class Masks(Shown, SegmentationTask):
    """Masks of the wide pictures."""


class Looks(Encoder):
    """Heads that find what is white in the model's view, a square."""

    def predict(
        self, objective: str, pictures: PictureSet, texts: object = (), candidates: Tensor | None = None
    ) -> Tensor:
        shown = pictures.shown(range(len(pictures)))
        assert isinstance(shown, Tensor)
        seen = shown[:, 0, 0] > 127
        if objective == "segment":
            return seen.float() - 0.5
        if objective == "region":
            return seen.float().view(len(seen), 4, 8, 4, 8).mean(dim=(2, 4)).flatten(1)
        found = []
        for one in seen:
            rows, columns = (one.any(axis).nonzero()[:, 0].tolist() or [0, -1] for axis in (1, 0))
            found.append(torch.tensor([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]) / MODEL.image_size)
        return torch.stack(found)


def scores_of(task: PredictingTask, sizes: str) -> dict[str, float]:
    made = encoder_of(Locate(), Region(), Segment(), model=MODELS[sizes])
    looks = Looks(made.chain, MODELS[sizes], made.tokenizer, made.gather, made.device, batch_size=8)
    return {score.metric: score.value for score in run_tasks([task], looks)[0].scores}


@pytest.mark.parametrize("objective", ["locate", "region"])
def test_boxes_of_wide_pictures(objective: str) -> None:
    """What is found in the view is mapped back; what lies beside the middle square is found in a stretched view."""
    task = Boxes(objective=objective, gallery=0)
    assert scores_of(task, "fixed")["accuracy at IoU 0.5"] == 0.5
    assert scores_of(task, "stretched") == {"accuracy at IoU 0.5": 1.0, "mean IoU": pytest.approx(1.0)}


def test_masks_of_wide_pictures() -> None:
    assert scores_of(Masks(gallery=0), "fixed")["mIoU"] == pytest.approx(0.5), "one of two"
    assert scores_of(Masks(gallery=0), "stretched")["mIoU"] == 1.0


@pytest.mark.parametrize("sizes", list(MODELS))
def test_pictures_of_a_set_are_seen_alike_and_as_by_the_loader(sizes: str) -> None:
    """Squares are cropped or stretched, all or none; others take the size of the first. So does training."""
    tall = Sample("c", "c", as_png(np.random.default_rng(0).integers(0, 256, (96, 48, 3), dtype=np.uint8)), "png")
    members = {"1.png": media(wide()), "2.png": media(wide(MIDDLE)), "3.png": media(tall)}
    sample = Sample("a", "a", captions=("it",), members=members)
    inputs = MODELS[sizes].inputs
    seen = PictureSet.of([sample], "image", inputs, tuple(members)).view(0).permute(0, 2, 3, 1).numpy()
    config = DataEntryConfig("s", "images_text", pictures=tuple(members), augment=WHOLE)
    for training in (False, True):
        reader = ExampleReader(config, None, inputs, key="k", seed=0, limits=DecodeLimits(), training=training)
        assert np.array_equal(seen, reader.finish(sample, 0).pictures)
    if sizes != "native":
        alone = PictureSet.of([wide(), wide(MIDDLE), tall], "image", inputs).shown([0, 1, 2])
        assert isinstance(alone, Tensor)
        assert np.array_equal(seen, alone[:, 0].permute(0, 2, 3, 1).numpy())
    assert seen.shape == ((3, 16, 48, 3) if sizes == "native" else (3, 32, 32, 3))


def test_a_picture_that_a_program_gives_is_stretched_as_one_of_a_source(tmp_path) -> None:
    inputs, file = MODELS["stretched"].inputs, tmp_path / "wide.png"
    file.write_bytes(media(wide()))
    pixels = cv2.imread(str(file))[..., ::-1]
    wanted = torch.from_numpy(evaluation_view(pixels[None], (32, 32)).pixels).permute(0, 3, 1, 2)
    of_source = PictureSet.of([wide()], "image", inputs)
    (given,) = picture_sets("embed", [file, pixels.copy()], "image", inputs, 2)
    shown = [one for made in (of_source, given) for one in made.shown(range(len(made)))]
    assert len(shown) == 3 and all(torch.equal(one, wanted) for one in shown)
    assert of_source.placement(0).matrix.tolist() == np.eye(3).tolist()
    middle = PictureSet.of([wide()], "image", MODELS["fixed"].inputs)
    assert middle.placement(0).matrix.diagonal().tolist() == [2.0, 1.0, 1.0]
