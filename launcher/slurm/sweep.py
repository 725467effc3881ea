"""Values that a job array varies: one run for each combination."""

import itertools
import json
from collections.abc import Sequence

from engine.plan_yaml import read_yaml
from omnivl.errors import UserError


def combinations(varied: Sequence[str]) -> list[tuple[str, ...]]:
    """Overrides of each run: every value of each field with every value of the others.

    Args:
        varied: ``path=[value, value ...]`` each, in YAML.

    Raises:
        UserError: No list of values.
    """
    fields = []
    for text in varied:
        path, equals, values = text.partition("=")
        tree = read_yaml(values, f"--vary {text!r}", numbered=False).tree if equals else None
        if not path or not isinstance(tree, list) or not tree:
            raise UserError(
                f"--vary: got {text!r}; allowed is a field and a list of values, e.g. "
                "stages.spatial.optimizer.lr=[1e-3, 3e-4]; write it in this form"
            )
        fields.append([f"{path}={json.dumps(value)}" for value in tree])
    return list(itertools.product(*fields))
