"""Targets: how many layers have to go for a size or a speed, or may go for a loss that can be borne."""

import pandas as pd

from simdiff_utils import SimDiffError
from simdiff_utils.criterion import stage as criterion
from simdiff_utils.engine.load import pick_device, pick_dtype, read_config
from simdiff_utils.engine.perplexity import perplexity, perplexity_interval
from simdiff_utils.engine.stored import StoredWeights
from simdiff_utils.engine.surgery import layers_removed
from simdiff_utils.engine.weights import skeleton
from simdiff_utils.files import read_json
from simdiff_utils.provenance import describe_machine
from simdiff_utils.run import Run
from simdiff_utils.settings import TARGET, ChoiceSettings, ReportSettings
from simdiff_utils.speed.bound import count_pass, ideal_seconds, measure_rates
from simdiff_utils.speed.generate import PROTOCOLS

ROOM = "simdiff_utils.speed"
GROUPS = (*criterion.GROUPS, ChoiceSettings, ReportSettings)
_PROTOCOL = PROTOCOLS["interactive"]


def gains(run: Run, grid: list[int] | None = None) -> pd.DataFrame:
    """What removing K layers gains, whichever they are; no weight is read.

    Where layers differ in size, the K smallest are meant: any others gain more.

    Returns:
        one row per K of `grid` (None: 0 to all but one): n_remove, params (parameters left), gib (of the
        stored weights left), decode_speedup (by the bound of `bound.count_pass` on this machine: a token of
        one sequence behind 512 + 64 others).
    """
    folder, dtype = run.checkpoint.folder, pick_dtype(run.settings.speed_dtype)
    model = skeleton(read_config(folder), dtype)
    stored = StoredWeights(folder, model)
    tensors = stored.tensors
    sizes = [sum(tensors[name].n_bytes for name in names) for names in stored.layers]
    numbers = [sum(tensors[name].n_parameters for name in names) for names in stored.layers]
    smallest = sorted(range(run.n_layers), key=lambda layer_idx: (sizes[layer_idx], layer_idx))
    rates = measure_rates(pick_device(), dtype)
    n_cached = _PROTOCOL.prompt_len + _PROTOCOL.n_new_tokens // 2

    def seconds(removed: frozenset[int]) -> float:
        with layers_removed(model, removed):
            return ideal_seconds(count_pass(model, batch_size=1, n_tokens=1, n_cached=n_cached), rates)

    rows, dense = [], seconds(frozenset())
    for n_remove in range(run.n_layers) if grid is None else grid:
        removed = smallest[:n_remove]
        rows.append(
            {
                "n_remove": n_remove,
                "params": sum(t.n_parameters for t in tensors.values()) - sum(numbers[i] for i in removed),
                "gib": (sum(t.n_bytes for t in tensors.values()) - sum(sizes[i] for i in removed)) / 2**30,
                "decode_speedup": dense / seconds(frozenset(removed)),
            }
        )
    return pd.DataFrame(rows)


def resolve(run: Run) -> tuple[Run, str]:
    """The run with the number of layers that `settings.target` asks for, and a sentence ("": no target).

    The smallest number for a size or a speed; for a perplexity the largest, by bisection on the validation
    split: the upper end of the (paired) 95 % interval has to lie within the target.

    Raises:
        SimDiffError: no number of layers reaches it; the sentence names the nearest that can be had.
    """
    if not run.settings.target:
        return run, ""

    def make(_folder) -> dict:
        quantity, bound, relative = parse(run.settings.target)
        find = _for_perplexity if quantity == "perplexity" else _for_gain
        n_remove, sentence = find(run, quantity, bound, relative)
        return {"n_remove": n_remove, "sentence": sentence}

    folder = run.stage("target", ROOM, GROUPS, make, machine=describe_machine())
    kept = read_json(folder / "result.json")
    return run.replace(n_remove=kept["n_remove"], target=""), kept["sentence"]


def parse(target: str) -> tuple[str, float, bool]:
    """Of such as "perplexity <= 1.5x": the quantity, the bound, and whether it is in units of the dense
    model's."""
    quantity, bound, times = TARGET.fullmatch(target).groups()
    return quantity, float(bound), bool(times)


def _for_gain(run: Run, quantity: str, bound: float, relative: bool) -> tuple[int, str]:
    table = gains(run).iloc[1:]
    if relative and quantity != "decode_speedup":  # a speedup is relative as it is
        bound *= gains(run, [0])[quantity].iloc[0]
    better = table[quantity] >= bound if quantity == "decode_speedup" else table[quantity] <= bound
    if not better.any():
        nearest = table.iloc[-1]
        raise SimDiffError(
            f"target = {run.settings.target} is out of reach: without {nearest['n_remove']:.0f} of "
            f"{run.n_layers} layers {quantity} is {nearest[quantity]:.4g}, the nearest that there is."
        )
    row = table[better].iloc[0]
    n_remove = int(row["n_remove"])
    return (
        n_remove,
        f"target {run.settings.target}: {n_remove} of {run.n_layers} layers go, and {quantity} is "
        f"{row[quantity]:.4g} (params {row['params']:.4g}, gib {row['gib']:.3g}, decode_speedup "
        f"{row['decode_speedup']:.3g} by the bound).",
    )


def _for_perplexity(run: Run, quantity: str, bound: float, relative: bool) -> tuple[int, str]:
    """Bisection: within the target at `low`, beyond it at `high`. Perplexity need not grow with every layer:
    a larger number that would do as well can be missed."""

    def measured(n_remove: int, split: str) -> tuple[float, float, float]:
        evaluator = criterion.evaluator(run, split)
        removed = criterion.choices(run, [n_remove], [run.settings.criterion]).iloc[0]["removed"]
        losses, dense = evaluator.losses([frozenset(removed), frozenset()])
        base = dense if relative else None
        return (perplexity(losses - dense if relative else losses), *perplexity_interval(losses, base))

    def words(values: tuple[float, float, float]) -> str:
        return f"{values[0]:.4g} (95 % interval {values[1]:.4g} to {values[2]:.4g})"

    low, high, known = 0, run.n_layers, {}
    while high - low > 1:
        middle = (low + high) // 2
        known[middle] = measured(middle, "validation")
        low, high = (middle, high) if known[middle][2] <= bound else (low, middle)
    unit = "times dense" if relative else ""
    if not low:
        raise SimDiffError(
            f"target = {run.settings.target} is out of reach: without one layer perplexity is {unit} "
            f"{words(known[1])} on the validation split, the nearest that there is."
        )
    test = measured(low, "test")
    confirmed = (
        "confirmed" if test[2] <= bound else "within reach of chance" if test[1] <= bound else "NOT so"
    )

    return (
        low,
        f"target {run.settings.target}: {low} of {run.n_layers} layers go by {run.settings.criterion}; "
        f"perplexity {unit} {words(known[low])} on the validation split, {words(test)} on the test split: "
        f"{confirmed} there. With {high}: {words(known[high]) if high in known else 'no layer is left'}.",
    )
