"""The same grid on the local executor and on a Slurm cluster of one node, started for it: are the tables
equal?

    python -m benchmarks.slurm            (as root, with Debian's slurm-wlm and munge)

2 tiny random models x 4 criteria x 4 numbers of layers, notebooks 01 to 03. Prints how many tables were
compared (times aside) and how many differ.
"""

import sys
import tempfile
from pathlib import Path

from benchmarks.slurm_cluster import start_cluster, why_not
from benchmarks.soak import OF_RECOVERY, Grid, make_inputs

_PROFILE = "--workflow-profile workflow/profiles/slurm --slurm-status-command squeue --slurm-no-account"
SLURM = (*_PROFILE.split(), "--slurm-init-seconds-before-status-checks", "2")
CRITERIA, NUMBERS = ("cosine", "mssd", "masd", "relative"), (1, 2, 3, 4)


def make_grid(
    folder: Path, models: list[Path], text: Path, criteria: tuple[str, ...], numbers: tuple[int, ...]
) -> Grid:
    """A grid of 01 to 03 whose numbers are small; two models have names of their own."""

    def listed(values: object) -> str:
        return "[" + ",".join(map(str, values)) + "]"

    grid = Grid(folder, models[0], text)
    for name in OF_RECOVERY:
        del grid.settings[name]
    grid.settings |= {"model": listed(models), "criterion": listed(criteria)}
    grid.settings |= {"n_remove": listed(numbers), "n_remove_grid": listed(numbers)}
    return grid


def main() -> None:
    if reason := why_not():
        sys.exit(f"Skipped: {reason}.")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        models = []
        for seed in (0, 1):
            (folder / f"inputs{seed}").mkdir()
            model, text = make_inputs(folder / f"inputs{seed}", seed)
            models.append(model)
        local = make_grid(folder / "local", models, text, CRITERIA, NUMBERS)
        local.finish()
        with start_cluster(folder / "cluster"):
            slurm = make_grid(folder / "slurm", models, text, CRITERIA, NUMBERS)
            slurm.finish(*SLURM)
        mine, theirs = local.tables(), slurm.tables()
        alike = {name for name in mine.keys() & theirs.keys() if mine[name].equals(theirs[name])}
        differ = sorted((mine.keys() | theirs.keys()) - alike)
        print(
            f"{len(local.results())} notebook runs locally, {len(slurm.results())} on Slurm; "
            f"{len(mine)} tables compared, {len(differ)} differ{': ' if differ else ''}{', '.join(differ)}"
        )
        sys.exit(bool(differ))


if __name__ == "__main__":
    main()
