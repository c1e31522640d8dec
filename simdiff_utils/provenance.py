"""Where runs lie, and with what code, on what machine a result was made."""

import ast
import functools
import hashlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import psutil

from simdiff_utils.files import repository_root

_LIBRARIES = ("torch", "transformers", "peft", "accelerate", "datasets", "simdiff-workbook")


def runs_root() -> Path:
    """Where stage folders lie: the environment variable SIMDIFF_RUNS, else `runs/` in the repository."""
    return Path(os.environ.get("SIMDIFF_RUNS") or repository_root() / "runs")


def provenance() -> dict:
    """When, with what and on what: time, library versions, git revision, machine (no name of it)."""
    versions = {}
    for library in _LIBRARIES:
        try:
            versions[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "versions": versions,
        "git_revision": _git_revision(),
        "machine": describe_machine(),
    }


def describe_machine() -> str:
    """Processor, cores and memory in words, for result tables."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = names[0].split(":", 1)[1].strip() if names else model
    memory_gib = psutil.virtual_memory().total / 2**30
    return f"{model}, {psutil.cpu_count()} cores, {memory_gib:.0f} GiB"


def _git_revision() -> str | None:
    git = shutil.which("git")
    if not git:
        return None
    done = subprocess.run(
        [git, "rev-parse", "--verify", "--quiet", "HEAD"],
        cwd=repository_root(),
        capture_output=True,
        text=True,
    )
    return done.stdout.strip() or None


def peak_memory_gib() -> float:
    """Largest resident memory of this process so far, in GiB (file pages of the weights included)."""
    status = Path("/proc/self/status")
    if (
        status.exists()
    ):  # not getrusage: on Linux its maximum is inherited from the (large) process that started us
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 2**20
    import resource  # Unix only; macOS counts in bytes

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30


# ---- the code behind a result --------------------------------------------------------------------


_PACKAGE = Path(__file__).parent


def code_files(module: str) -> list[Path]:
    """The files that what a room computes depends on: its own, and those of all rooms that it imports.

    A room is a folder of this package, or a module beside them. Pictures (`plots.py`) compute nothing, and of
    the settings it is the values that a key holds.

    Args:
        module: such as "simdiff_utils.capture"; "simdiff_utils" is all of it.
    """
    rooms = {path.stem for path in _PACKAGE.iterdir()} if module == "simdiff_utils" else {_room(module)}
    waiting = sorted(rooms)
    while waiting:
        imported = {_room(name) for file in _files_of(waiting.pop()) for name in _imports(file)}
        imported -= {*rooms, "settings"}
        waiting += imported
        rooms |= imported
    return sorted({file for room in rooms for file in _files_of(room)})


@functools.cache
def code_digest(module: str) -> str:
    """sha256 of the code of `code_files`, comments, docstrings and layout aside: they change no number."""
    digest = hashlib.sha256()
    for file in code_files(module):
        digest.update(file.relative_to(_PACKAGE).as_posix().encode())
        digest.update(_code_alone(file).encode() if file.suffix == ".py" else file.read_bytes())
    return digest.hexdigest()


def _room(module: str) -> str:
    return (module.split(".") + ["__init__"])[1]


def _files_of(room: str) -> list[Path]:
    """The room's files, its notes for other programs (lm-eval's task files) included."""
    if (_PACKAGE / f"{room}.py").is_file():
        return [_PACKAGE / f"{room}.py"]
    return [
        path
        for path in (_PACKAGE / room).rglob("*")
        if path.suffix in (".py", ".yaml") and path.stem != "plots"
    ]


def _imports(file: Path) -> set[str]:
    """Modules of this package that a file imports, wherever in it."""
    if file.suffix != ".py":
        return set()
    named = _read_code(file, file.stat().st_mtime_ns)[0]
    return {name for name in named if name.startswith("simdiff_utils.") and _files_of(_room(name))}


def _code_alone(file: Path) -> str:
    """The syntax tree of a file without its docstrings, hashed."""
    return _read_code(file, file.stat().st_mtime_ns)[1]


@functools.cache
def _read_code(file: Path, _mtime_ns: int) -> tuple[frozenset[str], str]:
    """What a file imports, and the hash of its code: parsed once for all rooms."""
    tree, found = ast.parse(file.read_text(encoding="utf-8")), set()
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            if isinstance(body[0].value, ast.Constant) and isinstance(body[0].value.value, str):
                del body[0]
        elif isinstance(node, ast.ImportFrom) and node.module == "simdiff_utils":
            found |= {f"simdiff_utils.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return frozenset(found), hashlib.sha256(ast.dump(tree).encode()).hexdigest()
