"""Sizes and costs of a chain by arithmetic, without building it.

Letters: D hidden size, F inner size, V vocabulary, L text positions, P projection size, C values of a 2D patch,
N patches of a frame, T time positions, S = 1 + T * N.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from omnivl.model.build import wants_momentum
from omnivl.model.config import ModelConfig
from omnivl.model.state import StepLayout
from omnivl.objectives.base import Objective

FORWARD_AND_BACKWARD = 3
"""The backward pass of a product takes two products of the same size."""

MASKED_WORD_SHARE = 0.15
"""Which share of a masked text's positions goes through the vocabulary head: MLM's usual probability."""


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of parameters by part of the chain.

    Attributes:
        embed: Patches, positions, words.
        visual: Visual blocks and the last normalisation.
        text: Text blocks.
        contrast: Projections and temperature.
        alignment: Alignment decoder.
        generation: Generation decoder.
        heads: The objectives' heads.
        momentum: All momentum twins; they get no gradient.
    """

    embed: int
    visual: int
    text: int
    contrast: int
    alignment: int
    generation: int
    heads: int
    momentum: int

    @property
    def trained(self) -> int:
        """Everything but the twins."""
        return self.total - self.momentum

    @property
    def total(self) -> int:
        """Everything."""
        return sum(vars(self).values())


def parameter_count(config: ModelConfig, objectives: Sequence[Objective] = ()) -> ParameterCount:
    """Counts the parameters of the chain that ``build_chain`` makes.

    Args:
        config: Sizes.
        objectives: They decide on heads and twins.
    """
    hidden, inner = config.hidden_size, config.inner_size
    norm, attention = 2 * hidden, 4 * (hidden**2 + hidden)
    block = attention + 2 * hidden * inner + inner + hidden + 2 * norm
    temporal = norm + attention + hidden**2 + hidden
    scales = 0 if config.layer_scale_init is None else 2 * hidden
    visual = config.vision_layers * (block + temporal + scales) + norm
    norm_out = norm if config.text_norm == "pre" else 0
    text = config.text_layers * block + norm_out * (config.text_layers > 0)
    projections = 2 * (hidden * config.projection_size + config.projection_size)
    grounded = block + attention + norm
    twins = wants_momentum(config, objectives)
    twin_projections = any(o.name == "univlc" and o.uses_momentum for o in objectives)
    return ParameterCount(
        embed=_embed_parameters(config),
        visual=visual,
        text=text,
        contrast=projections + 1,
        alignment=config.alignment_layers * grounded + norm_out * (config.alignment_layers > 0),
        generation=config.generation_layers * grounded + norm_out * (config.generation_layers > 0),
        heads=_head_parameters(config, objectives),
        momentum=twins * (_embed_parameters(config) + visual + text) + twin_projections * projections,
    )


def _embed_parameters(config: ModelConfig) -> int:
    hidden, values = config.hidden_size, 3 * config.patch_size**2
    rows, columns = config.grid(is_video=False)
    patches = hidden * values * (1 + config.tubelet_size) + hidden
    tokens_and_positions = hidden * (2 + 1 + rows * columns + config.time_positions(config.num_frames))
    words = hidden * (config.vocab_size + config.text_length + 2)
    return patches + tokens_and_positions + words


def _head_parameters(config: ModelConfig, objectives: Sequence[Objective]) -> int:
    """Heads belong to the objectives, which alone know them: built without storage and counted."""
    with torch.device("meta"):
        heads = [objective.build_head(config) for objective in objectives]
    own = sum(parameter.numel() for head in heads if head is not None for parameter in head.parameters())
    hidden, words = config.hidden_size, config.vocab_size
    shared = any(objective.uses_vocabulary_head for objective in objectives)
    return own + shared * (hidden**2 + hidden + 2 * hidden + hidden * words + words)


def step_flops(config: ModelConfig, layout: StepLayout) -> float:
    """Floating-point operations of the matrix products of one step's forward and backward pass.

    A multiplication and its addition count as two. Activation recomputation does not count: this is the useful work
    that MFU is about. Padded positions do count, even where blocks leave them out. Left out of the count:
    normalisations, softmax, the losses' similarities, patch heads.

    Args:
        config: Sizes.
        layout: The step; its momentum twins count forward only.
    """
    stacks = layout.visual, layout.text, layout.alignment
    visual_rows, text_rows, alignment_rows = (sum(rows.stop - rows.start for rows in s.values()) for s in stacks)
    visual, text = _visual_row(config, layout), config.text_layers * _text_block(config)
    if layout.class_only and config.ffn.kind == "dense":
        visual, text = visual - _visual_shortcut(config, layout), text - _text_shortcut(config)
    grounded = _text_block(config) + _cross(config, layout, 1.0)
    # Keys and values are projected once per memory row, however many alignment rows read them.
    aligned = alignment_rows * (_text_block(config) + _cross(config, layout, 0.0)) + (
        layout.batch_size * _memory(config, layout) if alignment_rows else 0.0
    )
    total = FORWARD_AND_BACKWARD * (
        visual_rows * visual
        + text_rows * text
        + config.alignment_layers * aligned
        + layout.generation * layout.batch_size * config.generation_layers * grounded
        + _vocabulary(config, layout)
    )
    if layout.visual:  # no gradient flows into pixels: one product less
        total += (FORWARD_AND_BACKWARD - 1) * layout.batch_size * _patches(config, layout)
    if layout.momentum:
        total += layout.batch_size * (visual + text + _patches(config, layout))
    return float(total)


def _num_patches(config: ModelConfig, layout: StepLayout) -> int:
    rows, columns = config.grid(layout.is_video)
    return rows * columns


def _visual_row(config: ModelConfig, layout: StepLayout) -> float:
    """All visual blocks on one row, forward."""
    hidden, patches = config.hidden_size, _num_patches(config, layout)
    times = config.time_positions(layout.num_frames)
    in_frames, positions = times * (1 + patches), 1 + times * patches
    flops = in_frames * 8 * hidden**2 + times * 4 * (1 + patches) ** 2 * hidden
    flops += positions * 4 * hidden * config.inner_size
    if layout.is_video:
        flops += times * patches * 10 * hidden**2 + patches * 4 * times**2 * hidden
    return config.vision_layers * flops


def _visual_shortcut(config: ModelConfig, layout: StepLayout) -> float:
    """What the last visual block saves on one row where only the class token is read."""
    hidden, patches = config.hidden_size, _num_patches(config, layout)
    times = config.time_positions(layout.num_frames)
    attention = times * patches * (4 * hidden**2 + 4 * (1 + patches) * hidden)
    return attention + times * patches * 4 * hidden * config.inner_size


def _text_shortcut(config: ModelConfig) -> float:
    """What the last text block saves on one text where only the first position is read."""
    hidden, others = config.hidden_size, config.text_length - 1
    return others * (4 * hidden**2 + 4 * hidden * config.inner_size + 4 * config.text_length * hidden)


def _text_block(config: ModelConfig) -> float:
    """One block on one text, forward: projections, attention, feed-forward."""
    hidden, length = config.hidden_size, config.text_length
    return length * (8 * hidden**2 + 4 * hidden * config.inner_size) + 4 * length**2 * hidden


def _cross(config: ModelConfig, layout: StepLayout, memory_rows_per_row: float) -> float:
    """Cross-attention of one text, forward, with its share of the memory's projection."""
    hidden, length = config.hidden_size, config.text_length
    positions = 1 + config.time_positions(layout.num_frames) * _num_patches(config, layout)
    own = length * 4 * hidden**2 + 4 * length * positions * hidden
    return own + memory_rows_per_row * _memory(config, layout)


def _memory(config: ModelConfig, layout: StepLayout) -> float:
    """Keys and values of one memory row in one block."""
    positions = 1 + config.time_positions(layout.num_frames) * _num_patches(config, layout)
    return positions * 4 * config.hidden_size**2


def _patches(config: ModelConfig, layout: StepLayout) -> float:
    """Patch embedding of one sample, forward."""
    return layout.num_frames * _num_patches(config, layout) * 2 * 3 * config.patch_size**2 * config.hidden_size


def _vocabulary(config: ModelConfig, layout: StepLayout) -> float:
    """The vocabulary head on the generation stream and on masked words."""
    masked = layout.text["mlm"].stop - layout.text["mlm"].start if "mlm" in layout.text else 0
    positions = config.text_length * (layout.generation * layout.batch_size + MASKED_WORD_SHARE * masked)
    return positions * 2 * config.hidden_size * (config.hidden_size + config.vocab_size)
