"""Speed over depth: SmolLM2, Gemma-3-270M and the shapes of the paper's models, dense and pruned in turns.

    python -m benchmarks.speed smollm2 gemma qwen2.5-0.5b [--protocols interactive prefill] [--pairs 5]
    python -m benchmarks.speed self
    python -m benchmarks.speed llama3.1-8b --compiled --dtype bfloat16 --protocols paper --removed 12
    python -m benchmarks.speed llama3.1-8b --compiled --dtype bfloat16 --protocols paper --removed 4 6 8 10 \\
        --steps 8

`self` times a model against itself: every ratio has to be 1.00 within its interval. A shape has random
weights, made on the device; of speed they say the same. The pruned models share the dense one's weights.
Every (case, protocol, batch, way) is written to figures/05_speed_samples.csv (raw) and
figures/05_speed_depth.csv (summary beside the bound) as soon as it is there, with the machine and the
versions, and is not measured again unless --again is given. Needs torch and transformers, numpy, pandas and
scipy, and this package's core.
"""

import argparse
import sys
from contextlib import ExitStack
from dataclasses import replace
from itertools import product
from pathlib import Path

import pandas as pd
import torch
import transformers

from simdiff_utils import SimDiffError
from simdiff_utils.engine.load import decoder_layers, load_model, pick_device, pick_dtype
from simdiff_utils.files import write_whole
from simdiff_utils.models.checkpoints import resolve_checkpoint
from simdiff_utils.models.shapes import SHAPES, random_model
from simdiff_utils.provenance import describe_machine
from simdiff_utils.speed.bound import bound_phases, measure_rates
from simdiff_utils.speed.generate import PROTOCOLS
from simdiff_utils.speed.tables import describe_speed
from simdiff_utils.speed.timing import KEYS, measure_speed, summarise_speed, without_layers

EMBEDDED = {"smollm2": "embedded:smollm2-135m-instruct", "gemma": "embedded:gemma-3-270m"}
SAMPLES, DEPTH = "05_speed_samples.csv", "05_speed_depth.csv"
CASE = ["label", "protocol", "batch_size", "way", "n_timed_steps", "machine"]


def load(case: str, dtype: torch.dtype) -> torch.nn.Module:
    if case not in EMBEDDED:
        return random_model(case, dtype)
    return load_model(resolve_checkpoint(EMBEDDED[case]).folder, str(dtype).removeprefix("torch."))


def spread(n_layers: int, n_remove: int) -> frozenset[int]:
    """Layers spread over the model: which ones changes no time, but their kinds (sliding, full) should keep
    their share."""
    return frozenset(int((i + 0.5) * n_layers / n_remove) for i in range(n_remove))


def measure(case: str, given: argparse.Namespace) -> None:
    dtype = pick_dtype(given.dtype)
    dense = load(case, dtype)
    n_layers, device = len(decoder_layers(dense)), dense.device
    removed = given.removed or [round(n_layers * share) for share in (0.1, 0.2, 0.3, 0.4)]
    label = case if case in EMBEDDED else f"{case} (random weights)"
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else describe_machine()
    facts = dict(
        label=label,
        n_layers=n_layers,
        dtype=str(dtype).removeprefix("torch."),
        n_threads=torch.get_num_threads(),
        machine=machine,
        torch=torch.__version__,
        transformers=transformers.__version__,
    )
    rates = measure_rates(device, dtype)
    rate = f"{rates.bandwidth / 1e9:.1f} GB/s, {rates.matrix_rate / 1e9:.0f} GFLOP/s"
    print(f"{label}, {facts['dtype']}, {machine}: {rate}")
    facts |= dict(bandwidth=rates.bandwidth, matrix_rate=rates.matrix_rate, n_timed_steps=given.steps)
    ways = {"eager": False, "compiled": True} if given.compiled else {"eager": False}
    for name in given.protocols:
        for batch_size, way in product(given.batches or [PROTOCOLS[name].batch_size], ways):
            protocol = replace(PROTOCOLS[name], batch_size=batch_size, n_timed_steps=given.steps)
            key = facts | dict(protocol=name, batch_size=batch_size, way=way)
            todo = [n for n in removed if given.again or not is_there(key, n, given.figures / DEPTH)]
            if not todo:
                continue
            with ExitStack() as stack:  # the pruned models share the dense one's weights
                pruned = {
                    lacking: stack.enter_context(without_layers(dense, lacking))
                    for lacking in (spread(n_layers, n) for n in todo)
                }
                samples = measure_speed(dense, pruned, protocol, given.pairs, ways[way])
                models = {frozenset(): dense} | pruned
                bounds = [bound_phases(m, protocol, rates).assign(n_remove=len(s)) for s, m in models.items()]
            write(samples, pd.concat(bounds), facts | {"protocol": name}, given.figures)


def is_there(key: dict, n_remove: int, path: Path) -> bool:
    if not path.exists():
        return False
    table = pd.read_csv(path)
    same = (table[CASE] == pd.Series({name: key[name] for name in CASE})).all(axis=1)
    return bool((same & (table["n_remove"] == n_remove)).any())


def write(samples: pd.DataFrame, bounds: pd.DataFrame, here: dict, figures: Path) -> None:
    table = describe_speed(samples, bounds)
    together = " ".join(map(str, sorted(set(samples["n_remove"]))))  # timed in turns
    table["together"] = samples["together"] = together
    shown = ["tokens_per_s", "speedup", "speedup_low", "speedup_high", "ideal_speedup", "share_of_bound"]
    print(table[[*KEYS, *shown]].to_string(index=False), flush=True)
    for name, rows in ((SAMPLES, samples), (DEPTH, table)):
        path, rows = figures / name, rows.assign(**here)
        if path.exists():
            old, key = pd.read_csv(path), [*CASE, "together"]
            new = set(rows[key].astype(str).itertuples(index=False, name=None))
            stays = [k not in new for k in old[key].astype(str).itertuples(index=False, name=None)]
            rows = pd.concat([old[stays], rows])
        with write_whole(path) as partial:
            rows.to_csv(partial, index=False, float_format="%.6g")


def measure_self(given: argparse.Namespace) -> None:
    """The dense model against a second module tree on the same weights: a fair clock gives 1.00."""
    dense = load("smollm2", pick_dtype(given.dtype))
    with without_layers(dense, frozenset()) as same:
        samples = measure_speed(dense, {frozenset(): same}, PROTOCOLS["demo"], given.pairs)
    table = summarise_speed(samples)
    table = table[table["model"] == "pruned"]
    print(table[["phase", "n_pairs", "speedup", "speedup_low", "speedup_high"]].to_string(index=False))
    if not ((table["speedup_low"] <= 1) & (table["speedup_high"] >= 1)).all():
        sys.exit(
            "A model timed against itself is not 1.00 within its interval: the machine is busy, or the clock "
            "unfair."
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="+", choices=["self", *EMBEDDED, *SHAPES])
    parser.add_argument("--protocols", nargs="+", choices=PROTOCOLS, default=["interactive", "prefill"])
    parser.add_argument("--batches", nargs="+", type=int, help="a sweep (default: the protocol's own)")
    parser.add_argument(
        "--removed", nargs="+", type=int, help="numbers of layers (default: 10, 20, 30, 40 %%)"
    )
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument(
        "--steps", type=int, default=0, help="decode steps timed at each cache length; 0: all of them"
    )
    parser.add_argument("--dtype", default="auto")
    parser.add_argument(
        "--compiled", action="store_true", help="also with a static cache and a compiled step"
    )
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--figures", type=Path, default=Path("figures"))
    given = parser.parse_args()
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {pick_device()}")
    try:
        for case in given.cases:
            measure_self(given) if case == "self" else measure(case, given)
    except SimDiffError as error:
        sys.exit(f"simdiff: {error}")


if __name__ == "__main__":
    main()
