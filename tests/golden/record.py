"""Records the results of the golden plans (``tests/golden/recorded``), to which ``test_golden.py`` compares later code.

python tests/golden/record.py                           # what is not recorded yet
python tests/golden/record.py --replace limoe-plain     # these anew, whatever is recorded
python tests/golden/record.py --replace all

An existing record is only replaced if it is named. Every run is carried out twice, and nothing is written if the two
differ in a bit. A commit that replaces records names the change of the code that causes this.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from golden.runs import RUNS, Run, carry_out, deviations, first_difference, record_file, too_far, write_record


def main(arguments: Sequence[str] | None = None) -> int:
    names = [f"{model}-{host}" for run in RUNS for model, host in run.cases]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replace", nargs="+", default=[], metavar="MODEL-HOST", choices=["all", *names])
    replaced = parser.parse_args(arguments).replace
    for run in RUNS:
        wanted = [
            model
            for model, host in run.cases
            if "all" in replaced or f"{model}-{host}" in replaced or not record_file(model, host).exists()
        ]
        if wanted and not _record(run, wanted):
            return 1
    return 0


def _record(run: Run, models: Sequence[str]) -> bool:
    """Records some models of a run; returns whether the run came to the same twice."""
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        first, second = carry_out(run, Path(one)), carry_out(run, Path(other))
    for model in models:
        path = record_file(model, run.host)
        if too_far(deviations(second[model], first[model]), to_the_bit=True):
            told = first_difference(second[model], first[model])
            print(f"{path.name}: not recorded, as two runs differ, {told}", file=sys.stderr)
            return False
        existed = path.exists()
        path.parent.mkdir(exist_ok=True)
        write_record(path, first[model])
        print(f"{path.name}: {'replaced' if existed else 'recorded'}")
    return True


if __name__ == "__main__":
    sys.exit(main())
