"""``omnivl.load``: a trained stage for programs and notebooks."""

from pathlib import Path

from engine.disk.trained import find_trained, load_encoder
from engine.plan.evaluation import provided_in
from engine.processes.process_group import choose_device
from omnivl.api import Model
from omnivl.api.model import Origin
from omnivl.data.batch import is_label, is_video
from omnivl.inference.pictures import Media


def load(
    run: str | Path, *, stage: str | None = None, device: str | None = None, plan: str | Path | None = None
) -> Model:
    """Loads a trained stage.

    Args:
        run: A run's folder such as ``runs/quickstart``, a stage's, that of a checkpoint, or a ``.safetensors`` file.
        stage: Name of the stage; None takes the newest complete one.
        device: ``cpu``, ``cuda`` or ``cuda:N``; None takes a GPU where there is one.
        plan: The plan of weights that lie outside of a run.

    Returns:
        The stage in evaluation mode.

    Raises:
        UserError: There is no such run, stage or device, the stage is not complete, or its weights cannot be read.
    """
    trained = find_trained(Path(run).expanduser(), stage, None if plan is None else Path(plan).expanduser())
    encoder = load_encoder(trained, choose_device(device))
    stages = {one.name: provided_in(trained.plan, one) for one in trained.plan.stages}
    origin = Origin(trained.plan.name, trained.stage.name, trained.weights, trained.step)
    labelled = [one for one in trained.stage.data if is_label(one.kind)]
    prompts: dict[Media, tuple[str, ...]] = {
        "video" if is_video(one.kind) else "image": one.prompts for one in reversed(labelled)
    }
    return Model(encoder, origin, stages, prompts)
