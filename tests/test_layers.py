"""Imports point one way, and only the command line prints."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "src" / "podtree"

#: Lowest first. A module may import what stands above its own line, and its own line. The longest matching name counts.
LAYERS = (
    ("errors", "beside"),
    ("kernel",),
    ("script",),
    ("objects",),
    ("image", "volume"),
    ("tracees", "ties"),
    ("freeze", "mapcache", "collect", "diff", "pool"),
    ("pod.cgroup", "pod.containment", "pod.dirs", "pod.launch", "pod.live", "pod.paths", "pod.spec", "pod.wire"),
    ("checkpoint", "restore", "recorder"),
    ("pod", "doctor", "transfer"),
    ("api",),
    ("cli",),
)
#: Stricter than the order: who may import nothing else at all of podtree, besides itself.
ONLY = {
    "errors": set[str](),
    "kernel": set[str](),
    "script": {"errors", "kernel"},
    "objects": {"errors", "kernel", "script"},
    "volume": {"errors", "kernel"},
    "pool": {"errors", "kernel", "volume"},
    "recorder": {"errors", "pool"},
    "image": {"errors", "kernel", "objects"},
    "diff": {"errors", "kernel", "objects", "image"},
}
#: What the package's own `__init__` may name: the Python API, when it is asked for.
LAZY = {"": {"api"}}
WRITES = {"stdout", "stderr", "__stdout__", "__stderr__"}


def module_name(path: Path) -> str:
    """Dotted, without the package's own name; "" for the package itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def for_type_checkers(tree: ast.AST) -> set[int]:
    """The nodes below `if TYPE_CHECKING:`, by id: they import nothing when the program runs."""
    found: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            found |= {id(below) for part in node.body for below in ast.walk(part)}
    return found


def imports_of(path: Path) -> set[str]:
    """The modules of podtree that a file imports, wherever in it."""
    tree = ast.parse(path.read_text())
    skipped = for_type_checkers(tree)
    found = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name == "podtree" or name.startswith("podtree."):
                inner = name.removeprefix("podtree").removeprefix(".")
                found.add(inner if inner in MODULES else inner.rpartition(".")[0])
    return found


def layer_of(module: str) -> tuple[int, str]:
    """The number of a module's layer, and the name that put it there."""
    matching = [
        (len(name), number, name)
        for number, names in enumerate(LAYERS)
        for name in names
        if module == name or module.startswith(f"{name}.")
    ]
    assert matching, f"podtree.{module} is in no layer: give it one in LAYERS, and in docs/design.md"
    _, number, name = max(matching)
    return number, name


@pytest.mark.parametrize("module", [name for name in MODULES if name])
def test_imports_point_one_way(module: str) -> None:
    number, name = layer_of(module)
    for wanted in sorted(imports_of(MODULES[module])):
        if not wanted:  # podtree itself: its version
            continue
        other, other_name = layer_of(wanted)
        assert other <= number, f"podtree.{module} ({name}) imports podtree.{wanted} ({other_name}) from above it"
        if name in ONLY and other_name != name:
            assert other_name in ONLY[name], f"podtree.{module} imports podtree.{wanted}; {name} may not"


def test_the_package_itself_loads_nothing() -> None:
    assert imports_of(MODULES[""]) <= LAZY[""]


@pytest.mark.parametrize("module", [name for name in MODULES if not name.startswith("cli")])
def test_only_the_command_line_prints(module: str) -> None:
    """No print, no click, no sys.stdout but to flush it: the library raises and returns."""
    tree = ast.parse(MODULES[module].read_text())
    flushed = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr == "flush"}
    for node in ast.walk(tree):
        place = f"podtree.{module}, line {getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("print", "input"), f"{place}: {node.func.id}"
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "sys" and id(node) not in flushed:
            assert node.attr not in WRITES, f"{place}: sys.{node.attr}"
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            assert not any(name.split(".")[0] == "click" for name in names), f"{place}: click"


def test_the_order_is_the_one_of_the_design() -> None:
    """docs/design.md shows the layers in this order."""
    text = (PACKAGE.parent.parent / "docs" / "design.md").read_text()
    drawing = text.split("## Layers", 1)[1].split("\n\n    ", 1)[1].split("\n\n", 1)[0].splitlines()
    lines = {}
    for number, line in enumerate(drawing):
        for word in line.split():
            lines.setdefault(word.strip(",:"), number)
    names = ("errors", "kernel", "script", "objects", "image", "freeze", "checkpoint", "api", "cli")
    order = [lines[name] for name in names]
    assert order == sorted(order) and len(set(order)) == len(order)
