import pytest

from engine.step.schedule import learning_rate_factor


def test_warm_up_reaches_the_peak_in_its_last_step() -> None:
    factors = [learning_rate_factor(step, 10, schedule="constant", warmup_steps=4) for step in range(6)]
    assert factors == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_linear_falls_to_the_final_ratio() -> None:
    # 2 warm-up steps, 8 more: progress in step 6 is (6 - 2) / 8 = 0.5, hence 0.1 + 0.9 * 0.5 = 0.55.
    kwargs = {"schedule": "linear", "warmup_steps": 2, "final_ratio": 0.1}
    assert learning_rate_factor(2, 10, **kwargs) == 1.0  # type: ignore[arg-type]
    assert learning_rate_factor(6, 10, **kwargs) == pytest.approx(0.55)  # type: ignore[arg-type]
    assert learning_rate_factor(10, 10, **kwargs) == pytest.approx(0.1)  # type: ignore[arg-type]
    assert learning_rate_factor(99, 10, **kwargs) == pytest.approx(0.1)  # type: ignore[arg-type]


def test_cosine_is_symmetric_about_its_middle() -> None:
    # cos(pi / 4) = 0.70711: 0.5 * 1.70711 = 0.853553 at a quarter, 0.146447 at three quarters.
    assert learning_rate_factor(2, 8, schedule="cosine") == pytest.approx(0.8535534)
    assert learning_rate_factor(4, 8, schedule="cosine") == pytest.approx(0.5)
    assert learning_rate_factor(6, 8, schedule="cosine") == pytest.approx(0.1464466)


def test_a_stage_of_warm_up_only() -> None:
    assert learning_rate_factor(4, 5, schedule="cosine", warmup_steps=5) == 1.0
