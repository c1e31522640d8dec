"""Soak: a grid of four notebooks on a tiny random model, killed at random moments until it has been killed often enough.

    python tests/benchmarks/soak.py [--kills 100] [--per-phase 20] [--seed 0]

What is killed (SIGKILL): the kernel of a notebook, Snakemake alone, or everything at once, as when a machine goes down.
When: in capture, in training, while a checkpoint is written, or anywhere. After each kill nothing half done may look
done: every result file and every stage's folder has to be sound. The grid is then started again, and killed again, until
it gets through; then its tables have to equal those of an undisturbed run (times apart). A result that was there before a
kill and was made again counts as redone. Writes tests/benchmarks/results/soak.csv (a row per kill) and prints the tally.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import pandas as pd
import psutil
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

from conftest import build_tiny, build_tokenizer  # noqa: E402

from simdiff_utils.files import read_kept  # noqa: E402
from simdiff_utils.runs import is_sound  # noqa: E402

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "tests" / "benchmarks" / "results" / "soak.csv"
PHASES, VICTIMS = ("capture", "training", "checkpoint"), ("kernel", "snakemake", "everything")
SETTINGS = dict(n_samples=32, seq_len=64, n_validation=2, n_test=2, n_remove_grid="[2]", criteria="[cosine,masd]", n_remove=2,
                criterion="masd", recovery="[lora]", max_steps=12, micro_batch_size=1, max_length=64, learning_rate=0.01,
                prompt="w1 w2")
SECRET = "hf_thisTokenIsASecret"  # in the environment of every run: no file may hold it
TIMES = ("second", "time", "peak", "mem", "date", "tokens_per_s")  # columns that no two runs share


class Grid:
    """One run folder, and the process that fills it."""

    def __init__(self, folder: Path, model: Path, text: Path, **settings: object) -> None:
        self.folder, self.settings = folder, SETTINGS | {"model": model, "text": text} | settings
        self.process: subprocess.Popen | None = None

    def start(self, *words: str) -> subprocess.Popen:
        """Snakemake in a session of its own, so that all it starts can be found."""
        config = [f"{name}={value}" for name, value in self.settings.items()]
        environment = os.environ | {"SIMDIFF_RUNS": str(self.folder), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
                                    "TOKENIZERS_PARALLELISM": "false", "HF_TOKEN": SECRET}
        self.started = time.time()
        self.process = subprocess.Popen([sys.executable, "-m", "snakemake", "--quiet", *words, "--config", *config], cwd=ROOT,
                                        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                        start_new_session=True)
        return self.process

    def finish(self, *words: str) -> str:
        """Run to the end; what it said."""
        said, _ = self.start(*words).communicate()
        if self.process.returncode:
            raise RuntimeError(f"the grid did not get through:\n{said}")
        return said

    # ---- what is going on -----------------------------------------------------------------------------------------

    def phase(self) -> str | None:
        """What a notebook is doing, by what lies in the run folder: one of PHASES, or None for anything else."""
        models = [path for path in self.folder.glob("*") if path.name != "batch"]
        if any(found for path in models for found in path.glob(".partial-*/*/.partial-*")):
            return "checkpoint"
        if any(found for path in models for found in path.glob(".partial-*/capture-*")):
            return "capture"
        begun = [found for path in models for found in path.glob("training-*/*.json")]
        if any(found.stat().st_mtime > self.started for found in begun if found.exists()):
            return "training"
        return None

    def wait_for(self, phase: str | None, delay: float) -> bool:
        """Until a phase is seen (None: at once) and `delay` seconds more; False where the grid ended before that."""
        while phase and self.process.poll() is None:
            try:
                if self.phase() == phase:
                    break
            except FileNotFoundError:
                continue  # moved into its place while it was looked at
            time.sleep(0.002)
        ends = time.monotonic() + delay
        while self.process.poll() is None and time.monotonic() < ends:
            time.sleep(0.01)
        return self.process.poll() is None

    def processes(self) -> list[psutil.Process]:
        """Snakemake and all that it started."""
        try:
            main = psutil.Process(self.process.pid)
            return [main, *main.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def kill(self, victim: str) -> bool:
        """SIGKILL; False where there was no such process. Orphans of Snakemake run to their end before this returns."""
        family = self.processes()
        kernels = [p for p in family if _is_kernel(p)]
        chosen = {"kernel": kernels, "snakemake": family[:1], "everything": family}[victim]
        for process in chosen:
            _send(process, signal.SIGKILL)
        if victim == "snakemake":
            psutil.wait_procs(family[1:], timeout=300)
        if victim != "kernel":
            self.process.communicate()
        return bool(chosen)

    # ---- what is there --------------------------------------------------------------------------------------------

    def results(self) -> dict[str, int]:
        """Result file -> when it was written (ns)."""
        return {path.relative_to(self.folder).as_posix(): path.stat().st_mtime_ns
                for path in self.folder.glob("batch/*/[0-9]*.json")}

    def half_done(self) -> list[str]:
        """What looks done and is not."""
        stages = [path for path in self.folder.glob("*/*-*") if path.is_dir() and (path / "result.json").exists()
                  and not path.name[0].isdigit() and path.parent.name != "batch"]
        return ([f"{path} is no whole result" for path in self.folder.glob("batch/*/[0-9]*.json") if not read_kept(path)]
                + [f"{path} is not sound" for path in stages if not is_sound(path)])

    def tables(self) -> dict[str, pd.DataFrame]:
        """Every table that the notebooks wrote, without the columns that hold times."""
        found = {}
        for path in sorted(self.folder.glob("*/[0-9]*/*.csv")):
            table = pd.read_csv(path)
            found[path.name] = table[[c for c in table.columns if not any(word in c for word in TIMES)]]
        return found

    def equals(self, other: "Grid") -> bool:
        """The same tables with the same content."""
        mine, theirs = self.tables(), other.tables()
        return bool(mine) and mine.keys() == theirs.keys() and all(mine[name].equals(theirs[name]) for name in mine)


def _is_kernel(process: psutil.Process) -> bool:
    try:
        return "ipykernel_launcher" in process.cmdline()
    except psutil.Error:
        return False


def _send(process: psutil.Process, which: int) -> None:
    try:
        process.send_signal(which)
    except psutil.NoSuchProcess:
        pass


def make_inputs(folder: Path) -> tuple[Path, Path]:
    """A random model of 6 layers, large enough that its phases last a moment, and a text that its tokenizer knows."""
    model, text = folder / "model", folder / "rows.txt"
    build_tiny("llama", hidden_size=128, intermediate_size=512, max_position_embeddings=128).save_pretrained(model)
    build_tokenizer().save_pretrained(model)
    rows = [" ".join(f"w{3 + (i * i + j * j) % 60}" for j in range(120)) for i in range(120)]
    text.write_text("\n\n".join(rows), encoding="utf-8")
    return model, text


def soak(n_kills: int, per_phase: int, seed: int, folder: Path) -> tuple[pd.DataFrame, int]:
    """Kill until there were enough; the log, a row per kill, and how many grids got through with equal tables."""
    model, text = make_inputs(folder)
    undisturbed = Grid(folder / "undisturbed", model, text)
    undisturbed.finish()
    draw, rows, n_equal = random.Random(seed), [], 0
    counts: Counter = Counter()
    with tqdm(total=n_kills, desc="kills", unit="kill") as bar:
        while len(rows) < n_kills or min(counts[phase] for phase in PHASES) < per_phase:
            grid, killed_here = Grid(folder / f"grid-{n_equal}", model, text), []
            while True:
                grid.start()
                enough = len(killed_here) >= 12 or (len(rows) >= n_kills and min(counts[p] for p in PHASES) >= per_phase)
                wanted = min(PHASES, key=lambda p: counts[p]) if draw.random() < 0.8 else None
                delay = draw.uniform(0, {"capture": 1, "training": 3, "checkpoint": 0.1}.get(wanted, 20))
                if enough or not grid.wait_for(wanted, delay):
                    said, _ = grid.process.communicate()
                    if grid.process.returncode:
                        raise RuntimeError(f"the grid stopped by itself:\n{said}")
                    break
                before, seen = grid.results(), grid.phase()
                victim = draw.choice(VICTIMS)
                if not grid.kill(victim):
                    continue
                if victim == "kernel":  # the run starts another one by itself
                    grid.process.communicate()
                redone = sum(grid.results().get(name) != at for name, at in before.items())
                rows.append({"kill": len(rows) + 1, "grid": n_equal, "phase": seen or "other", "victim": victim,
                             "after_seconds": round(time.time() - grid.started, 1), "half_done": len(grid.half_done()),
                             "redone": redone, "went_on": ""})
                counts[seen] += 1
                killed_here.append(rows[-1])
                bar.update()
                if victim == "kernel" and not grid.process.returncode:
                    break
            equal = grid.equals(undisturbed)
            for row in killed_here:
                row["went_on"] = "equal" if equal else "different"
            n_equal += 1
            shutil.rmtree(grid.folder)
    return pd.DataFrame(rows), n_equal


def tally(log: pd.DataFrame) -> pd.DataFrame:
    """Per phase and victim: tries, recovered (went on to equal tables with nothing half done or redone), lost."""
    whole = (log["went_on"] == "equal") & (log["half_done"] == 0) & (log["redone"] == 0)
    table = log.assign(recovered=whole, lost=~whole).groupby(["phase", "victim"])
    return table.agg(tries=("kill", "size"), recovered=("recovered", "sum"), lost=("lost", "sum")).reset_index()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--per-phase", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        log, _ = soak(given.kills, given.per_phase, given.seed, Path(folder))
    log.to_csv(given.output, index=False)
    print(tally(log).to_string(index=False))
    if tally(log)["lost"].any():
        sys.exit("Something was lost.")


if __name__ == "__main__":
    main()
