"""The largest and the smallest numbers that any file and any command may hold, beside the ranges that fields state.

A field's own range (``moe.ranges``) says which numbers mean something. The limits here are far beyond every model and
every machine: a number beyond them is a slip of the keyboard, and would take hours or terabytes before it failed.
"""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_args, get_origin

from engine.plan.schema import dataclass_at, field_types, members
from engine.plan.yaml import Path, Problem, show_value

LARGEST = 1_000_000_000
"""Of every number without an entry below; the negative ones as far down."""

_SMALLEST = 1e-15
"""Of every number other than 0, without its sign."""


@dataclass(frozen=True)
class Limit:
    """The numbers that a field may hold.

    Attributes:
        low: The smallest.
        high: The largest.
    """

    low: float = -LARGEST
    high: float = LARGEST

    def __str__(self) -> str:
        """In words: ``at most 1000``, ``from 0 to 100``."""
        return f"at most {self.high:,}" if self.low == -LARGEST else f"from {self.low:,} to {self.high:,}"


_LAYERS, _WIDTH, _EXPERTS, _WORDS = Limit(high=1_000), Limit(high=65_536), Limit(high=4_096), Limit(high=10_000_000)
_PIXELS, _TOKENS, _PROCESSES, _BATCH = (
    *(Limit(high=16_384), Limit(high=100_000), Limit(high=1_000_000), Limit(high=1_000_000)),
)

_LIMITS: Mapping[str, Limit] = {
    **dict.fromkeys(("layers", "depth", "num_layers"), _LAYERS),
    **dict.fromkeys(("vision_layers", "text_layers", "alignment_layers", "generation_layers"), _LAYERS),
    **dict.fromkeys(("hidden_size", "projection_size", "attribute_size", "num_queries"), _WIDTH),
    **dict.fromkeys(("num_heads", "mlp_ratio", "expert_ratio"), Limit(high=1_024)),
    **dict.fromkeys(("num_experts", "common_experts", "shared_experts", "num_attributes", "pools"), _EXPERTS),
    **dict.fromkeys(("vocab_size", "queue_size", "num_answers", "num_classes"), _WORDS),
    **dict.fromkeys(("image_size", "video_size", "patch_size"), _PIXELS),
    **dict.fromkeys(("num_frames", "tubelet_size"), Limit(high=4_096)),
    **dict.fromkeys(("text_length", "length", "positions"), _TOKENS),
    **dict.fromkeys(("expert_parallel_size", "pipeline_stages"), _PROCESSES),
    **dict.fromkeys(("micro_batch_size_per_gpu", "gradient_accumulation_steps"), _BATCH),
    **dict.fromkeys(("processes", "num_workers", "processes_per_node", "gpus_per_node", "parallel"), Limit(high=1_024)),
    **dict.fromkeys(("nodes", "world_size", "batch_size"), _PROCESSES),
    "shorter_side": _PIXELS,
    "samples": Limit(high=1_000_000_000_000),
    **dict.fromkeys(("micro_batches", "repeats", "jitter", "slow_factor"), Limit(high=1_000)),
    **dict.fromkeys(("days",), Limit(high=36_500)),
    **dict.fromkeys(("prefetch_factor", "num_beams", "rand_augment_operations"), Limit(high=1_000)),
    **dict.fromkeys(("timeout_seconds", "hang_seconds", "grace_seconds"), Limit(high=2_592_000)),
    **dict.fromkeys(("lr", "weight_decay", "temperature", "rerank_temperature"), Limit(high=100)),
    **dict.fromkeys(("weight", "image_weight", "text_weight", "pair_weight"), Limit(high=1_000_000)),
    "max_pixels": Limit(high=10_000_000_000),
    "seed": Limit(0, 2**63 - 1),
}


def limit_of(field: str) -> Limit:
    """The limit of a field by its name, whichever section it stands in."""
    return _LIMITS.get(field, Limit())


def beyond_limits(annotation: Any, tree: Any, path: Path = (), field: str = "") -> Iterator[Problem]:
    """The numbers of a tree that are beyond their limits.

    Args:
        annotation: What the tree is read as.
        tree: Mappings, lists and scalars.
        path: Where the tree stands.
        field: Name of the dataclass's field that holds the tree.
    """
    if isinstance(tree, bool):
        return
    if isinstance(tree, int | float):
        limit = limit_of(field)
        if not limit.low <= tree <= limit.high:
            yield Problem(path, show_value(tree), str(limit), "change the number")
        elif tree != 0 and abs(tree) < _SMALLEST:
            yield Problem(path, show_value(tree), f"0, or {_SMALLEST:g} or more", "change the number")
    elif isinstance(tree, Mapping):
        cls = dataclass_at(annotation, tree)
        known = {} if cls is None else field_types(cls)
        within = _within(annotation)
        for name, value in tree.items():
            yield from beyond_limits(known.get(name, within), value, (*path, name), field if cls is None else name)
    elif isinstance(tree, list):
        within = _within(annotation)
        for index, value in enumerate(tree):
            yield from beyond_limits(within, value, (*path, index), field)


def within_limits(annotation: Any, tree: Any) -> tuple[Any, list[Problem]]:
    """A copy of the tree with every number beyond its limit moved to it, and the problems.

    What is looked at next is then as small as the limits say, so that all other mistakes can be told as well.
    """
    problems = list(beyond_limits(annotation, tree))
    tree = copy.deepcopy(tree) if problems else tree
    for problem in problems:
        holder = tree
        for part in problem.path[:-1]:
            holder = holder[part]
        last = problem.path[-1]
        limit = limit_of(next(part for part in reversed(problem.path) if isinstance(part, str)))
        holder[last] = limit.low if holder[last] < limit.low else min(holder[last], limit.high)
    return tree, problems


def _within(annotation: Any) -> Any:
    """The annotation of the members of a list or a mapping; None where there is none."""
    for member in members(annotation):
        origin, arguments = get_origin(member), get_args(member)
        if origin is tuple:
            return arguments[0]
        if isinstance(origin, type) and issubclass(origin, Mapping):
            return arguments[1]
    return None
