"""The order of imports: each room may import the rooms below it, nothing imports upward, and there is no circle.

The order is stated here and nowhere else. `import` statements inside functions count like any other.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Rooms of one line do not import each other.
ORDER = (
    ("errors",),
    ("devices", "liveness"),
    ("kernels",),
    ("files", "config", "hub"),
    ("view", "sums"),
    ("layout",),
    ("models",),
    ("weights", "parallel", "data"),
    ("runs", "convert"),
    ("pretrained",),
    ("training", "inference"),
    ("costs", "evaluation", "serving"),
    ("experiments",),
    ("testing", "cli"),
    ("launch", "configs"),
)
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}
# Imports inside functions that must wait until they are wanted: kernels' backends need a device's packages, extras may
# not be installed, and a child process decides which of XLA's clients it loads.
LAZY = {
    "vocojax.kernels.interval_attention.api": ("vocojax.kernels.interval_attention",),
    "vocojax.kernels.rotary.api": ("vocojax.kernels.rotary",),
    "vocojax.data.sources": ("vocojax.data.sources.tfds.reader",),
    "vocojax.costs.kernels.gpu": ("vocojax.kernels",),
    "vocojax.costs.kernels.tpu": ("vocojax.kernels",),
    "vocojax.costs.steps.compiling": ("vocojax.training", "vocojax.parallel", "vocojax.costs"),
}
# Commands answer --help and a misspelt flag before they import what does the work.
LAZY_ROOMS = {"cli": ("vocojax.",)}


# Sources that exports carry to PyTorch: no modules of this package. tests/pretrained/torch says what they import.
CARRIED = ROOT / "vocojax" / "pretrained" / "torch"


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for path in sorted((ROOT / "vocojax").rglob("*.py")):
        if path.parent == CARRIED:
            continue
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path
    return found


MODULES = modules()


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """(module of this package that is imported, whether inside a function), of one file."""
    tree = ast.parse(path.read_text())
    inside = {id(node) for function in ast.walk(tree) if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
              for node in ast.walk(function)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            names = [full if (full := f"{node.module}.{alias.name}") in MODULES else node.module
                     for alias in node.names]
        else:
            continue
        yield from ((name, id(node) in inside) for name in names if name.split(".")[0] == "vocojax")


def room(module: str) -> str:
    """Returns the room of a module; the package's own `__init__` and the table of its old paths are in none."""
    return module.split(".")[1] if module not in ("vocojax", "vocojax._moved") else ""


@pytest.mark.parametrize("module", MODULES)
def test_rooms_import_the_rooms_below_them_only(module):
    for imported, lazy in imports(MODULES[module]):
        if not room(module) or not room(imported) or room(imported) == room(module):
            continue
        assert LEVEL[room(imported)] < LEVEL[room(module)], f"{module} imports {imported}, which is no room below it"
        allowed = LAZY.get(module) or LAZY_ROOMS.get(room(module), ())
        assert not lazy or imported.startswith(allowed), f"{module} hides its import of {imported}"


def test_nothing_goes_through_the_public_names():
    """They are lazy, so that an upward import could hide behind them; the version alone is read there."""
    through = {module for module, path in MODULES.items() if "vocojax" in {imported for imported, _ in imports(path)}}
    assert through == {"vocojax.cli.main", "vocojax.costs.steps.search"}


def test_every_room_has_its_place():
    assert {room(module) for module in MODULES} - {""} <= LEVEL.keys()
    scripts = [path for folder in ("launch", "configs") for path in (ROOT / folder).glob("*.py")]
    assert scripts and all(room(imported) in LEVEL for path in scripts for imported, _ in imports(path))


def test_there_is_no_circle():
    edges = {module: {imported for imported, _ in imports(path)} for module, path in MODULES.items()}
    finished: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail[trail.index(module):], module))
        if module not in finished:
            for imported in sorted(edges.get(module, ())):
                visit(imported, (*trail, module))
            finished.add(module)

    for module in edges:
        visit(module, ())


def test_lazy_imports_that_are_allowed_exist():
    for module, allowed in LAZY.items():
        assert any(lazy and imported.startswith(allowed) for imported, lazy in imports(MODULES[module])), module
