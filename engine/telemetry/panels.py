"""What the figures of a run are called, and which belong together: for the report's charts and for TensorBoard.

A figure's key is ``group/name`` of a line of metrics, such as ``losses/mlm`` or ``metrics/router/visual_01/entropy``.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

NOT_DRAWN = ("step", "skipped")
"""Numbers of a line of metrics that are no figures: their place, and a count that the report says in words."""

_OBJECTIVES: Mapping[str, str] = {
    "choose": "choice among options",
    "classify": "classification",
    "clip": "CLIP",
    "diffusion": "drawing",
    "distil": "teacher",
    "distil_matching": "teacher of matching",
    "itc": "ITC",
    "intra_modal": "contrast within a modality",
    "itm": "ITM",
    "lm": "LM",
    "mcm": "MCM",
    "mdm": "MDM",
    "mfm": "MFM",
    "mlm": "MLM",
    "mrm": "MRM",
    "local_mi": "contrast of parts",
    "locate": "boxes",
    "mmm": "MMM",
    "prefix_lm": "PrefixLM",
    "prototypes": "shared codebook",
    "quantize": "picture codes",
    "recognize": "recognition",
    "region": "choice among boxes",
    "regress": "numbers",
    "segment": "masks",
    "split_lm": "LM behind a prefix",
    "univlc": "UniVLC",
    "vlm": "VLM",
    "vqa": "VQA",
}
"""How objectives are written; a key that a plan chose itself is shown as it stands."""

_NAMES: Mapping[str, str] = {
    "loss": "weighted total",
    "gradient_norm": "gradient norm before clipping",
    "lr/decay": "weights with decay",
    "lr/matrices": "matrices of blocks, by Muon",
    "lr/no_decay": "weights without decay",
    "speed/samples_per_second": "samples per second, all replicas",
    "speed/tokens_per_second": "tokens per second, all replicas",
    "speed/seconds_per_step": "seconds per step",
    "speed/cpu_seconds_per_step": "CPU seconds per step, all processes",
    "speed/tflops": "TFLOP/s, all replicas",
    "speed/mfu": "MFU (of peak)",
    "speed/data_wait": "waiting for data (of time)",
    "speed/save_seconds": "from training, since the point before",
    "speed/memory_gib": "resident memory, GiB",
    "speed/gpu_memory_gib": "GPU memory, GiB, most so far",
}


@dataclass(frozen=True)
class Panel:
    """Figures that share a unit.

    Attributes:
        title: Heads the panel.
        pattern: Names of the figures, ``group/name``. The first panel that matches a figure takes it.
        card: The group of TensorBoard's cards that shows its figures; "" shows none, as another figure says more.
        from_zero: Whether the axis starts at zero.
    """

    title: str
    pattern: str
    card: str = ""
    from_zero: bool = False


PANELS: tuple[Panel, ...] = (
    Panel("Losses", r"losses/.*|loss", "Loss"),
    Panel("Accuracy within the batch", r"metrics/.*(accuracy|_r\d+)", "Accuracy within the batch", from_zero=True),
    Panel("Temperature", r"metrics/.*temperature", "Objectives"),
    Panel("Positives per query", r"metrics/.*positives", "Objectives"),
    Panel("Shares of the batch", r"metrics/.*(fraction|with_negative|queue_valid)", from_zero=True),
    Panel("Experts used", r"metrics/router/experts_used_.*", "Experts used", from_zero=True),
    Panel("Entropy of the routers, nats", r"metrics/router/entropy_.*", from_zero=True),
    Panel("Weight of the first choice", r"metrics/router/confidence_.*", from_zero=True),
    Panel("Share of choices dropped", r"metrics/router/dropped_.*", "Share of choices dropped", from_zero=True),
    Panel("Experts used, by layer", r"metrics/router/.+/experts_used", from_zero=True),
    Panel("Busiest expert over the mean, by layer", r"metrics/router/.+/largest_load", from_zero=True),
    Panel("Entropy of the routers, nats, by layer", r"metrics/router/.+/entropy", from_zero=True),
    Panel("Weight of the first choice, by layer", r"metrics/router/.+/confidence", from_zero=True),
    Panel("Share of choices dropped, by layer", r"metrics/router/.+/dropped", from_zero=True),
    Panel("Other metrics", r"metrics/.*", "Objectives"),
    Panel("Learning rate", r"lr/.*", "Optimizer"),
    Panel("Gradient norm before clipping", r"gradient_norm", "Optimizer"),
    Panel("Samples per second", r"speed/samples_per_second", "Speed", from_zero=True),
    Panel("Tokens per second", r"speed/tokens_per_second", from_zero=True),
    Panel("Seconds per step", r"speed/(cpu_)?seconds_per_step", from_zero=True),
    Panel("TFLOP/s", r"speed/tflops", from_zero=True),
    Panel("Share of the peak, share of time", r"speed/(mfu|data_wait)", "Speed", from_zero=True),
    Panel("Seconds that checkpoints took", r"speed/save_seconds", from_zero=True),
    Panel("Memory per process, GiB", r"speed/(gpu_)?memory_gib", "Speed", from_zero=True),
    Panel("Other figures", r".*"),
)
"""Every figure of a training record belongs to exactly one of these."""


_LEADING_SCORES = re.compile(r".*(R@1|accuracy.*|keyword F1)")
_SCALED_RATE = re.compile(r"(lr/(?:(?:no_)?decay|matrices))_x(.+)")
_ROUTER_MEAN = re.compile(r"metrics/router/(?:experts_used|entropy|confidence|dropped)_(.+)")
_ROUTER_LAYER = re.compile(r"metrics/router/(.+)/[^/]+")
_RECALL = re.compile(r" r(\d+)$")


def figure_name(key: str) -> str:
    """The name of a figure beside others of its panel: ``MLM: accuracy``, ``video``, ``visual layer 1``."""
    if key in _NAMES:
        return _NAMES[key]
    if (scaled := _SCALED_RATE.fullmatch(key)) is not None:
        return f"{_NAMES[scaled[1]]}, x {scaled[2]}"
    if (layer := _ROUTER_LAYER.fullmatch(key)) is not None:
        return layer_name(layer[1])
    if (mean := _ROUTER_MEAN.fullmatch(key)) is not None:
        return _in_words(mean[1])
    group, _, rest = key.partition("/")
    owner, _, figure = (rest or group).partition("/")
    told = _OBJECTIVES.get(owner, _in_words(owner))
    return f"{told}: {_in_words(figure)}" if figure else told


def layer_name(layer: str) -> str:
    """``visual layer 1`` for ``visual_01``; a further part of the name, as of one of two routers, follows it."""
    block, _, part = layer.partition("/")
    stack, _, number = block.rpartition("_")
    told = f"{_in_words(stack)} layer {int(number)}" if stack and number.isdecimal() else _in_words(block)
    return f"{told}, {_in_words(part)}" if part else told


def objective_name(key: str) -> str:
    """``MLM`` for ``mlm``."""
    return _OBJECTIVES.get(key, _in_words(key))


def _in_words(name: str) -> str:
    return _RECALL.sub(r", R@\1", name.replace("_", " "))


def is_leading_score(name: str) -> bool:
    """Whether a score, by ``task/metric``, is one of those that are drawn while a stage trains."""
    return _LEADING_SCORES.fullmatch(name) is not None


def panel_of(key: str) -> Panel:
    """The panel that a figure belongs to: the first that matches."""
    return next(panel for panel in PANELS if re.fullmatch(panel.pattern, key, re.DOTALL))


def grouped(keys: Iterable[str]) -> list[tuple[Panel, tuple[str, ...]]]:
    """The panels that have something to draw, in their order, with the keys of their figures."""
    found: dict[Panel, list[str]] = {}
    for key in sorted(set(keys) - set(NOT_DRAWN)):
        found.setdefault(panel_of(key), []).append(key)
    return [(panel, tuple(found[panel])) for panel in PANELS if panel in found]
