"""Sparse fillings as plans wrote them before routers had options of their own, brought into today's form.

Then the router's options were beside those of the experts: ``{kind: limoe, top_k: 2, noise: 0}``. Today they are under
``router``: ``{kind: limoe, router: {kind: token_choice, top_k: 2, noise: 0}}``.
"""

from collections.abc import Mapping
from typing import Any

KINDS = ("limoe", "mome_limoe")
"""The fillings with a router."""

MOVED = {
    "routing": ("router", "kind"),
    "top_k": ("router", "top_k"),
    "noise": ("router", "noise"),
    "renormalise": ("router", "renormalise"),
    "capacity_factor": ("router", "capacity_factor"),
    "priority": ("router", "priority"),
    "selection_bias_rate": ("router", "selection_bias_rate"),
    "losses": ("router", "losses"),
}
"""Today's path of each earlier field, from the filling on. For ``expert_choice`` the product of ``top_k`` and
``capacity_factor`` becomes ``router.experts_per_token``, and options that had to be 0 or false are left out."""

DEFAULT_ROUTER = "token_choice"

_NEUTRAL = {"noise": 0, "renormalise": False, "selection_bias_rate": 0}
"""Values that ``expert_choice`` allowed for options that it no longer has."""


def upgraded(ffn: Mapping[str, Any], over: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The same filling in today's form; one of today's form stays as it is, but for a router without ``kind``.

    A value that was refused in the earlier form is moved too, so that it is refused in today's.

    Args:
        ffn: The fields of a filling, as YAML or JSON has them.
        over: The fields that ``ffn`` overrides, if it is only a part of a filling: for a stage, those of the plan. The
            result is then also a part, which overrides the upgraded ``over``.
    """
    if over is None or ffn.get("kind", over.get("kind")) != over.get("kind"):
        return _whole(ffn)
    base, whole = _whole(over), _whole(_laid(over, ffn))
    part = {name: value for name, value in ffn.items() if name not in MOVED and name != "router"}
    if "router" in whole and (router := _router_part(base.get("router", {}), whole["router"])):
        part["router"] = router
    return part


def contradictions(ffn: Mapping[str, Any]) -> list[str]:
    """Earlier fields that are given beside their successors, with other values."""
    router = ffn.get("router")
    if ffn.get("kind") not in KINDS or not isinstance(router, Mapping):
        return []
    chooses = "experts_per_token" in router
    return [
        name
        for name, (_, successor) in MOVED.items()
        if name in ffn
        and (
            (successor in router and router[successor] != ffn[name])
            or (chooses and name in ("top_k", "capacity_factor"))
        )
    ]


def _whole(ffn: Mapping[str, Any]) -> dict[str, Any]:
    given = ffn.get("router", {})
    if ffn.get("kind") not in KINDS or not isinstance(given, Mapping):
        return dict(ffn)
    earlier = {name: ffn[name] for name in MOVED if name in ffn}
    if not earlier and not given:
        return dict(ffn)
    kind = given.get("kind", earlier.pop("routing", DEFAULT_ROUTER))
    moved = _of_expert_choice(earlier, ffn.get("num_experts")) if kind == "expert_choice" else earlier
    kept = {name: value for name, value in ffn.items() if name not in MOVED and name != "router"}
    return {**kept, "router": {"kind": kind, **moved, **given}}


def _of_expert_choice(earlier: Mapping[str, Any], num_experts: Any) -> dict[str, Any]:
    """The options of ``expert_choice``; others stay only if today's typing has to refuse them.

    A capacity above that of all tokens meant all tokens, hence no more experts per token than there are.
    """
    options = {name: value for name, value in earlier.items() if name != "priority" and name not in _NEUTRAL}
    options |= {name: earlier[name] for name, value in _NEUTRAL.items() if name in earlier and earlier[name] != value}
    top_k, factor = options.get("top_k", 1), options.get("capacity_factor")
    given = [name for name in ("top_k", "capacity_factor") if name in options]
    if given and _is_number(top_k) and (factor is None or _is_number(factor)):
        for name in given:
            del options[name]
        mean = float(top_k * (1.0 if factor is None else factor))
        above = _is_number(num_experts) and top_k <= num_experts < mean
        options["experts_per_token"] = float(num_experts) if above else mean
    losses = options.get("losses")
    if isinstance(losses, Mapping) and losses.get("load") == 0:
        options["losses"] = {name: weight for name, weight in losses.items() if name != "load"}
    return options


def _router_part(base: Mapping[str, Any], whole: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that turn one router's options into another's when merged into them."""
    if whole.get("kind") != base.get("kind"):
        return dict(whole)
    part: dict[str, Any] = {}
    for name, value in whole.items():
        if isinstance(value, Mapping) and isinstance(base.get(name), Mapping):
            if inner := {key: entry for key, entry in value.items() if base[name].get(key) != entry}:
                part[name] = inner
        elif name not in base or base[name] != value:
            part[name] = value
    return part


def _laid(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``over`` merged into ``base``, mapping by mapping."""
    result = dict(base)
    for name, value in over.items():
        both = isinstance(value, Mapping) and isinstance(base.get(name), Mapping)
        result[name] = _laid(base[name], value) if both else value
    return result


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
