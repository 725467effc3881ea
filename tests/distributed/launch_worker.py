"""Entry point of a worker process of a distributed test: FILE FUNCTION ARGUMENTS.json RESULTS SECONDS.

Joins the process group, calls the function, stores what it returns, and leaves without interpreter shutdown.
"""

import faulthandler
import importlib.util
import json
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

from engine.hosts.process_group import finish, join_process_group


def main() -> None:
    file, function, arguments, results, seconds = sys.argv[1:]
    faulthandler.dump_traceback_later(float(seconds), exit=True)  # says where a worker hangs
    sys.path[:0] = [str(Path(file).parent), str(Path(__file__).parent)]
    torch.set_num_threads(1)
    try:
        join_process_group(timeout_seconds=60, always=True)
        spec = importlib.util.spec_from_file_location("worker_module", file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["worker_module"] = module
        spec.loader.exec_module(module)
        result = getattr(module, function)(**json.loads(Path(arguments).read_text()))
        torch.save(result, Path(results) / f"{dist.get_rank()}.pt")
    except BaseException:
        traceback.print_exc()
        finish(1)
    finish()


if __name__ == "__main__":
    main()
