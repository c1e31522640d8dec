"""Soak: a grid of four notebooks on a tiny random model, killed at random moments until it has been killed
often enough.

    python -m benchmarks.soak [--kills 100] [--per-phase 20] [--seed 0]

What is killed (SIGKILL): the kernel of a notebook, Snakemake alone, or everything at once, as when a machine
goes down. When: in capture, in training, while a checkpoint is written, or anywhere. After each kill nothing
half done may look done: every result file and every stage's folder has to be sound. The grid is then started
again, and killed again, until it gets through; then its tables have to equal those of an undisturbed run
(times apart). A result that was there before a kill, of a notebook that had ended, and was made again counts
as redone. Writes benchmarks/results/soak.csv (a row per kill; where the file is there, the soak goes on from
it), and the tally as faults.csv beside it.
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
from collections.abc import Sequence
from itertools import count
from pathlib import Path

import pandas as pd
import psutil
from tqdm.auto import tqdm

from simdiff_utils.files import read_kept
from simdiff_utils.run import is_sound
from tests.helpers import build_tiny, build_tokenizer

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "soak.csv"
PHASES, VICTIMS = ("capture", "training", "checkpoint"), ("kernel", "snakemake", "everything")
SETTINGS = dict(
    n_samples=32,
    seq_len=64,
    n_validation=2,
    n_test=2,
    n_remove_grid="[2]",
    criteria="[cosine,masd]",
    n_remove=2,
    criterion="masd",
    recovery="[lora]",
    max_steps=12,
    micro_batch_size=1,
    max_length=64,
    learning_rate=0.01,
    prompt="w1 w2",
)
OF_RECOVERY = ("recovery", "max_steps", "micro_batch_size", "max_length", "learning_rate")  # of SETTINGS
SECRET = "hf_thisTokenIsASecret"  # in the environment of every run: no file may hold it
TIMES = ("second", "time", "peak", "mem", "date", "tokens_per_s", "speed")  # columns that no two runs share


class Grid:
    """One run folder, and the process that fills it."""

    def __init__(self, folder: Path, model: Path, text: Path, **settings: object) -> None:
        self.folder, self.settings = folder, SETTINGS | {"model": model, "text": text} | settings
        self.process: subprocess.Popen | None = None

    def start(self, *words: str) -> subprocess.Popen:
        """Snakemake in a session of its own, so that all it starts can be found."""
        config = [f"{name}={value}" for name, value in self.settings.items()]
        environment = os.environ | {
            "SIMDIFF_RUNS": str(self.folder),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "HF_TOKEN": SECRET,
        }
        self.started = time.time()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "snakemake", "--cores", "1", "--quiet", *words, "--config", *config],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            # a shell's background job, which this may be, ignores Ctrl-C, and so would all that it starts
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        return self.process

    def finish(self, *words: str) -> str:
        """Run to the end; what it said."""
        said, _ = self.start(*words).communicate()
        if self.process.returncode:
            raise RuntimeError(f"the grid did not get through:\n{said}")
        return said

    # ---- what is going on

    def phase(self) -> str | None:
        """What a notebook is doing, by what lies in the run folder: one of PHASES, or None for anything
        else."""
        models = [path for path in self.folder.glob("*") if path.name != "batch"]

        def found(*patterns: str) -> list[Path]:
            return [path for model in models for pattern in patterns for path in model.glob(pattern)]

        if found(".partial-*/*/.partial-*", ".partial-*/*/model"):
            return "checkpoint"  # being written, or written and being read again to be compared
        if found(".partial-*/capture-*"):
            return "capture"
        steps = [path for path in found("training-*/*.json") if path.exists()]
        return "training" if any(path.stat().st_mtime > self.started for path in steps) else None

    def passed(self, phase: str) -> bool:
        """Whether a phase of PHASES will not come any more."""
        notebook = {"capture": "01", "training": "04", "checkpoint": "04"}[phase]
        return any(name.split("/")[-1].startswith(notebook) for name in self.results())

    def wait_for(self, phase: str | None, delay: float) -> bool:
        """Until a phase is seen (None: at once) and `delay` seconds more; False where the grid ended before
        that."""
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
        """SIGKILL; False where there was no such process. Orphans of Snakemake run to their end before this
        returns."""
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

    # ---- what is there

    def results(self) -> dict[str, int]:
        """Result file -> when it was written (ns)."""
        return {
            path.relative_to(self.folder).as_posix(): path.stat().st_mtime_ns
            for path in self.folder.glob("batch/*/[0-9]*.json")
        }

    def finished(self) -> dict[str, int]:
        """Those of `results` whose notebook is not just being run: the proof is written by its last cell,
        before its end."""
        words = " ".join(word for process in self.processes() for word in _command(process))
        return {name: at for name, at in self.results().items() if name not in words}

    def half_done(self) -> list[str]:
        """What looks done and is not."""
        results = self.folder.glob("batch/*/[0-9]*.json")
        kept = [path.parent for path in self.folder.glob("*/*-*/result.json")]
        stages = [path for path in kept if path.parent.name != "batch" and not path.name[0].isdigit()]
        return [f"{path} is no whole result" for path in results if not read_kept(path)] + [
            f"{path} is not sound" for path in stages if not is_sound(path)
        ]

    def tables(self) -> dict[str, pd.DataFrame]:
        """Every table that the notebooks wrote, without the columns that hold times, and without 05, which
        measures them."""
        found = {}
        for path in sorted(self.folder.glob("*/0[!5]*/*.csv")):
            table = pd.read_csv(path)
            columns = [c for c in table.columns if not any(word in c for word in TIMES)]
            found[path.relative_to(self.folder).as_posix()] = table[columns]
        return found

    def equals(self, other: "Grid") -> bool:
        """The same tables with the same content."""
        mine, theirs = self.tables(), other.tables()
        if not mine or mine.keys() != theirs.keys():
            return False
        return all(mine[name].equals(theirs[name]) for name in mine)


def _is_kernel(process: psutil.Process) -> bool:
    return "ipykernel_launcher" in _command(process)


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _send(process: psutil.Process, which: int) -> None:
    try:
        process.send_signal(which)
    except psutil.NoSuchProcess:
        pass


def make_inputs(folder: Path, seed: int = 0) -> tuple[Path, Path]:
    """A random model of 6 layers, large enough that its phases last a moment, and a text that its tokenizer
    knows."""
    model, text = folder / "model", folder / "rows.txt"
    sizes = dict(hidden_size=128, intermediate_size=512, max_position_embeddings=128)
    build_tiny("llama", seed, **sizes).save_pretrained(model)
    build_tokenizer().save_pretrained(model)
    rows = [" ".join(f"w{3 + (i * i + j * j) % 60}" for j in range(120)) for i in range(120)]
    text.write_text("\n\n".join(rows), encoding="utf-8")
    return model, text


def soak(
    n_kills: int, per_phase: int, seed: int, undisturbed: Grid, folder: Path, output: Path
) -> pd.DataFrame:
    """Kill until there were enough; a row per kill, written after each grid, so that a soak that was stopped
    goes on.

    Args:
        n_kills: at least.
        per_phase: at least as many kills in each of PHASES.
        seed: of what is killed, and when.
        undisturbed: a finished grid, whose tables every other has to give.
        folder: where the others are made, and taken away.
        output: the CSV.
    """
    inputs = undisturbed.settings["model"], undisturbed.settings["text"]
    rows = pd.read_csv(output).to_dict("records") if output.exists() else []
    draw, first = random.Random(seed + len(rows)), 1 + max([row["grid"] for row in rows], default=0)

    def enough() -> bool:
        counts = Counter(row["phase"] for row in rows)
        return len(rows) >= n_kills and min(counts[phase] for phase in PHASES) >= per_phase

    with tqdm(total=n_kills, initial=len(rows), desc="kills", unit="kill") as bar:
        for number in count(first):
            if enough():
                return pd.DataFrame(rows)
            grid, before = Grid(folder / f"grid-{number}", *inputs), []
            while len(before) < 12 and not enough() and _go_on(grid, draw, rows, bool(before)):
                seen, there = grid.phase(), grid.finished()
                victim = _least(VICTIMS, [row["victim"] for row in rows], draw)
                if not grid.kill(victim):
                    continue
                row = {"kill": len(rows) + 1, "grid": number, "phase": seen or "other", "victim": victim}
                after = round(time.time() - grid.started, 1)
                rows.append(row | {"after_seconds": after, "half_done": len(grid.half_done())})
                before.append(there)
                bar.update()
            _finish(grid)
            final, equal = grid.results(), grid.equals(undisturbed)
            for row, there in zip(rows[len(rows) - len(before) :], before, strict=True):
                row["redone"] = sum(final[name] != at for name, at in there.items())
                row["went_on"] = "equal" if equal else "different"
            shutil.rmtree(grid.folder)
            pd.DataFrame(rows).to_csv(output, index=False)


def _go_on(grid: Grid, draw: random.Random, rows: list[dict], killed: bool) -> bool:
    """Run a grid until the next moment to kill; False where it got through before that."""
    while True:
        if grid.process is None or grid.process.poll() is not None:
            grid.start()
        ahead = [phase for phase in PHASES if not grid.passed(phase)]
        wanted = None  # any moment
        if ahead and draw.random() < 0.8:
            wanted = _least(ahead, [row["phase"] for row in rows], draw)
        longest = {"capture": 0.5, "training": 0.5, "checkpoint": 0.005, None: 10}[wanted]
        if grid.wait_for(wanted, draw.uniform(0, longest)):
            return True
        said, _ = grid.process.communicate()
        if not grid.process.returncode:
            return False
        # a second kernel that is killed in the same run makes that give up
        if not killed or rows[-1]["victim"] != "kernel":
            raise RuntimeError(f"the grid stopped by itself:\n{said}")


def _least(words: Sequence[str], so_far: list[str], draw: random.Random) -> str:
    """A word that came least often so far."""
    return min(words, key=lambda word: (so_far.count(word), draw.random()))


def _finish(grid: Grid) -> None:
    """Let a grid get through: as it runs, or started again."""
    if grid.process.poll() is None:
        grid.process.communicate()
    if grid.process.returncode:
        grid.finish()


def tally(log: pd.DataFrame) -> pd.DataFrame:
    """Per phase and victim: tries, recovered (went on to equal tables with nothing half done or redone),
    lost."""
    whole = (log["went_on"] == "equal") & (log["half_done"] == 0) & (log["redone"] == 0)
    table = log.assign(recovered=whole, lost=~whole).groupby(["phase", "victim"])
    return table.agg(
        tries=("kill", "size"), recovered=("recovered", "sum"), lost=("lost", "sum")
    ).reset_index()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--per-phase", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        undisturbed = Grid(folder / "undisturbed", *make_inputs(folder))
        undisturbed.finish()
        log = soak(given.kills, given.per_phase, given.seed, undisturbed, folder, given.output)
    table = tally(log)
    table.to_csv(given.output.with_name("faults.csv"), index=False)
    print(table.to_string(index=False))
    if table["lost"].any():
        sys.exit("Something was lost.")


if __name__ == "__main__":
    main()
