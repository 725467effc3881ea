"""A trained stage as a folder of Hugging Face: weights, configuration, tokenizer, processor, model card.

The model is of ``omnivl.hub``'s class, for any architecture, or of a class of ``transformers``, for architectures that
say how to convert their weights.
"""

import json
import shutil
import stat
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers

from engine.disk.aside import HEADS
from engine.disk.evaluation import read_scores
from engine.disk.saved import saved_weights
from engine.disk.trained import Trained, is_for_training
from engine.errors import CheckpointError
from engine.finished.code import write_code
from engine.report.table import format_interval, format_share
from engine.telemetry.environment import package_versions
from omnivl.architectures.foreign import Foreign
from omnivl.data.tokenizer import Tokenizer, load_tokenizer
from omnivl.errors import UserError, reason_of
from omnivl.hub import OmniVLConfig, OmniVLImageProcessor, OmniVLModel, OmniVLProcessor
from omnivl.hub.modeling import MATCHING, WRITING
from omnivl.shown import markdown_text, printable
from omnivl.tasks.results import Score

Dtype = Literal["fp32", "bf16", "fp16"]
Form = Literal["omnivl", "transformers"]
DTYPES: dict[Dtype, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


CROPS = (
    "Trained and evaluated on whole pictures and clips of their own sizes (`model.sizes: native`); the processor of "
    "this folder crops the centre square, so that figures with it may differ."
)
"""What the card and the command say of a stage whose pictures keep their sizes."""

STRETCHES = (
    "Trained and evaluated on whole pictures and clips that are resized to squares (`model.sizes: stretched`); the "
    "processor of this folder crops the centre square, so that figures with it may differ."
)
"""Likewise, of a stage whose pictures are stretched, in a folder of transformers' own class."""


@dataclass(frozen=True)
class Exported:
    """The result of an export.

    Attributes:
        folder: The written folder.
        parameters: Number of parameters.
        left_out: Weights of heads that only training needs, which the folder does not hold.
        notes: Where the folder computes something else than evaluation.
    """

    folder: Path
    parameters: int
    left_out: tuple[str, ...]
    notes: tuple[str, ...] = ()


def export(
    trained: Trained, out: Path, dtype: Dtype = "fp32", max_shard_size: str = "5GB", form: Form = "omnivl"
) -> Exported:
    """Writes a stage as a folder that ``transformers`` loads.

    Args:
        trained: The stage.
        out: The folder; it must not be there yet, or be empty. It appears whole or not at all.
        dtype: Of the weights.
        max_shard_size: Largest weight file, as ``save_pretrained`` takes it; more weights make several, with an index.
        form: ``omnivl``: it loads once ``omnivl.hub`` is imported, or by the code that lies in it, with
            ``trust_remote_code=True``. ``transformers``: it loads without this package's code.

    Raises:
        CheckpointError: The weights cannot be read or do not fit the stage's model.
        UserError: The folder is there, or no class of transformers computes what the model does.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(
            f"{out}: got a place that is taken; allowed is a new or empty folder; name another, or empty it"
        )
    stage, tokenizer = trained.stage, load_tokenizer(trained.plan.tokenizer)
    model = OmniVLModel(OmniVLConfig.of(stage.model, stage.objectives, tokenizer.special))
    left_out = _fill(model, trained.weights)
    foreign = None if form == "omnivl" else _foreign(model, tokenizer)
    beside = _folder_beside(out)
    try:
        if foreign is None:
            parameters = _write_own(model, tokenizer, beside, DTYPES[dtype], max_shard_size)
            card = model_card(trained, model, parameters, dtype)
        else:
            length = stage.model.inputs.text_length
            parameters = write_foreign(foreign, tokenizer, length, beside, DTYPES[dtype], max_shard_size)
            card = model_card(trained, model, parameters, dtype, foreign)
            left_out += foreign.left_out
        (beside / "README.md").write_text(card, encoding="utf-8")
        _share(beside)
        if out.exists():
            out.rmdir()
        beside.rename(out)
    except OSError as error:
        raise CheckpointError(f"{out}: could not be written ({reason_of(error)}); choose another place") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)  # not there any more once it has its name
    return Exported(out, parameters, tuple(left_out), _notes(trained, foreign))


def _notes(trained: Trained, foreign: Foreign | None) -> tuple[str, ...]:
    """Where the folder of a stage computes something else than evaluation."""
    stretches = () if foreign is None else (STRETCHES,)  # our own processor stretches, too
    return {"fixed": (), "native": (CROPS,), "stretched": stretches}[trained.stage.model.sizes]


def _folder_beside(out: Path) -> Path:
    """A new, empty folder on the same file system as ``out``, with a name that nobody has.

    Raises:
        CheckpointError: It cannot be made.
    """
    beside = out.absolute().with_name(f".{out.name}.{uuid.uuid4().hex}")
    try:
        beside.mkdir(parents=True)
    except OSError as error:
        raise CheckpointError(f"{out}: could not be written ({reason_of(error)}); choose another place") from error
    return beside


def _share(folder: Path) -> None:
    """Gives all files of a folder the mode that the umask asks for: writers of weights keep theirs to their owner."""
    mode = stat.S_IMODE((folder / "README.md").stat().st_mode)
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(mode)


def _foreign(model: OmniVLModel, tokenizer: Tokenizer) -> Foreign:
    """The model as a class of transformers has it.

    Raises:
        UserError: There is no such class.
    """
    sizes = model.config.sizes
    foreign = sizes.to_foreign(model.chain, tokenizer.special)
    if foreign is None:
        raise UserError(
            f"--format: got 'transformers' for architecture {sizes.kind!r}, which no class of transformers computes; "
            "allowed is 'omnivl'; leave it out"
        )
    return foreign


def _write_own(model: OmniVLModel, tokenizer: Tokenizer, folder: Path, dtype: torch.dtype, max_shard_size: str) -> int:
    """Writes a folder of ``omnivl.hub``'s class, but for the card; returns the number of parameters."""
    inputs = model.config.sizes.inputs
    images = OmniVLImageProcessor(inputs.image_size, inputs.video_size, inputs.num_frames, inputs.stretched)
    processor = OmniVLProcessor(images, tokenizer.as_transformers(inputs.text_length))
    for parameter in model.parameters():
        parameter.data = parameter.to(dtype)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    processor.save_pretrained(folder)
    images.save_pretrained(folder)  # earlier versions of transformers look for it in a file of its own
    write_code(folder)
    return sum(one.numel() for one in model.parameters())


def write_foreign(
    foreign: Foreign, tokenizer: Tokenizer, length: int, folder: Path, dtype: torch.dtype, max_shard_size: str = "5GB"
) -> int:
    """Writes a folder of a class of transformers, but for the card.

    Args:
        foreign: The model.
        tokenizer: Of its texts.
        length: Most tokens of a text.
        folder: Where to.
        dtype: Of the weights.
        max_shard_size: See ``export``.

    Returns:
        The number of parameters.
    """
    cls: Any = getattr(transformers, foreign.model)
    model = cls(cls.config_class.from_dict(dict(foreign.config)))
    model.load_state_dict(foreign.weights)  # strict: all parameters of the class and no others
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    tokenizer.as_transformers(length).save_pretrained(folder)
    said = json.dumps(foreign.image_processor, indent=2)
    (folder / "preprocessor_config.json").write_text(said + "\n", encoding="utf-8")
    return sum(one.numel() for one in model.parameters())


@torch.no_grad()
def _fill(model: OmniVLModel, path: Path) -> list[str]:
    """Copies a stage's weights; returns those of heads that only training needs.

    Raises:
        CheckpointError: Some are missing, of another shape, or unknown.
    """
    own, left_out = model.chain.state_dict(), []
    lacking = set(own)
    for name, tensor in saved_weights(path):
        if name in own and own[name].shape == tensor.shape:
            own[name].copy_(tensor)
            lacking.discard(name)
        elif name.startswith(HEADS) and name not in own:
            left_out.append(name)
        elif not is_for_training(name):
            held = f"shape {list(own[name].shape)}" if name in own else "no such weight"
            raise CheckpointError(
                f"{path}: got {name} of shape {list(tensor.shape)}, the stage's model has {held}; allowed are weights "
                "of that stage; name it with --stage"
            )
    if lacking:
        raise CheckpointError(
            f"{path}: got weights without {min(lacking)} and {len(lacking) - 1} more of the stage's model; allowed are "
            "weights of that stage; name it with --stage"
        )
    return left_out


def scores_of(trained: Trained) -> tuple[Score, ...]:
    """The figures of a run's latest evaluation of exactly these weights; empty if there is none."""
    if trained.run is None or trained.step is None:
        return ()
    index = [stage.name for stage in trained.plan.stages].index(trained.stage.name)
    within = trained.run.stage(index, trained.stage.name).evaluation
    for file in (trained.run.path / f"evaluation-{trained.stage.name}.json", within):
        if file.is_file():
            step, scores = read_scores(file)
            if step == trained.step:
                return scores
    return ()


def model_card(
    trained: Trained, model: OmniVLModel, parameters: int, dtype: Dtype, foreign: Foreign | None = None
) -> str:
    """``README.md`` of the folder: what it is, how to load it, what it was measured to reach.

    Args:
        trained: The stage.
        model: Its model.
        parameters: How many the folder holds.
        dtype: Of the weights.
        foreign: The model as the folder has it, where that is of a class of transformers.
    """
    stage, sizes = trained.stage, model.config.sizes
    inputs, widths = sizes.inputs, sorted(set(sizes.heads.widths.values()))
    versions = package_versions()
    objectives = ", ".join(printable(objective.key) for objective in stage.objectives)
    step = "" if trained.step is None else f", step {trained.step:,}"
    lines = [
        "---",
        "library_name: transformers",
        "tags: [omnivl, vision-language, image-text-retrieval, video-text-retrieval]",
        "---",
        f"# {markdown_text(trained.plan.name)}, stage {markdown_text(stage.name)}",
        "",
        *_forms(foreign),
        f"trained with omnivl-engine {versions['omnivl-engine'] or ''}".rstrip() + f" (torch {versions['torch']}).",
        "",
        f"- {parameters:,} parameters in {dtype}: architecture `{sizes.kind}`, width "
        f"{' and '.join(map(str, widths))}, feed-forward layers "
        f"{sizes.kinds_of_filling.replace(chr(39), chr(96))}.",
        f"- Images of {inputs.image_size} pixels, clips of {inputs.num_frames} frames of {inputs.video_size} pixels, "
        f"texts of up to {inputs.text_length} tokens.",
        *(f"- {note}" for note in _notes(trained, foreign)),
        f"- Stage {markdown_text(stage.name)}{step}; objectives: {objectives}; data: "
        f"{', '.join(dict.fromkeys(f'{markdown_text(entry.source)} ({entry.kind})' for entry in stage.data))}.",
        "",
        "## Use",
        *_uses(model, foreign),
        "",
        "## Evaluation",
        *_figures(scores_of(trained)),
    ]
    return "\n".join(lines) + "\n"


def _forms(foreign: Foreign | None) -> list[str]:
    """What the model is."""
    if foreign is not None:
        return [f"A vision-language model, as transformers' `{foreign.model}` has it,"]
    return ["A vision-language model of images and videos in the form of [OmniVL](https://arxiv.org/abs/2209.07526),"]


def _uses(model: OmniVLModel, foreign: Foreign | None) -> list[str]:
    """How to load it and what to do with it."""
    if foreign is not None:
        return [
            "```python",
            f"from transformers import AutoTokenizer, {foreign.model}",
            "",
            f'model, tokenizer = {foreign.model}.from_pretrained("."), AutoTokenizer.from_pretrained(".")',
            "```",
        ]
    return [
        "The package `omnivl-engine` makes the model known to transformers by its `omnivl.hub`. Without it, leave the "
        "first line out and add `trust_remote_code=True` to both calls: the code lies in this folder.",
        "",
        "```python",
        "import omnivl.hub",
        "from transformers import AutoModel, AutoProcessor",
        "",
        'model, processor = AutoModel.from_pretrained("."), AutoProcessor.from_pretrained(".")',
        'inputs = processor(images=["picture.png"], text=["a caption"])',
        *(_EMBEDDING if "embedding" in model.config.sizes.streams else []),
        *(["model.match(**inputs)"] if model.head(MATCHING) else []),
        *(["processor.batch_decode(model.generate(**inputs, num_beams=3))"] if model.head(WRITING) else []),
        "```",
    ]


_EMBEDDING = (
    "model.get_image_features(**inputs).pooler_output  # also get_video_features, get_text_features",
    "model(**inputs).logits_per_image",
)


def _figures(scores: Sequence[Score]) -> list[str]:
    if not scores:
        return ["These weights were not evaluated in their run."]
    rows = [
        f"| {markdown_text(one.task)} | {markdown_text(one.metric)} | {format_share(one.value)} | "
        f"{format_interval(one) or '-'} | {format_share(one.chance)} | {format_share(one.baseline)} | {one.count} |"
        for one in scores
    ]
    return [
        "| task | metric | model | 95 % | chance | 16x16 pixels | queries |",
        "|---|---|---|---|---|---|---|",
        *rows,
    ]
