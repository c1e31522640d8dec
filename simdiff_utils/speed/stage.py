"""What notebook 05 keeps on disk: timings of the dense and the pruned model, the bound, the parts of a step,
memory."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path

import pandas as pd
import torch
from tqdm.auto import tqdm

from simdiff_utils.criterion import stage as criterion
from simdiff_utils.engine.load import load_model, pick_dtype
from simdiff_utils.files import read_json
from simdiff_utils.models.checkpoints import hash_checkpoint
from simdiff_utils.pruning.stage import pruned_checkpoint, removed_layers
from simdiff_utils.run import Run
from simdiff_utils.settings import ReportSettings, SpeedSettings
from simdiff_utils.speed.bound import bound_phases, measure_rates
from simdiff_utils.speed.draft import N_DRAFTED, measure_draft
from simdiff_utils.speed.generate import PROTOCOLS, Protocol
from simdiff_utils.speed.memory import measure_peak_memory
from simdiff_utils.speed.parts import time_parts
from simdiff_utils.speed.timing import measure_speed, without_layers

ROOM = "simdiff_utils.speed"
GROUPS = (SpeedSettings,)
_N_PROMPTS, _PROMPT_LEN, _N_DRAFT_TOKENS = 4, 64, 24


def protocols(run: Run) -> list[Protocol]:
    """The protocol named, with the values that the settings give: one for each batch size."""
    s, named = run.settings, PROTOCOLS[run.settings.protocol]
    named = replace(
        named,
        prompt_len=s.prompt_len or named.prompt_len,
        n_timed_steps=s.n_timed_steps,
        n_new_tokens=s.n_new_tokens or named.n_new_tokens,
    )
    return [replace(named, batch_size=size) for size in s.speed_batch_sizes or [named.batch_size]]


def measure(run: Run) -> Path:
    """The dense model, the pruned checkpoint, and sets of other sizes where they are asked for.

    The folder holds `samples.csv` (see `measure_speed`), `bounds.csv` (see `bound_phases`), `parts.csv` (see
    `time_parts`; of dense and pruned), `memory.csv` (see `measure_peak_memory`), and in `result.json` the
    rates of the machine.
    """
    pruned = pruned_checkpoint(run)

    def make(folder: Path) -> dict:
        s, dtype = run.settings, pick_dtype(run.settings.speed_dtype)
        removed = removed_layers(pruned)
        sets = [removed, *_other_sets(run, pruned, len(removed))]
        memory = _peak_memory(run, pruned, dtype)
        dense, exported = (load_model(path, s.speed_dtype) for path in (run.checkpoint.folder, pruned))
        with ExitStack() as shallow:
            others = [shallow.enter_context(without_layers(dense, other)) for other in sets[1:]]
            models = dict(zip(sets, [exported, *others], strict=True))
            ways = (False, True) if s.compiled else (False,)
            turns = [(protocol, compiled) for protocol in protocols(run) for compiled in ways]
            samples = [
                measure_speed(dense, models, protocol, s.n_pairs, way, s.seed) for protocol, way in turns
            ]
            rates = measure_rates(dense.device, dtype)
            bounds = [
                bound_phases(model, protocol, rates).assign(n_remove=len(lacking))
                for lacking, model in ({frozenset(): dense} | models).items()
                for protocol in protocols(run)
            ]
            parts = time_parts({"dense": dense, "pruned": exported}, protocols(run)[0])
        tables = {
            "samples": pd.concat(samples),
            "bounds": pd.concat(bounds),
            "parts": parts,
            "memory": memory,
        }
        for name, table in tables.items():
            table.to_csv(folder / f"{name}.csv", index=False)
        return {
            "dtype": str(dtype).removeprefix("torch."),
            "rates": asdict(rates),
            "removed": sorted(removed),
        }

    facts = {"pruned": hash_checkpoint(pruned), "seed": run.settings.seed}
    return run.stage("speed", ROOM, GROUPS, make, **facts)


def draft(run: Run) -> pd.DataFrame:
    """The pruned checkpoint as a draft of the dense model, on beginnings of test blocks: see
    `measure_draft`."""
    pruned = pruned_checkpoint(run)

    def make(folder: Path) -> dict:
        dense, exported = (
            load_model(path, run.settings.speed_dtype) for path in (run.checkpoint.folder, pruned)
        )
        prompts = run.blocks("test")[:_N_PROMPTS, :_PROMPT_LEN]
        measure_draft(dense, {"pruned": exported}, prompts[:1], N_DRAFTED)  # warm
        table = measure_draft(dense, {"pruned": exported}, prompts, _N_DRAFT_TOKENS)
        table.to_csv(folder / "draft.csv", index=False)
        return {"n_drafted": N_DRAFTED}

    facts = {"pruned": hash_checkpoint(pruned)}
    return pd.read_csv(run.stage("draft", ROOM, (*GROUPS, ReportSettings), make, **facts) / "draft.csv")


def _other_sets(run: Run, pruned: Path, n_removed: int) -> list[frozenset[int]]:
    """What the pruned checkpoint's criterion removes for the other numbers of layers in `speed_grid`."""
    name = read_json(pruned / "pruning.json")["criterion"]
    others = [k for k in run.settings.speed_grid if k != n_removed]
    return [frozenset(criterion.choices(run, [k], [name]).iloc[0]["removed"]) for k in others]


def _peak_memory(run: Run, pruned: Path, dtype: torch.dtype) -> pd.DataFrame:
    """One row a model; a process each, side by side, since only memory is asked for."""
    models = {"dense": run.checkpoint.folder, "pruned": pruned}
    with ThreadPoolExecutor() as pool:
        longest = protocols(run)[-1]
        jobs = {name: pool.submit(measure_peak_memory, path, dtype, longest) for name, path in models.items()}
        memory = {name: job.result() for name, job in tqdm(jobs.items(), desc="peak memory", unit="model")}
    return pd.DataFrame(memory).T.rename_axis("model").reset_index()
