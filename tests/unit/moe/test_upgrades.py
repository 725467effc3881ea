"""Fillings in the form from before routers had separate options."""

import pytest

from moe.config import LIMoEConfig, MoMELIMoEConfig
from moe.routers import ExpertChoice, NoisyRouterLossConfig, TokenChoice
from moe.routers.losses import RouterLossConfig
from moe.upgrades import MOVED, contradictions, upgraded

RESOLVED = {
    **{"routing": "token_choice", "top_k": 2, "every": 1, "blocks": None, "expert_ratio": 0.5, "shared_experts": 1},
    **{"noise": 0.5, "renormalise": True, "capacity_factor": 1.25, "priority": False, "selection_bias_rate": 0.01},
    "losses": {
        **{"importance": 0.1, "load": 0.2, "balance": 0.3, "z": 0.4},
        **{"local_entropy": {"text": 0.5}, "global_entropy": {}, "min_experts": {"image": 2}},
    },
    **{"upcycle_noise": 0.1, "implementation": "loop", "kind": "limoe", "num_experts": 6},
}
"""All fields, as the plan.yaml of an old run has them."""


def built(fields: dict) -> LIMoEConfig | MoMELIMoEConfig:
    """What today's typing makes of the fields; an unknown one is a TypeError."""
    kind, router = fields.pop("kind"), fields.pop("router", None)
    if router is not None:
        config, losses = (
            (TokenChoice, NoisyRouterLossConfig)
            if router["kind"] == "token_choice"
            else (ExpertChoice, RouterLossConfig)
        )
        given = {"losses": losses(**router.pop("losses"))} if "losses" in router else {}
        fields["router"] = config(**router, **given)
    return {"limoe": LIMoEConfig, "mome_limoe": MoMELIMoEConfig}[kind](**fields)


def test_every_field_of_a_resolved_plan_is_kept() -> None:
    losses = NoisyRouterLossConfig(0.1, 0.3, 0.4, {"text": 0.5}, {}, {"image": 2}, load=0.2)
    router = TokenChoice("token_choice", 2, 0.5, True, 1.25, False, 0.01, losses)
    wanted = LIMoEConfig(router, 1, None, 0.5, 1, 0.1, "loop", num_experts=6)
    assert built(upgraded(RESOLVED)) == wanted
    assert not MOVED.keys() & upgraded(RESOLVED).keys()


def test_what_is_not_given_keeps_its_default() -> None:
    assert upgraded({"kind": "limoe", "num_experts": 4}) == {"kind": "limoe", "num_experts": 4}
    assert upgraded({"kind": "limoe", "top_k": 2}) == {"kind": "limoe", "router": {"kind": "token_choice", "top_k": 2}}
    assert upgraded({"kind": "limoe", "router": {"noise": 0.5}})["router"] == {"kind": "token_choice", "noise": 0.5}


@pytest.mark.parametrize(
    ("options", "mean"),
    [
        ({}, None),
        ({"top_k": 2}, 2.0),
        ({"capacity_factor": 1.5}, 1.5),
        ({"top_k": 2, "capacity_factor": 1.5}, 3.0),
        ({"top_k": 2, "capacity_factor": None}, 2.0),
        ({"top_k": 2, "capacity_factor": 7.0}, 4.0),  # four experts: each takes all tokens
        ({"top_k": 5}, 5.0),  # more than there are, which today's typing refuses
    ],
)
def test_experts_that_choose_get_the_mean_number_of_experts(options: dict, mean: float | None) -> None:
    off = {"noise": 0.0, "renormalise": False, "selection_bias_rate": 0, "priority": True, "losses": {"load": 0.0}}
    ffn = {"kind": "limoe", "num_experts": 4, "routing": "expert_choice", **off, **options}
    router = upgraded(ffn)["router"]
    assert router == {"kind": "expert_choice", "losses": {}, **({} if mean is None else {"experts_per_token": mean})}


def test_what_was_refused_beside_expert_choice_is_refused_still() -> None:
    ffn = {"kind": "limoe", "routing": "expert_choice", "noise": 1.0, "renormalise": True, "losses": {"load": 0.1}}
    router = upgraded(ffn)["router"]
    assert router == {"kind": "expert_choice", "noise": 1.0, "renormalise": True, "losses": {"load": 0.1}}
    with pytest.raises(TypeError, match="noise"):
        ExpertChoice(**router)


@pytest.mark.parametrize("ffn", [{"kind": "attribute", "top_k": 2, "noise": 0.5}, {"kind": "dense"}, {"kind": "mome"}])
def test_fillings_without_a_router_stay_as_they_are(ffn: dict) -> None:
    assert upgraded(ffn) == ffn
    assert contradictions(ffn) == []


SHARED = {"kind": "limoe", "top_k": 2, "noise": 0.0, "losses": {"load": 0.0, "z": 0.1}}


@pytest.mark.parametrize(
    ("part", "wanted"),
    [
        ({"num_experts": 4}, {"num_experts": 4}),
        ({"top_k": 1}, {"router": {"top_k": 1}}),
        ({"losses": {"z": 0.2}}, {"router": {"losses": {"z": 0.2}}}),
        (
            {"routing": "expert_choice"},
            {"router": {"kind": "expert_choice", "losses": {"z": 0.1}, "experts_per_token": 2.0}},
        ),
        (
            {"routing": "expert_choice", "capacity_factor": 1.5},
            {"router": {"kind": "expert_choice", "losses": {"z": 0.1}, "experts_per_token": 3.0}},
        ),
        ({"kind": "limoe", "every": 1, "top_k": 1}, {"kind": "limoe", "every": 1, "router": {"top_k": 1}}),
        ({"kind": "dense"}, {"kind": "dense"}),
    ],
)
def test_a_part_is_laid_over_the_upgraded_whole(part: dict, wanted: dict) -> None:
    assert upgraded(part, SHARED) == wanted


def test_an_earlier_field_beside_its_successor_is_a_contradiction() -> None:
    router = {"kind": "token_choice", "top_k": 2, "noise": 0.5}
    assert contradictions({"kind": "limoe", "top_k": 2, "noise": 0.0, "renormalise": True, "router": router}) == [
        "noise"
    ]
    chooses = {"kind": "expert_choice", "experts_per_token": 2.0}
    assert contradictions({"kind": "limoe", "routing": "token_choice", "top_k": 2, "router": chooses}) == [
        "routing",
        "top_k",
    ]
