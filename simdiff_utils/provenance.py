"""Where runs lie, and with what and on what a result was made."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import psutil

from simdiff_utils.settings import repository_root

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
