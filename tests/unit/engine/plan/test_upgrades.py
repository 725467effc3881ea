"""Plans from before routers had separate options are read like today's."""

import pytest

from engine.errors import PlanError
from engine.plan.parse import parse_plan
from moe.routers import ExpertChoice, NoisyRouterLossConfig, TokenChoice

PLAN = """name: p
tokenizer: emoji
model: {{preset: tiny, architecture: unified, ffn: {shared}}}
parallel: {{host: plain, precision: fp32}}
batch: {{micro_batch_size_per_gpu: 8}}
stages:
  - name: a
    steps: 4
    data: [{{source: emoji, kind: image_text}}]
    objectives: [univlc]
    optimizer: {{lr: 1e-3}}
    model: {{ffn: {own}}}
"""


def read(shared: str, own: str = "{}", overrides=()):
    return parse_plan(PLAN.format(shared=shared, own=own), "p", overrides).stages[0].model.ffn


def refused(shared: str, own: str = "{}", overrides=()) -> list[str]:
    with pytest.raises(PlanError) as caught:
        read(shared, own, overrides)
    return list(caught.value.problems)


EQUAL = [
    ("{kind: limoe, top_k: 2, noise: 0.5}", "{kind: limoe, router: {kind: token_choice, top_k: 2, noise: 0.5}}"),
    (
        "{kind: limoe, losses: {z: 0.1, local_entropy: {text: 0.1}}}",
        "{kind: limoe, router: {kind: token_choice, losses: {z: 0.1, local_entropy: {text: 0.1}}}}",
    ),
    (
        "{kind: mome_limoe, pools: {image: 2}, common_experts: 2, top_k: 2, selection_bias_rate: 0.1}",
        "{kind: mome_limoe, pools: {image: 2}, common_experts: 2,"
        " router: {kind: token_choice, top_k: 2, selection_bias_rate: 0.1}}",
    ),
    (
        "{kind: limoe, routing: expert_choice, top_k: 2, capacity_factor: 1.5, noise: 0, losses: {load: 0, z: 0.1}}",
        "{kind: limoe, router: {kind: expert_choice, experts_per_token: 3.0, losses: {z: 0.1}}}",
    ),
]


@pytest.mark.parametrize(("earlier", "today"), EQUAL)
def test_an_earlier_filling_is_read_as_todays(earlier: str, today: str) -> None:
    assert read(earlier) == read(today)
    assert read("{kind: dense}", earlier) == read("{kind: dense}", today)


def test_stages_lay_their_fields_over_shared_ones_of_either_form() -> None:
    earlier = "{kind: limoe, top_k: 2, noise: 0, losses: {load: 0}}"
    still = NoisyRouterLossConfig(load=0.0)
    assert read(earlier, "{top_k: 1}").router == TokenChoice(top_k=1, noise=0.0, losses=still)
    assert read(earlier, "{routing: expert_choice}").router == ExpertChoice(experts_per_token=2.0)
    assert read(earlier, "{router: {renormalise: true}}").router == TokenChoice(
        top_k=2, noise=0.0, renormalise=True, losses=still
    )
    assert read("{kind: limoe, router: {kind: token_choice, top_k: 2}}", "{noise: 0.5}").router == TokenChoice(
        top_k=2, noise=0.5
    )


def test_a_router_without_a_kind_is_that_of_token_choice() -> None:
    assert read("{kind: limoe}", "{router: {top_k: 2}}").router == TokenChoice(top_k=2)
    assert read("{kind: limoe}", overrides=["model.ffn.router.top_k=2"]).router == TokenChoice(top_k=2)
    assert read("{kind: limoe, router: {noise: 2}}", "{router: {kind: token_choice, top_k: 2}}").router == TokenChoice(
        top_k=2, noise=2.0
    )


def test_an_override_may_name_an_earlier_field() -> None:
    assert read("{kind: limoe, num_experts: 4}", overrides=["model.ffn.top_k=2"]).router == TokenChoice(top_k=2)


def test_problems_of_moved_fields_have_the_line_of_the_earlier_ones() -> None:
    assert refused("{kind: limoe, noise: loud}") == [
        "p:3: model.ffn.router.noise: got 'loud'; allowed a number; change it to a number"
    ]
    assert refused("{kind: limoe}", "{top_k: 0}") == [
        "p:12: stages.0.model.ffn.router.top_k: got 0; allowed 1 or more; change the number"
    ]
    assert refused("{kind: limoe}", overrides=["model.ffn.capacity_factor=-1"]) == [
        "override 'model.ffn.capacity_factor=-1': model.ffn.router.capacity_factor: got -1; allowed more than 0, or "
        "null; change the number"
    ]
    assert refused("{kind: limoe, routing: experts_choice}") == [
        "p:3: model.ffn.router.kind: got 'experts_choice'; allowed 'token_choice', 'expert_choice'; did you mean "
        "'expert_choice'?"
    ]
    assert refused("{kind: limoe, routing: expert_choice, noise: 1.0}") == [
        "p:3: model.ffn.router.noise: got an unknown key; allowed kind, experts_per_token, losses; remove it"
    ]


def test_an_earlier_field_beside_another_value_of_its_successor_is_refused() -> None:
    assert refused("{kind: limoe, router: {kind: token_choice, top_k: 2}}", overrides=["model.ffn.top_k=1"]) == [
        "override 'model.ffn.top_k=1': model.ffn.top_k: got 1 beside model.ffn.router.top_k; allowed one of the two; "
        "take it out: model.ffn.router.top_k is its new name"
    ]


def test_the_written_plan_has_todays_form_and_reads_back() -> None:
    plan = parse_plan(PLAN.format(shared="{kind: limoe, top_k: 2}", own="{}"))
    assert "router:" in plan.to_yaml() and "routing:" not in plan.to_yaml()
    assert parse_plan(plan.to_yaml()) == plan
