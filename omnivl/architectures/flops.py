"""Sizes and costs of a chain by arithmetic, without building it.

Letters: D hidden size, F inner size, V vocabulary, L text positions, P projection size, C values of a 2D patch,
N patches of a frame, T time positions, S = 1 + T * N.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moe.config import AttributeConfig
from moe.feed_forward import has_attention_experts, is_routed
from moe.sizes import projection_parameters, slot_flops, slot_parameters
from moe.slot import Slot
from omnivl.architectures.build import wants_momentum
from omnivl.architectures.streams import head_sizes
from omnivl.chain.objective import Objective
from omnivl.chain.state import StepLayout
from omnivl.parts.bert import TEXT_MODALITY
from omnivl.parts.config import MODALITIES, ModelConfig
from omnivl.parts.embed import encoded_rows
from omnivl.parts.vit import VISUAL_MODALITIES

FORWARD_AND_BACKWARD = 3
"""The backward pass of a product takes two products of the same size."""

MASKED_WORD_SHARE = {"mlm": 0.15, "mdm/text": 0.15, "mdm/pair": 0.5}
"""Which share of a masked text's positions goes through the vocabulary head: the usual probabilities."""


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of parameters by part of the chain.

    Attributes:
        embed: Patches, positions, words.
        contrast: Projections and temperature.
        heads: The objectives' heads.
        momentum: All momentum twins; they get no gradient.
        visual: Visual blocks and the last normalisation.
        text: Text blocks.
        alignment: Alignment decoder.
        generation: Generation decoder.
        unified: Blocks and last normalisation of the unified transformer, which has none of the four before.
    """

    embed: int
    contrast: int
    heads: int
    momentum: int
    visual: int = 0
    text: int = 0
    alignment: int = 0
    generation: int = 0
    unified: int = 0

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
    hidden = config.hidden_size
    projections = 2 * (hidden * config.projection_size + config.projection_size)
    stacks = _unified_stack(config) if config.architecture == "unified" else _tower_stacks(config)
    twins = wants_momentum(config, objectives)
    twin_projections = any(o.reads("momentum_visual_embedding") for o in objectives)
    embed, followed = _embed_parameters(config), ("visual", "text", "unified")
    return ParameterCount(
        embed=embed,
        contrast=projections + 1,
        heads=_head_parameters(config, objectives),
        momentum=twins * (embed + sum(stacks.get(stack, 0) for stack in followed)) + twin_projections * projections,
        **stacks,
    )


def _tower_stacks(config: ModelConfig) -> dict[str, int]:
    """Parameters of the encoders and decoders."""
    hidden = config.hidden_size
    norm, attention = 2 * hidden, 4 * (hidden**2 + hidden)
    block, temporal = attention + 2 * norm, norm + attention + hidden**2 + hidden
    norm_out, grounded = norm if config.text_norm == "pre" else 0, block + attention + norm
    stacks = {
        "visual": config.vision_layers * (block + temporal + _scales(config)) + norm,
        "text": config.text_layers * block + norm_out * (config.text_layers > 0),
        "alignment": config.alignment_layers * grounded + norm_out * (config.alignment_layers > 0),
        "generation": config.generation_layers * grounded + norm_out * (config.generation_layers > 0),
    }
    slots = {
        "visual": _slots(config, config.vision_layers, VISUAL_MODALITIES),
        "text": _slots(config, config.text_layers, (TEXT_MODALITY,)),
        "alignment": _slots(config, config.alignment_layers, (TEXT_MODALITY,), fused=(True,)),
        "generation": _slots(config, config.generation_layers, (TEXT_MODALITY,), fused=(True,)),
    }
    return {stack: count + slots[stack] for stack, count in stacks.items()}


def _unified_stack(config: ModelConfig) -> dict[str, int]:
    """Parameters of the unified transformer."""
    hidden, sides = config.hidden_size, 2 if config.multiway else 1
    norm, layers = 2 * hidden, config.vision_layers
    attention = sum(_unified_attention(config, block) for block in range(layers))
    blocks = attention + layers * (sides * 2 * norm + _scales(config)) + sides * norm
    return {"unified": blocks + _slots(config, config.vision_layers, MODALITIES, fused=(False, True))}


def _unified_attention(config: ModelConfig, block: int) -> int:
    """Parameters of the two projections of a unified block."""
    hidden, ffn = config.hidden_size, config.ffn
    if isinstance(ffn, AttributeConfig) and has_attention_experts(ffn, block, config.vision_layers):
        return sum(projection_parameters(ffn, hidden, outputs) for outputs in (3 * hidden, hidden))
    return (2 if config.multiway else 1) * 4 * (hidden**2 + hidden)


def _scales(config: ModelConfig) -> int:
    return 0 if config.layer_scale_init is None else 2 * config.hidden_size


def _slots(config: ModelConfig, layers: int, modalities: Sequence[str], *, fused: Sequence[bool] = (False,)) -> int:
    """Parameters of the feed-forward slots of a stack."""
    slots = [Slot(block, modalities, MODALITIES, fused, layers) for block in range(layers)]
    return sum(slot_parameters(config.ffn, config.hidden_size, config.inner_size, slot) for slot in slots)


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
        heads = [objective.build_head(head_sizes(config)) for objective in objectives]
    own = sum(parameter.numel() for head in heads if head is not None for parameter in head.parameters())
    hidden, words = config.hidden_size, config.vocab_size
    shared = any(objective.reads("vocabulary") for objective in objectives)
    return own + shared * (hidden**2 + hidden + 2 * hidden + hidden * words + words)


def step_flops(config: ModelConfig, layout: StepLayout, text_tokens: int | None = None) -> float:
    """Floating-point operations of the matrix products of one step's forward and backward pass.

    A multiplication and its addition count as two. Activation recomputation does not count: this is the useful work
    that MFU is about. Padding is no useful work where blocks leave it out; inside attention, which computes whole rows,
    it counts. Patches that ``patch_dropout`` leaves out do not count. Left out of the count: normalisations, softmax,
    the losses' similarities, patch heads.

    Args:
        config: Sizes.
        layout: The step; its momentum twins count forward only.
        text_tokens: Tokens of the batch's texts, ends included and padding not; None counts as if all filled their
            rows. Texts that are drawn as negatives are taken to be of mean length.
    """
    tokens = config.text_length if text_tokens is None else text_tokens / layout.batch_size
    shifted = tokens - (text_tokens is not None)  # the generation stream reads and predicts one token less
    stacks = layout.visual, layout.text, layout.fused
    visual_rows, text_rows, alignment_rows = (sum(rows.stop - rows.start for rows in s.values()) for s in stacks)
    kept = _kept_patches(config, layout)
    if config.architecture == "unified":
        encoded = (encoded_rows(layout, stream) for stream in ("visual", "text"))
        rows = *(one.stop - one.start for one in encoded), alignment_rows
        return _unified_step(config, layout, rows, tokens, kept) + _edges(config, layout, tokens, shifted)
    text = _text_row(config, layout, tokens)
    # Keys and values are projected once per memory row, however many alignment rows read them.
    memory = layout.batch_size * _memory(config, layout, kept)
    alignment, generation = config.alignment_layers, config.generation_layers
    aligned = alignment_rows * _grounded_row(config, layout, alignment, tokens, kept)
    aligned += alignment * memory * (alignment_rows > 0)
    generated = layout.batch_size * _grounded_row(config, layout, generation, shifted, kept) + generation * memory
    total: float = FORWARD_AND_BACKWARD * (
        visual_rows * _visual_row(config, layout, kept)
        + text_rows * text
        + aligned
        + bool(layout.generation) * generated
    )
    if layout.twins:  # the twins see every patch
        total += layout.batch_size * (_visual_row(config, layout, _num_patches(config, layout)) + text)
    return total + _edges(config, layout, tokens, shifted)


def _edges(config: ModelConfig, layout: StepLayout, tokens: float, shifted: float) -> float:
    """What lies before and behind the blocks: patch embedding and vocabulary head."""
    patches = layout.batch_size * _patches(config, layout)
    total = FORWARD_AND_BACKWARD * _vocabulary(config, layout, tokens, shifted)
    if layout.visual:  # no gradient flows into pixels: one product less
        total += (FORWARD_AND_BACKWARD - 1) * patches
    return float(total + bool(layout.twins) * patches)


def _unified_step(config: ModelConfig, layout: StepLayout, rows: Sequence[int], tokens: float, kept: int) -> float:
    """The blocks of the unified transformer. Padded positions are computed, but count inside attention only."""
    seen, length = 1 + config.time_positions(layout.num_frames) * kept, config.text_length
    visual, text = _unified_row(config, seen, seen), _unified_row(config, tokens, length)
    joined = _unified_row(config, tokens + seen, length + seen)
    total = FORWARD_AND_BACKWARD * (rows[0] * visual + rows[1] * text + rows[2] * joined)
    if layout.twins:  # the twins see every patch
        every = 1 + config.time_positions(layout.num_frames) * _num_patches(config, layout)
        total += layout.batch_size * (_unified_row(config, every, every) + text)
    return total


def _unified_row(config: ModelConfig, tokens: float, positions: int) -> float:
    """All blocks on one row, forward."""
    hidden, layers = config.hidden_size, config.vision_layers
    return layers * (tokens * 8 * hidden**2 + 4 * positions**2 * hidden) + tokens * _slots_flops(config, layers)


def _num_patches(config: ModelConfig, layout: StepLayout) -> int:
    rows, columns = config.grid(layout.is_video)
    return rows * columns


def _kept_patches(config: ModelConfig, layout: StepLayout) -> int:
    """Patches of a frame that the visual blocks see: steps with a masked pass, and all but training, drop none."""
    patches = _num_patches(config, layout)
    if layout.mode != "train" or set(layout.visual) - {"clean"}:
        return patches
    return max(1, round(patches * (1.0 - config.patch_dropout)))


def _visual_row(config: ModelConfig, layout: StepLayout, patches: int) -> float:
    """All visual blocks on one row with ``patches`` patches per frame, forward."""
    hidden, times = config.hidden_size, config.time_positions(layout.num_frames)
    in_frames, positions = times * (1 + patches), 1 + times * patches
    flops = in_frames * 8 * hidden**2 + times * 4 * (1 + patches) ** 2 * hidden
    if layout.is_video:
        flops += times * patches * 10 * hidden**2 + patches * 4 * times**2 * hidden
    last = slot_flops(config.ffn, hidden, config.inner_size, config.vision_layers - 1, config.vision_layers)
    saved = times * patches * (4 * hidden**2 + 4 * (1 + patches) * hidden + last)
    slots = positions * _slots_flops(config, config.vision_layers)
    return config.vision_layers * flops + slots - _is_shortened(config, layout, config.vision_layers) * saved


def _text_row(config: ModelConfig, layout: StepLayout, tokens: float) -> float:
    """All text blocks on one text, forward. A last block that computes one position reads the others with padding."""
    hidden, length = config.hidden_size, config.text_length
    if not _is_shortened(config, layout, config.text_layers):
        return _text_blocks(config, config.text_layers, tokens)
    last = slot_flops(config.ffn, hidden, config.inner_size, config.text_layers - 1, config.text_layers)
    first = 4 * hidden**2 + 4 * length * hidden + last
    return _text_blocks(config, config.text_layers - 1, tokens) + length * 4 * hidden**2 + first


def _is_shortened(config: ModelConfig, layout: StepLayout, layers: int) -> bool:
    """Whether the last block of an encoder of ``layers`` blocks computes its first position only."""
    return layout.class_only and not is_routed(config.ffn, layers - 1, layers)


def _slots_flops(config: ModelConfig, layers: int) -> float:
    """The feed-forward slots of a stack on one token, forward."""
    return sum(slot_flops(config.ffn, config.hidden_size, config.inner_size, block, layers) for block in range(layers))


def _text_blocks(config: ModelConfig, layers: int, tokens: float) -> float:
    """The first blocks of a stack on one text, forward: attention works on the whole row, the rest on its tokens."""
    hidden, length = config.hidden_size, config.text_length
    return layers * (tokens * 8 * hidden**2 + 4 * length**2 * hidden) + tokens * _slots_flops(config, layers)


def _grounded_row(config: ModelConfig, layout: StepLayout, layers: int, tokens: float, patches: int) -> float:
    """All blocks of a decoder on one text, forward, without the projection of what they attend to."""
    hidden, positions = config.hidden_size, 1 + config.time_positions(layout.num_frames) * patches
    cross = tokens * 4 * hidden**2 + 4 * config.text_length * positions * hidden
    return _text_blocks(config, layers, tokens) + layers * cross


def _memory(config: ModelConfig, layout: StepLayout, patches: int) -> float:
    """Keys and values of one memory row in one block."""
    return (1 + config.time_positions(layout.num_frames) * patches) * 4 * config.hidden_size**2


def _patches(config: ModelConfig, layout: StepLayout) -> float:
    """Patch embedding of one sample, forward: patches are dropped behind it."""
    return layout.num_frames * _num_patches(config, layout) * 2 * 3 * config.patch_size**2 * config.hidden_size


def _vocabulary(config: ModelConfig, layout: StepLayout, tokens: float, shifted: float) -> float:
    """The vocabulary head on the generation stream and on masked words."""
    rows = {name: segment.stop - segment.start for name, segment in layout.text.items()}
    masked = sum(share * rows.get(name, 0) for name, share in MASKED_WORD_SHARE.items())
    positions = shifted * bool(layout.generation) * layout.batch_size + tokens * masked
    return float(positions * 2 * config.hidden_size * (config.hidden_size + config.vocab_size))
