"""What notebook 02 keeps on disk: losses of every set that was measured, and the set each criterion chose."""

import math
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd

from simdiff_utils import SimDiffError, registry, require
from simdiff_utils.capture import stage as capture
from simdiff_utils.criterion.candidates import Candidate, Evidence
from simdiff_utils.criterion.floating import Chain
from simdiff_utils.criterion.laco import Merges
from simdiff_utils.criterion.propose import count_passes, propose
from simdiff_utils.criterion.race import Evaluator, verdict
from simdiff_utils.engine.load import read_config
from simdiff_utils.engine.perplexity import perplexity, perplexity_interval
from simdiff_utils.engine.surgery import layer_kinds
from simdiff_utils.files import hash_facts, hash_file, read_kept, write_kept
from simdiff_utils.provenance import code_digest
from simdiff_utils.run import Run, check_n_remove, hash_blocks
from simdiff_utils.settings import SearchSettings

ROOM = "simdiff_utils.criterion"
GROUPS = (*capture.GROUPS, SearchSettings)


def evaluator(run: Run, split: str) -> Evaluator:
    """Losses of any sets of layers on a split; each is computed once, ever.

    They depend on the weights, the dtype, the tokens and the engine, and on nothing that chooses.
    """

    def make() -> Evaluator:
        blocks = run.blocks(split)
        key = {
            "model": run.checkpoint.sha256,
            "dtype": run.settings.dtype,
            "blocks": hash_blocks(blocks),
            "code": code_digest("simdiff_utils.engine"),
        }
        folder = run.folder / f"losses-{split}-{hash_facts(key)}"
        return Evaluator(run.decoder, blocks, run.settings.batch_size, folder)

    s = run.settings
    return run.once(("losses", split, s.dtype, s.seq_len, getattr(s, f"n_{split}")), make)


def losses(run: Run, split: str, removed: frozenset[int] = frozenset()) -> np.ndarray:
    """Losses per block of a split without a set of layers, float64 [n]."""
    return evaluator(run, split).losses([removed])[0]


def evidence(run: Run) -> Evidence:
    """What criteria may look at; model and validation text are loaded when one does."""
    beyond = [layer_idx for layer_idx in run.settings.protected if layer_idx >= run.n_layers]
    require(not beyond, f"protected names layers {beyond}, and the last layer is {run.n_layers - 1}.")
    return Evidence(
        capture.statistics(run),
        lambda: run.decoder,
        lambda: run.blocks("train"),
        lambda: evaluator(run, "validation"),
        run.settings.seed,
        kinds=layer_kinds(read_config(run.checkpoint.folder)) if run.settings.keep_pattern else (),
        **run.settings.of(SearchSettings, without=("n_validation", "keep_pattern")),
    )


def choices(run: Run, grid: list[int], criteria: list[str] | None = None) -> pd.DataFrame:
    """The set that each criterion removes, for each number of layers in `grid`; each is chosen once, ever.

    Args:
        criteria: names of the registry, or a user's own as "module:function"; None: those of the settings.

    Returns:
        one row per (n_remove, criterion): removed (sorted list), proposed_by (the part of the portfolio),
        low and high (the interval of alpha that chooses it; NaN where no alpha is involved), alpha (its
        middle), n_tied, merges (LaCo alone), n_candidates (distinct sets compared), n_passes (see
        `count_passes`), n_evaluations (perplexities asked for), validation_perplexity with the ends of its 95
        % interval, validation_low and validation_high.
    """
    criteria = run.settings.criteria if criteria is None else criteria
    wanted = {(k, criterion): choice_file(run, criterion, k) for k in grid for criterion in criteria}
    kept = {pair: read_kept(path) for pair, path in wanted.items()}
    missing = [pair for pair, row in kept.items() if row is None]
    if missing:
        seen = evidence(run)
        candidates = {(k, criterion): propose(criterion, seen, k) for k, criterion in missing}
        for pair, row in _choose(run, candidates).items():
            write_kept(wanted[pair], row)
            kept[pair] = read_kept(wanted[pair])
    table = pd.DataFrame(list(kept.values())).astype({"low": float, "high": float})
    table.insert(2, "alpha", (table["low"] + table["high"]) / 2)
    return table


def choice_file(run: Run, criterion: str, n_remove: int) -> Path:
    """Where a choice is kept; of a function that stands outside this room, the file is in the key."""
    own = {} if registry.find(criterion).function.startswith(f"{ROOM}.") else {"own": _hash_own(criterion)}
    folder = run.stage_folder("choices", ROOM, GROUPS, **own)
    return folder / f"{criterion.replace(':', '-')}-{n_remove}.json"


def _hash_own(criterion: str) -> str:
    registry.load(criterion)  # as its file is now; says in a sentence what is missing
    file = getattr(sys.modules[registry.find(criterion).function.partition(":")[0]], "__file__", None)
    return hash_file(Path(file)) if file else ""


def _choose(run: Run, candidates: dict[tuple[int, str], list[Candidate]]) -> dict[tuple[int, str], dict]:
    """The best candidate of each (n_remove, criterion) on the validation split, as it is kept."""
    measured, s = evaluator(run, "validation"), run.settings
    plain = {
        pair: [c.removed for c in found]
        for pair, found in candidates.items()
        if not any(c.edit for c in found)
    }
    winners = measured.race(plain, s.confidence, s.exact).winners  # edited models share no work: no race

    def losses_of(candidate: Candidate) -> np.ndarray:
        return measured.edited(candidate.edit).losses([candidate.removed])[0]

    rows = {}
    for pair, found in candidates.items():
        if pair in winners:
            winner = next(c for c in found if c.removed == winners[pair])
        else:
            winner = min(found, key=lambda c: losses_of(c).mean())
        values = losses_of(winner)
        low, high = perplexity_interval(values)
        rows[pair] = {
            "n_remove": pair[0],
            "criterion": pair[1],
            "removed": sorted(winner.removed),
            "proposed_by": winner.proposed_by,
            "low": _or_none(winner.low),
            "high": _or_none(winner.high),
            "n_tied": winner.n_tied,
            "merges": winner.edit.merges if winner.edit else [],
            "n_candidates": len({c.removed for c in found}),
            "n_passes": count_passes(pair[1], found, run.n_layers, pair[0]),
            "n_evaluations": len(found),
            "validation_perplexity": perplexity(values),
            "validation_low": low,
            "validation_high": high,
        }
    return rows


def steps(run: Run, criterion: str, n_remove: int) -> pd.DataFrame:
    """Perplexity over alpha as the step curve it is: the alpha path of a criterion, every set on every block.

    Returns:
        the rows of `trace_path` for n_remove, and validation perplexity with its interval: perplexity,
        perplexity_low, perplexity_high.
    """
    path = evidence(run).alpha_path(criterion)
    path = path[path["n_remove"] == n_remove].reset_index(drop=True)
    found = evaluator(run, "validation").losses([frozenset(removed) for removed in path["removed"]])
    low, high = np.array([perplexity_interval(values) for values in found]).T
    return path.assign(
        perplexity=[perplexity(values) for values in found], perplexity_low=low, perplexity_high=high
    )


def chain(run: Run, n_remove: int) -> pd.DataFrame:
    """The lazy greedy search on the validation split, step by step.

    Returns:
        one row per K, 0 to n_remove: n_remove, layer_idx (that this step removes; -1 for the dense model),
        perplexity of the set on all validation blocks, n_asked (sets whose losses were asked for so far).
    """
    measured, s = evaluator(run, "validation"), run.settings
    found = Chain(measured, n_remove, evidence(run).cuts, exact=s.exact)
    sets = [found.best[k] for k in range(n_remove + 1)]
    return pd.DataFrame(
        {
            "n_remove": range(n_remove + 1),
            "layer_idx": [-1, *(i for before, after in pairwise(sets) for i in after - before)],
            "perplexity": [perplexity(values) for values in measured.losses(sets)],
            "n_asked": found.n_asked,
        }
    )


def compare(run: Run, grid: list[int]) -> pd.DataFrame:
    """The choices on the test split, which chose nothing, against dense and against cosine distance alone.

    Returns:
        the rows of `choices`, and: test_perplexity, ratio (to dense), to_cosine (ratio to ShortGPT's
        perplexity at the same n_remove) with the ends of its paired 95 % bootstrap interval, to_cosine_low
        and to_cosine_high, and verdict (see `verdict`).
    """
    table, test, seen = choices(run, grid), evaluator(run, "test"), evidence(run)
    shortgpt = {k: propose("cosine", seen, k)[0].removed for k in grid}
    models = [(Merges.read(row.merges), frozenset(row.removed)) for row in table.itertuples()]
    plain = [frozenset(), *shortgpt.values(), *(removed for edit, removed in models if not edit)]
    known = dict(zip(plain, test.losses(plain), strict=True))  # all in one pass
    found = [test.edited(edit).losses([removed])[0] for edit, removed in models]
    base = [known[shortgpt[k]] for k in table["n_remove"]]
    pairs = list(zip(found, base, strict=True))
    intervals = np.array([perplexity_interval(values, b) for values, b in pairs])
    same = [model == (None, shortgpt[k]) for model, k in zip(models, table["n_remove"], strict=True)]
    table["test_perplexity"] = [perplexity(values) for values in found]
    table["ratio"] = table["test_perplexity"] / perplexity(known[frozenset()])
    table["to_cosine"] = [perplexity(values - b) for values, b in pairs]
    table["to_cosine_low"], table["to_cosine_high"] = intervals.T
    table["verdict"] = [verdict(*given) for given in zip(same, *intervals.T, strict=True)]
    return table


def chosen(run: Run) -> dict:
    """What `settings.criterion` chooses for `settings.n_remove`: a row of `choices`."""
    check_n_remove(run.settings.n_remove, run.n_layers)
    return choices(run, [run.settings.n_remove], [run.settings.criterion]).iloc[0].to_dict()


def removed(run: Run) -> frozenset[int]:
    """The set that `settings.criterion` removes for `settings.n_remove`; the layers that stay are
    unchanged."""
    choice = chosen(run)
    if choice["merges"]:
        raise SimDiffError(
            f"{run.settings.criterion} changes the weights of layers that stay, and only unchanged ones are "
            "exported; notebook 06 measures it: choose another criterion."
        )
    return frozenset(choice["removed"])


def _or_none(value: float) -> float | None:
    """JSON has no NaN."""
    return None if math.isnan(value) else value
