"""Which package may import which: no import runs upward or in a circle, at the top of a file or in a function."""

import ast
from pathlib import Path

import pmod_cli

ROOT = Path(pmod_cli.__file__).parent
LAYERS = (  # a package imports what stands in its own line or in one below it
    ("cli", "__main__", "commands"),
    ("training", "evaluation", "profiling", "visualization", "calibration", "serving", "reporting"),
    ("checkpoints", "data"),
    ("model",),
    ("families",),
    ("core", "paper", "recipe_files"),
)
HEIGHT = {name: -line for line, names in enumerate(LAYERS) for name in names}


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_of(path): path for path in sorted(ROOT.rglob("*.py")) if "bundled" not in path.parts}


def imports_of(module: str) -> set[str]:
    """Modules of the project that a module imports, wherever in it the import stands, `TYPE_CHECKING` included."""
    package = module if FILES[module].name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(FILES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level > 1 else package
            source = node.module if not node.level else f"{base}.{node.module}" if node.module else base
            # `from package import name`: a module of the package, or something that its `__init__` has.
            names = {f"{source}.{each.name}" for each in node.names}
            found |= {name if name in FILES else source for name in names}
    return {name for name in found if name in FILES and name != module}


GRAPH = {module: imports_of(module) for module in FILES}


def room_of(module: str) -> str | None:
    """The package below pmod_cli that a module is in; None for pmod_cli itself, which holds the version alone."""
    return module.split(".")[1] if "." in module else None


def test_every_package_has_a_place():
    assert {room_of(module) for module in FILES} - {None} <= HEIGHT.keys()
    assert not GRAPH["pmod_cli"]


def test_no_import_runs_upward():
    upward = [
        f"{module} imports {name}"
        for module, names in GRAPH.items()
        for name in names
        if room_of(module) and room_of(name) and HEIGHT[room_of(name)] > HEIGHT[room_of(module)]
    ]
    assert upward == []


def test_no_import_goes_in_a_circle():
    circles = [sorted(group) for group in strong_groups(GRAPH) if len(group) > 1]
    assert circles == []


def test_no_packages_import_each_other():
    rooms: dict[str, set[str]] = {room: set() for room in HEIGHT}
    for module, names in GRAPH.items():
        if room := room_of(module):
            rooms[room] |= {other for name in names if (other := room_of(name)) and other != room}
    assert [sorted(group) for group in strong_groups(rooms) if len(group) > 1] == []


def test_a_circle_is_found():
    assert [sorted(group) for group in strong_groups({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}})] == [
        ["a", "b", "c"],
        ["d"],
    ]


def strong_groups(graph: dict[str, set[str]]) -> list[set[str]]:
    """The groups whose members reach each other: a group of several is a circle."""
    reached = {start: _reached(graph, start) for start in graph}
    groups: list[set[str]] = []
    for start in graph:
        if not any(start in group for group in groups):
            groups.append({start} | {other for other in reached[start] if start in reached.get(other, ())})
    return groups


def _reached(graph: dict[str, set[str]], start: str) -> set[str]:
    found: set[str] = set()
    left = [start]
    while left:
        for name in graph.get(left.pop(), ()):
            if name not in found:
                found.add(name)
                left.append(name)
    return found
