"""What of a chain a stage trains, as the start of the stage itself has it; for chains that are built to be counted."""

from engine.plan.plan import StagePlan
from engine.step.adapters import adapt
from engine.step.freeze import freeze, freeze_idle
from omnivl.chain.chain import Chain


def mark_trained(chain: Chain, stage: StagePlan) -> None:
    """Gives a chain of a stage its adapters, and marks its parameters as the stage trains them.

    Args:
        chain: Without adapters; also one without storage.
        stage: Its stage.

    Raises:
        UserError: ``freeze`` names nothing.
    """
    layouts = stage.layouts()
    adapt(chain, stage.lora, layouts=layouts, frozen=stage.freeze)
    freeze(chain, stage.freeze, f"stages.{stage.name}.freeze")
    freeze_idle(chain, layouts)
