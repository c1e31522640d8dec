"""Files and folders that appear whole or not at all, and their hashes."""

import contextlib
import errno
import functools
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from simdiff_utils import SimDiffError

os.umask(_UMASK := os.umask(0o077))  # it can only be read by setting it
_CANNOT_WRITE = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.EEXIST,
}


@contextlib.contextmanager
def write_whole(target: Path, replace: bool = True) -> Iterator[Path]:
    """Let the body make a file or a folder beside its final place; it moves to `target` only if the body
    succeeds.

    After an error or a kill nothing new stands at `target`. Several processes may write the same target at
    once.

    Args:
        target: final place of the file or folder.
        replace: put it in the place of an older one; otherwise one that appeared meanwhile stays.

    Yields:
        the path to write to; it does not exist yet.

    Raises:
        SimDiffError: the disk is full or cannot be written to.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for leftover in target.parent.glob(
            ".partial-*"
        ):  # of a process killed on the way, more than a day ago
            with contextlib.suppress(FileNotFoundError):  # another process may just be done with its own
                if (
                    time.time() - max(path.stat().st_mtime for path in (leftover, *leftover.rglob("*")))
                    > 86_400
                ):
                    shutil.rmtree(leftover, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=target.parent) as folder:
            partial = Path(folder) / target.name
            yield partial
            for file in (partial, *partial.rglob("*")):
                if file.is_file() and not file.is_symlink():  # safetensors' can be read by nobody else
                    file.chmod(file.stat().st_mode | 0o666 & ~_UMASK)
            _move(partial, target, replace, Path(folder) / "older")
    except (OSError, SafetensorError) as error:
        copying = isinstance(
            error, shutil.Error
        )  # of `copytree`: a list of all that went wrong, without an errno
        if isinstance(error, OSError) and error.errno not in _CANNOT_WRITE and not copying:
            raise  # of the body, and not about writing
        reason = error.args[0][0][2] if copying else getattr(error, "strerror", None) or error
        raise SimDiffError(
            f"cannot write {target.name} in {target.parent} ({reason}): make room "
            "there, or choose a folder that can be written to (SIMDIFF_RUNS for results, "
            "SIMDIFF_CACHE for embedded models and text)."
        ) from error


def _move(partial: Path, target: Path, replace: bool, older: Path) -> None:
    if target.is_dir():  # a folder that holds files cannot be replaced in one step: move the older one away
        if not replace:
            return
        with contextlib.suppress(FileNotFoundError):  # a parallel run moved it away first
            os.rename(target, older)
    try:
        os.replace(partial, target)
    except OSError:
        if not target.is_dir():
            raise  # else a parallel run was faster: its folder is as good


def check_disk(folder: Path, n_bytes: int, what: str) -> None:
    """Refuse to start writing what the disk cannot hold.

    Args:
        folder: where to; it need not exist yet.
        what: for the sentence, such as "the checkpoint".
    """
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < n_bytes:
        raise SimDiffError(
            f"{what} takes {n_bytes / 1e9:.1f} GB and {free / 1e9:.1f} GB are free in {existing}: "
            "make room there."
        )


def write_json(path: Path, data: dict) -> None:
    """Write a JSON file that appears whole or not at all."""
    with write_whole(path) as partial:
        partial.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict:
    """Read a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def write_kept(path: Path, data: dict) -> None:
    """Write a JSON file that `read_kept` can tell from a damaged one."""
    write_json(path, data | {"sha256": _hash_data(data)})


def read_kept(path: Path) -> dict | None:
    """Data of a file written by `write_kept`; None where there is none, or it was cut off or altered: make it
    again."""
    try:
        data = read_json(path)
        found = data.pop("sha256")
    except (OSError, ValueError, KeyError, AttributeError):
        return None
    return data if found == _hash_data(data) else None


def _hash_data(data: dict) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True, default=str).encode()).hexdigest()


def hash_facts(facts: dict) -> str:
    """12 hex digits of whatever JSON can say, the same for the same facts in any order."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]


def hash_file(path: Path) -> str:
    """sha256 of a file, read once per process and state of the file."""
    return _hash_file(path, path.stat().st_size, path.stat().st_mtime_ns)


@functools.lru_cache
def _hash_file(path: Path, _n_bytes: int, _mtime_ns: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def repository_root(start: Path | None = None) -> Path:
    """The folder that holds `pyproject.toml`, from anywhere inside the repository; else the working
    directory."""
    here = (start or Path.cwd()).resolve()
    for folder in (here, *here.parents):
        if (folder / "pyproject.toml").exists() and (folder / "simdiff_utils").is_dir():
            return folder
    return here
