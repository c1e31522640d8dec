"""Results: where runs lie, provenance, and the closing summary."""

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd
import psutil

from simdiff_utils.files import read_json
from simdiff_utils.settings import SimDiffError, repository_root

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
    return {"time": datetime.now(UTC).isoformat(timespec="seconds"), "python": platform.python_version(),
            "versions": versions, "git_revision": _git_revision(), "machine": describe_machine()}


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
    done = subprocess.run([git, "rev-parse", "--verify", "--quiet", "HEAD"], cwd=repository_root(),
                          capture_output=True, text=True)
    return done.stdout.strip() or None


def peak_memory_gib() -> float:
    """Largest resident memory of this process so far, in GiB (file pages of the weights included)."""
    status = Path("/proc/self/status")
    if status.exists():  # not getrusage: on Linux its maximum is inherited from the (large) process that started us
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 2**20
    import resource  # Unix only; macOS counts in bytes

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30


def run_fresh(module: str, arguments: list[str], what: str, **environment: str) -> object:
    """What a module of this package prints as its last line, JSON, when a fresh process runs it.

    Args:
        what: for the sentence, such as "the capture".
        environment: variables to set for it.

    Raises:
        SimDiffError: the process failed; its last line is in the sentence.
    """
    package_parent = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, (package_parent, os.environ.get("PYTHONPATH"))))
    done = subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": path} | environment)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise SimDiffError(f"{what} failed: {last}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def newest_results(root: Path) -> dict[str, Path]:
    """Folder of the newest result of each notebook, for the model that ran last; {notebook: folder}.

    Raises:
        SimDiffError: no notebook has finished under `root`.
    """
    finished = sorted(root.glob("*/[0-9][0-9]_*/result.json"), key=lambda path: path.stat().st_mtime)
    if not finished:
        raise SimDiffError(f"no notebook has finished under {root}; run `make workbook` first.")
    model_folder = finished[-1].parent.parent
    newest = {read_json(path)["notebook"]: path.parent for path in finished if path.parent.parent == model_folder}
    return dict(sorted(newest.items()))


def summarise(root: Path) -> str:
    """What the newest run made, in words: per notebook its headline, and where everything lies."""
    newest = newest_results(root)
    lines = [f"Results in {next(iter(newest.values())).parent}"]
    for notebook, folder in newest.items():
        result = read_json(folder / "result.json")
        lines.append(f"\n{notebook}  ({result['seconds']:.0f} s, peak memory {result['peak_memory_gib']:.1f} GiB)")
        lines += [f"  {name}: {value}" for name, value in result["headline"].items()]
        files = [path.name for path in sorted(folder.iterdir()) if path.suffix in (".csv", ".png")]
        lines.append(f"  tables and figures in {folder}: {', '.join(files)}")
    executed = sorted((root / "batch").glob("*/executed/*.ipynb"), key=lambda path: path.stat().st_mtime)
    if executed:
        lines.append(f"\nexecuted notebooks: {executed[-1].parent}")
    return "\n".join(lines)


def stored_table(name: str) -> pd.DataFrame:
    """A table as committed in the repository, by its path there: what the workbook measured, or what was published."""
    path = repository_root(Path(__file__)) / name
    if not path.exists():
        raise SimDiffError(f"{name} is not in {path.parent}; run the workbook from its repository.")
    return pd.read_csv(path, comment="#")


def publish_figures(root: Path, target: Path) -> None:
    """Copy the newest results' figures to `target`, each with its numbers as CSV under the settings that made them."""
    target.mkdir(exist_ok=True)
    for notebook, folder in newest_results(root).items():
        result = read_json(folder / "result.json")
        facts = {"notebook": notebook, **{name: result["origin"][name] for name in ("model", "text", "machine")},
                 "settings": {name: value for name, value in result["settings"].items() if name != "result_file"}}
        head = "".join(f"# {name}: {json.dumps(value, ensure_ascii=False)}\n" for name, value in facts.items())
        for picture in sorted(folder.glob("*.png")):
            numbers = picture.with_suffix(".csv")
            if numbers.exists():
                shutil.copy(picture, target / picture.name)
                (target / numbers.name).write_text(head + numbers.read_text(encoding="utf-8"), encoding="utf-8")


if __name__ == "__main__":
    try:
        print(summarise(Path(sys.argv[1]) if len(sys.argv) > 1 else runs_root()))
    except SimDiffError as error:
        sys.exit(f"simdiff: {error}")
