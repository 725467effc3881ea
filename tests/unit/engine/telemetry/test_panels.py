"""What figures of a run are called."""

import pytest

from engine.plan.schema import kinds
from engine.telemetry.panels import PANELS, figure_name, grouped, layer_name, panel_of
from omnivl.objectives import ObjectiveConfig


@pytest.mark.parametrize(
    ("key", "name", "panel"),
    [
        ("loss", "weighted total", "Losses"),
        ("losses/mlm", "MLM", "Losses"),
        ("losses/router/global_entropy_image", "router: global entropy image", "Losses"),
        ("metrics/univlc/text_to_visual_r1", "UniVLC: text to visual, R@1", "Accuracy within the batch"),
        ("metrics/mdm/pair_text_accuracy", "MDM: pair text accuracy", "Accuracy within the batch"),
        ("metrics/own_key/temperature", "own key: temperature", "Temperature"),
        ("metrics/router/experts_used_video", "video", "Experts used"),
        ("metrics/router/visual_05/largest_load", "visual layer 5", "Busiest expert over the mean, by layer"),
        ("lr/no_decay_x0.64", "weights without decay, x 0.64", "Learning rate"),
        ("lr/decay", "weights with decay", "Learning rate"),
        ("speed/data_wait", "waiting for data (of time)", "Share of the peak, share of time"),
        ("something_new", "something new", "Other figures"),
        ("metrics/a\nb/c", "a\nb: c", "Other metrics"),
    ],
)
def test_figures_have_names_and_a_panel(key: str, name: str, panel: str) -> None:
    assert figure_name(key) == name
    assert panel_of(key).title == panel


def test_no_objective_is_shown_by_its_key() -> None:
    for kind in kinds(ObjectiveConfig):
        for key in (f"losses/{kind}", f"metrics/{kind}/masked_fraction"):
            assert "_" not in figure_name(key)
            assert kind not in figure_name(key) or kind == "answer"


def test_figures_are_grouped_in_the_order_of_the_panels() -> None:
    found = grouped(["step", "skipped", "speed/mfu", "losses/b", "loss", "losses/a", "x"])
    assert [(panel.title, keys) for panel, keys in found] == [
        ("Losses", ("loss", "losses/a", "losses/b")),
        ("Share of the peak, share of time", ("speed/mfu",)),
        ("Other figures", ("x",)),
    ]
    assert len({panel.title for panel in PANELS}) == len(PANELS)


def test_layers_are_named_with_their_stack() -> None:
    assert [layer_name(one) for one in ("unified_11/visual", "text_00", "odd")] == [
        *("unified layer 11, visual", "text layer 0", "odd"),
    ]
