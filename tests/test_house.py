"""The house itself: how large its rooms are, that imports point down, and that nothing runs in a circle."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "simdiff_utils"
FILES = sorted(PACKAGE.rglob("*.py"))
WIDTH, LONGEST, ENTRIES = 110, 260, 21
CODE_LINES = 7_770  # of the package, docstrings, comments and blank lines aside, and the exercises' answers
ANSWERS = "checks"
# From the ground up: a module or room may import those that stand before it, and others on its own floor that
# come before it in the line.
FLOORS = (
    ("__init__",),
    ("files", "registry", "provenance"),
    ("settings", "assets", "style", "results"),
    ("parameters", "engine", "text"),
    ("models",),
    ("run",),
    ("capture",),
    ("criterion",),
    ("pruning", "comparison"),
    ("recovery", "speed"),
    ("checks",),
    ("__main__",),
)
PLACE = {room: place for place, room in enumerate(room for floor in FLOORS for room in floor)}


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}


def imports_of(path: Path) -> set[str]:
    """Modules of the package that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "simdiff_utils":
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name in MODULES else node.module for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "simdiff_utils"}
    return found


def room_of(module: str) -> str:
    return (module.split(".") + ["__init__"])[1]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_file_is_short_and_narrow(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= LONGEST, f"{len(lines)} lines: split it by subject"
    assert max(map(len, lines), default=0) <= WIDTH


def count_code(path: Path) -> int:
    """Lines that are neither blank nor a comment nor part of a docstring."""
    text = path.read_text(encoding="utf-8")
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    first = [node.body[0] for node in ast.walk(ast.parse(text)) if isinstance(node, documented) and node.body]
    strings = [node for node in first if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)]
    words = {number for node in strings for number in range(node.lineno, node.end_lineno + 1)}
    lines = enumerate(map(str.strip, text.splitlines()), start=1)
    return sum(bool(line) and not line.startswith("#") and number not in words for number, line in lines)


def test_the_package_stays_small():
    assert sum(count_code(path) for path in FILES if path.parent.name != ANSWERS) <= CODE_LINES


def test_the_package_has_few_entries_at_its_top():
    entries = {path.relative_to(PACKAGE).parts[0] for path in FILES}
    assert len(entries) <= ENTRIES
    assert {entry.removesuffix(".py") for entry in entries} == set(PLACE)


def test_imports_point_down():
    arrows = {(module, other) for module, path in MODULES.items() for other in imports_of(path)}
    assert len(arrows) > 100, "nothing was read"
    upward = [
        f"{module} imports {other}"
        for module, other in sorted(arrows)
        if room_of(module) != room_of(other) and PLACE[room_of(other)] >= PLACE[room_of(module)]
    ]
    assert not upward


def test_nothing_imports_in_a_circle():
    """Also within a room: taking away, again and again, what imports nothing that is left leaves nothing."""
    left = {module: imports_of(path) - {module} for module, path in MODULES.items()}
    while free := [module for module, others in left.items() if not others & left.keys()]:
        for module in free:
            del left[module]
    assert not left


def test_pictures_and_stages_are_read_by_nobody_below():
    """A room's pictures are for its notebook alone."""
    users = [
        module for module, path in MODULES.items() if any(o.endswith(".plots") for o in imports_of(path))
    ]
    assert not users


def test_no_import_hides_inside_a_function_to_break_a_circle():
    hidden = []
    for module, path in MODULES.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for function in ast.walk(tree):
            if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
                for node in ast.walk(function):
                    if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("simdiff_utils"):
                        hidden.append(f"{module}.{function.name}: {node.module}")
    assert not hidden
