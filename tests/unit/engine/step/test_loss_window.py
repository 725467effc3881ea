import json
import math

from engine.step.loss_window import LossWindow
from engine.step.report import StepResult


def result(loss: float, losses: dict[str, float], skipped: bool = False) -> StepResult:
    return StepResult(loss, losses, {"mlm/accuracy": 2 * loss}, 3.0, {"decay": 0.1}, skipped)


def test_window_means_over_the_steps_in_which_an_objective_was_active() -> None:
    window = LossWindow()
    window.add(result(1.0, {"mlm": 1.0}))
    window.add(result(math.nan, {"mlm": math.nan}, skipped=True))
    window.add(result(3.0, {"mlm": 2.0, "vlm": 5.0}))
    # loss (1 + 3) / 2; mlm (1 + 2) / 2; vlm 5 / 1; accuracy (2 + 6) / 2
    assert window.take() == {
        "loss": 2.0,
        "gradient_norm": 3.0,
        "losses": {"mlm": 1.5, "vlm": 5.0},
        "metrics": {"mlm/accuracy": 4.0},
    }
    assert window.take() == {}


def test_window_goes_on_from_its_state() -> None:
    steps = [result(loss, {"mlm": loss / 3}) for loss in (0.1, 0.7, 1e-9, 12.3)]
    whole, first = LossWindow(), LossWindow()
    for step in steps[:2]:
        whole.add(step)
        first.add(step)
    second = LossWindow(json.loads(json.dumps(first.state())))
    for step in steps[2:]:
        whole.add(step)
        second.add(step)
    assert second.take() == whole.take()
