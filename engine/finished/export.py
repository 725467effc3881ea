"""A trained stage as a folder of Hugging Face: weights, configuration, tokenizer, processor, model card."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from engine.disk.aside import HEADS
from engine.disk.evaluation import read_scores
from engine.disk.saved import saved_weights
from engine.errors import CheckpointError
from engine.finished.trained import Trained, is_for_training
from engine.report.table import format_share
from engine.telemetry.environment import package_versions
from omnivl.data.tokenizer import load_tokenizer
from omnivl.errors import UserError
from omnivl.hub import OmniVLConfig, OmniVLImageProcessor, OmniVLModel, OmniVLProcessor
from omnivl.tasks.results import Score

Dtype = Literal["fp32", "bf16", "fp16"]
DTYPES: dict[Dtype, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        folder: Where to.
        parameters: Number of parameters.
        left_out: Weights of heads that only train, which the folder does not hold.
    """

    folder: Path
    parameters: int
    left_out: tuple[str, ...]


def export(trained: Trained, out: Path, dtype: Dtype = "fp32", max_shard_size: str = "5GB") -> Exported:
    """Writes a stage as a folder that ``transformers`` loads once ``omnivl.hub`` is imported.

    Args:
        trained: The stage.
        out: The folder; it must not be there yet, or be empty. It appears whole or not at all.
        dtype: Of the weights.
        max_shard_size: Largest weight file, as ``save_pretrained`` takes it; more weights make several, with an index.

    Raises:
        CheckpointError: The weights cannot be read or do not fit the stage's model.
        UserError: The folder is there.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(
            f"{out}: got a place that is taken; allowed is a new or empty folder; name another, or empty it"
        )
    stage, tokenizer = trained.stage, load_tokenizer(trained.plan.tokenizer)
    model = OmniVLModel(OmniVLConfig.of(stage.model, stage.objectives, tokenizer.special))
    left_out = _fill(model, trained.weights)
    sizes = stage.model
    inputs = sizes.inputs
    images = OmniVLImageProcessor(inputs.image_size, inputs.video_size, inputs.num_frames)
    processor = OmniVLProcessor(images, tokenizer.as_transformers(inputs.text_length))
    beside = out.with_name(out.name + ".tmp")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        for parameter in model.parameters():
            parameter.data = parameter.to(DTYPES[dtype])
        model.save_pretrained(beside, max_shard_size=max_shard_size)
        processor.save_pretrained(beside)
        images.save_pretrained(beside)  # earlier versions of transformers look for it in a file of its own
        (beside / "README.md").write_text(model_card(trained, model, dtype), encoding="utf-8")
        if out.exists():
            out.rmdir()
        beside.rename(out)
    except OSError as error:
        shutil.rmtree(beside, ignore_errors=True)
        raise CheckpointError(f"{out}: could not be written ({error}); choose another place") from error
    return Exported(out, sum(one.numel() for one in model.parameters()), tuple(left_out))


@torch.no_grad()
def _fill(model: OmniVLModel, path: Path) -> list[str]:
    """Copies a stage's weights; returns those of heads that only train.

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
    """The figures of a run's latest evaluation of just these weights; none where there is no such evaluation."""
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


def model_card(trained: Trained, model: OmniVLModel, dtype: Dtype) -> str:
    """``README.md`` of the folder: what it is, how to load it, what it was measured to reach."""
    stage, config = trained.stage, model.config
    sizes, writes, matches = config.sizes, "lm" in config.heads, "vlm" in config.heads
    inputs, widths = sizes.inputs, sorted(set(sizes.heads.widths.values()))
    parameters = sum(one.numel() for one in model.parameters())
    versions = package_versions()
    uses = [
        "model.get_image_features(**inputs).pooler_output  # also get_video_features, get_text_features",
        "model(**inputs).logits_per_image",
        *(["model(**inputs, use_itm_head=True).itm_score"] if matches else []),
        *(["processor.batch_decode(model.generate(**inputs, num_beams=3))"] if writes else []),
    ]
    objectives = ", ".join(objective.key for objective in stage.objectives)
    step = "" if trained.step is None else f", step {trained.step:,}"
    lines = [
        "---",
        "library_name: transformers",
        "tags: [omnivl, vision-language, image-text-retrieval, video-text-retrieval]",
        "---",
        f"# {trained.plan.name}, stage {stage.name}",
        "",
        "A vision-language model of images and videos in the form of [OmniVL](https://arxiv.org/abs/2209.07526),",
        f"trained with omnivl-engine {versions['omnivl-engine'] or ''}".rstrip() + f" (torch {versions['torch']}).",
        "",
        f"- {parameters:,} parameters in {dtype}: architecture `{sizes.kind}`, width "
        f"{' and '.join(map(str, widths))}, feed-forward layers "
        f"`{sizes.filling.kind}`.",
        f"- Images of {inputs.image_size} pixels, clips of {inputs.num_frames} frames of {inputs.video_size} pixels, "
        f"texts of up to {inputs.text_length} tokens.",
        f"- Stage `{stage.name}`{step}; objectives: {objectives}; data: "
        f"{', '.join(dict.fromkeys(f'{entry.source} ({entry.kind})' for entry in stage.data))}.",
        "",
        "## Use",
        "It needs the package `omnivl-engine`, whose `omnivl.hub` makes the model known to transformers.",
        "",
        "```python",
        "import omnivl.hub",
        "from transformers import AutoModel, AutoProcessor",
        "",
        'model, processor = AutoModel.from_pretrained("."), AutoProcessor.from_pretrained(".")',
        'inputs = processor(images=["picture.png"], text=["a caption"])',
        *uses,
        "```",
        "",
        "## Evaluation",
        *_figures(scores_of(trained)),
    ]
    return "\n".join(lines) + "\n"


def _figures(scores: Sequence[Score]) -> list[str]:
    if not scores:
        return ["These weights were not evaluated in their run."]
    rows = [
        f"| {one.task} | {one.metric} | {format_share(one.value)} | {format_share(one.chance)} | "
        f"{format_share(one.baseline)} | {one.count} |"
        for one in scores
    ]
    return ["| task | metric | model | chance | 16x16 pixels | queries |", "|---|---|---|---|---|---|", *rows]
