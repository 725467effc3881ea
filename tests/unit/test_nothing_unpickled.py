"""No program of this repository pickles or unpickles, by itself or by the functions of others that do."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
BY_OBJECT = {"all_gather_object", "broadcast_object_list", "gather_object", "scatter_object_list"}
BY_OBJECT |= {"send_object_list", "recv_object_list", "_tensor_to_object", "_object_to_tensor", "rpc_sync", "rpc_async"}
OF_MPI = {"bcast", "allgather", "alltoall", "sendrecv", "isend", "irecv", "ssend", "bsend"}
"""mpi4py's methods in lower case pickle; those that begin with a capital letter send buffers."""


def breaches(source: str, name: str = "file.py") -> Iterator[str]:
    """Every place that unpickles, or has others do so."""
    tree = ast.parse(source)
    mpi = "mpi4py" in source
    for node in ast.walk(tree):
        found = None
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names = [alias.name for alias in node.names]
            if any(one.split(".")[0] in MODULES for one in (*modules, *names)) or BY_OBJECT & set(names):
                found = ast.unparse(node)
        elif isinstance(node, ast.Attribute) and (node.attr in BY_OBJECT or (mpi and node.attr in OF_MPI)):
            found = node.attr
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            said = {word.arg: ast.unparse(word.value) for word in node.keywords}
            called = ast.unparse(node.func)
            unsafe_load = called == "torch.load" and said.get("weights_only") != "True"
            unsafe_array = called in ("np.load", "numpy.load") and said.get("allow_pickle") == "True"
            frames = node.func.attr in ("read_pickle", "to_pickle")
            found = called if unsafe_load or unsafe_array or frames else None
        if found is not None:
            yield f"{name}:{node.lineno}: {found}"  # type: ignore[attr-defined]


@pytest.mark.parametrize("folder", ["moe", "omnivl", "engine", "launcher", "benchmarks"])
def test_nothing_is_unpickled(folder: str) -> None:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    found = [one for file in files for one in breaches(file.read_text(encoding="utf-8"), str(file.relative_to(ROOT)))]
    assert found == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import multiprocessing.reduction, dill",
        "dist.all_gather_object(a, b)",
        "from torch.distributed import broadcast_object_list as send",
        "import torch\ntorch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "from mpi4py import MPI\nMPI.COMM_WORLD.bcast(1)",
        "frame = pandas.read_pickle(path)",
    ],
)
def test_each_way_is_found(source: str) -> None:
    assert len(list(breaches(source))) == 1
