"""The code of exported models, as files beside their weights: what ``auto_map`` in their configurations names.

transformers runs such code where it is asked to (``trust_remote_code=True``). It copies the files that a file imports
relatively, from one flat folder; so each module becomes one file, whose imports of this package are relative.
"""

import ast
import json
from importlib.util import find_spec
from pathlib import Path

ENTRY, ENTRY_FILE = "omnivl.hub", "modeling_omnivl"
"""The package that has all classes that configurations name, and its file. There is one, because transformers keeps the
code of each file that it is asked for apart: a model of one file would not know the configuration of another."""

_IMAGES = {"AutoImageProcessor": f"{ENTRY_FILE}.OmniVLImageProcessor"}
_PROCESSOR = {"AutoProcessor": f"{ENTRY_FILE}.OmniVLProcessor"}
_MODEL = {
    "AutoConfig": f"{ENTRY_FILE}.OmniVLConfig",
    "AutoModel": f"{ENTRY_FILE}.OmniVLModel",
    "AutoModelForZeroShotImageClassification": f"{ENTRY_FILE}.OmniVLModel",
}
_AUTO_MAPS = {"config.json": _MODEL, "processor_config.json": _PROCESSOR, "preprocessor_config.json": _IMAGES}
"""The classes that each configuration of a folder names, by the transformers class that asks for them."""

_OWN = ("omnivl", "moe")


def write_code(folder: Path) -> None:
    """Writes the modules that load and run an exported model, as flat files, and names them in the configurations.

    Args:
        folder: Of the model, with its configurations.
    """
    for name, classes in _AUTO_MAPS.items():
        said = json.loads((folder / name).read_text(encoding="utf-8")) | {"auto_map": classes}
        if "image_processor" in said:
            said["image_processor"]["auto_map"] = _IMAGES
        (folder / name).write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")
    for module, source in _closure().items():
        (folder / f"{_file_of(module)}.py").write_text(_relative(source), encoding="utf-8")


def _closure() -> dict[str, str]:
    """The entry and all modules of this package that it imports, with their sources."""
    found: dict[str, str] = {}
    waiting = [ENTRY]
    while waiting:
        module = waiting.pop()
        if module not in found:
            found[module] = _source(module)
            waiting += [node.module for node in _own_imports(found[module]) if node.module is not None]
    return found


def _source(module: str) -> str:
    spec = find_spec(module)
    assert spec is not None and spec.origin is not None, module
    return Path(spec.origin).read_text(encoding="utf-8")


def _own_imports(source: str) -> list[ast.ImportFrom]:
    """The imports of this package's modules, wherever they stand."""
    nodes = list(ast.walk(ast.parse(source)))
    plain = [name.name for node in nodes if isinstance(node, ast.Import) for name in node.names]
    assert not any(name.partition(".")[0] in _OWN for name in plain), f"{plain}: only 'from' imports can be relative"
    return [
        node for node in nodes if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in _OWN
    ]


def _relative(source: str) -> str:
    """The source with relative imports of this package's modules."""
    lines = source.splitlines(keepends=True)
    for node in _own_imports(source):
        assert node.module is not None
        line = lines[node.lineno - 1]
        lines[node.lineno - 1] = line.replace(f"from {node.module} import", f"from .{_file_of(node.module)} import", 1)
    return "".join(lines)


def _file_of(module: str) -> str:
    """Name of a module's file, without its ending."""
    return ENTRY_FILE if module == ENTRY else module.replace(".", "__")
