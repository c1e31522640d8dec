"""Every way to choose the layers by losses: what each finds for a grid of K, and what it computes for that.

    python -m benchmarks.search smollm2 gemma qwen-0.5b [--blocks 16] [--contenders sleb lazy ...]
                                [--windows 16] [--data ../shared/data] [--every 2 3]

Each contender has an evaluator of its own and works through the grid from its largest K down, so that what
it has computed for one K serves the others. Its costs are cumulative: those of the first row are the largest
K alone, those of the last the whole grid. Nothing is derived: every contender runs from beginning to end, in
one process, one after another. One that is done is kept in runs/benchmark-search; started again, the script
goes on where it stopped.

Sets are chosen on validation text of Wikipedia; test text of Wikipedia and WikiText-2's test windows chose
nothing. --every: all sets of so few layers, on a slice of the validation text, and where each contender's set
stands among them (benchmarks/results/search_every.csv).
"""

import argparse
import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.comparison import EMBEDDED, write_rows
from simdiff_utils import provenance
from simdiff_utils.capture import stage as capture
from simdiff_utils.comparison.rows import windows
from simdiff_utils.criterion.candidates import Evidence
from simdiff_utils.criterion.equations import normalise
from simdiff_utils.criterion.floating import Chain
from simdiff_utils.criterion.propose import propose
from simdiff_utils.criterion.race import Evaluator
from simdiff_utils.criterion.search import greedy, search_ternary
from simdiff_utils.engine.perplexity import perplexity, perplexity_interval
from simdiff_utils.files import hash_facts, read_kept, write_kept
from simdiff_utils.registry import find
from simdiff_utils.run import Run
from simdiff_utils.settings import Settings

GRIDS = {"smollm2": [12, 9, 6, 3], "gemma": [6, 4, 2], "qwen-0.5b": [12, 8, 4], "qwen-1.5b": [12, 8]}
BATCH_SIZE, CONFIDENCE, SLICE = 4, 0.99, 4
# EvoPress (arXiv:2410.14649) as its example script sets it: random sets to begin with, offspring a
# generation, tokens of the first selection, survivors of it, layers exchanged at most, generations
# K (L - K) / 1.5; these would take hours, so that it stops where a K has cost BUDGET tokens through a layer
INITIAL, OFFSPRING, TOKENS, SURVIVORS, SWAPS, PER_GENERATION, BUDGET = 64, 32, 2048, 2, 3, 1.5, 8_000_000
RESULTS = Path("benchmarks/results")
Answers = Iterator[tuple[int, frozenset[int]]]


class Bench:
    """One model, its texts, and what a contender may look at."""

    def __init__(self, model: str, blocks: int, data: str, dtype: str) -> None:
        self.grid = GRIDS[model]
        settings = Settings(
            model=EMBEDDED[model],
            dtype=dtype,
            n_samples=64,
            n_validation=blocks,
            n_test=2 * blocks,
            batch_size=BATCH_SIZE,
            data_folder=data,
        )
        self.run = Run(settings)
        self.blocks, self.n_layers = self.run.blocks("validation"), self.run.n_layers
        self.statistics = capture.statistics(self.run)

    def evaluator(self) -> Evaluator:
        """A new one, which knows nothing."""
        return Evaluator(self.run.decoder, self.blocks, BATCH_SIZE)

    def evidence(self, evaluator: Evaluator) -> Evidence:
        return Evidence(self.statistics, evaluator=lambda: evaluator, confidence=CONFIDENCE)


# ---- contenders: each gives (K, the set) for a grid of K, the largest first


Contender = Callable[[Bench, Evaluator, list[int]], Answers]


def ternary(bench: Bench, evaluator: Evaluator, grid: list[int]) -> Answers:
    """Algorithm 1 with MASD, each probe a pass of its own."""
    for k in grid:

        def evaluate(removed: frozenset[int]) -> float:
            once = bench.evaluator()
            losses = once.losses([removed])
            evaluator.cost.layer_tokens += once.cost.layer_tokens
            evaluator.cost.head_tokens += once.cost.head_tokens
            evaluator.cost.n_sets += 1
            return perplexity(losses)

        lines = normalise(bench.statistics.table(), "masd")
        probes = search_ternary(*lines, k, evaluate, remember=False)
        yield k, frozenset(probes.loc[probes["perplexity"].idxmin(), "removed"])


def raced(criterion: str) -> Contender:
    """The sets that a criterion proposes, the best of them by racing."""

    def contend(bench: Bench, evaluator: Evaluator, grid: list[int]) -> Answers:
        for k in grid:
            sets = [candidate.removed for candidate in propose(criterion, bench.evidence(evaluator), k)]
            yield k, evaluator.race({0: sets}, CONFIDENCE).winners[0]

    return contend


def sleb(exact: bool) -> Contender:
    def contend(bench: Bench, evaluator: Evaluator, grid: list[int]) -> Answers:
        protected = find("sleb").protected(bench.n_layers)
        order = greedy(evaluator, grid[0], protected, confidence=CONFIDENCE, exact=exact)
        yield from ((k, frozenset(order[:k])) for k in grid)

    return contend


def lazy(_bench: Bench, evaluator: Evaluator, grid: list[int]) -> Answers:
    chain = Chain(evaluator, grid[0])
    yield from ((k, chain.best[k]) for k in grid)


def evolution(bench: Bench, evaluator: Evaluator, grid: list[int]) -> Answers:
    """EvoPress with the loss as its fitness (its option `ppl`): one parent; offspring exchange few layers;
    the best by few tokens meet the parent on all."""
    n_few = max(1, min(len(bench.blocks), TOKENS // bench.blocks.shape[1]))
    rng = np.random.default_rng(0)

    def best(sets: list[frozenset[int]], n_blocks: int, n_kept: int) -> list[frozenset[int]]:
        which = np.sort(rng.permutation(len(bench.blocks))[:n_blocks])
        losses = evaluator.losses(sets, which).mean(1)
        return [sets[i] for i in losses.argsort(kind="stable")[:n_kept]]

    for k in grid:
        end = evaluator.cost.layer_tokens + BUDGET
        drawn = [frozenset(rng.permutation(bench.n_layers)[:k].tolist()) for _ in range(INITIAL)]
        (parent,) = best(list(dict.fromkeys(drawn)), n_few, 1)
        for _ in range(int(k * (bench.n_layers - k) / PER_GENERATION)):
            if evaluator.cost.layer_tokens > end:
                break
            offspring: set[frozenset[int]] = set()
            while len(offspring) < OFFSPRING:
                n_swaps = min(*rng.integers(1, SWAPS + 1, 2), k, bench.n_layers - k)
                back = rng.permutation(sorted(parent))[:n_swaps].tolist()
                left = sorted({*range(bench.n_layers)} - parent)
                away = rng.permutation(left)[:n_swaps].tolist()
                offspring.add(parent - {*back} | {*away})
            survivors = best(sorted(offspring, key=sorted), n_few, SURVIVORS)
            (parent,) = best([parent, *survivors], len(bench.blocks), 1)
        yield k, parent


CONTENDERS: dict[str, Contender] = {  # criteria of the registry, raced, by their names; and others
    "masd": raced("masd"),
    "portfolio": raced("portfolio"),
    "sleb": sleb(exact=False),
    "floating": raced("floating"),
    "lazy": lazy,
    "masd, ternary": ternary,
    "sleb, exact": sleb(exact=True),
    "evolution": evolution,
}


def contend(bench: Bench, name: str, folder: Path) -> list[dict]:
    """A contender's answers with their cumulative costs; what was kept of an earlier run is read."""
    facts = {
        "weights": bench.run.checkpoint.sha256,
        "blocks": len(bench.blocks),
        "dtype": bench.run.settings.dtype,
        "machine": provenance.describe_machine(),
        "code": provenance.code_digest("simdiff_utils.criterion"),
        "engine": provenance.code_digest("simdiff_utils.engine"),
    }
    path = folder / f"{name.replace(', ', '-').replace(' ', '-')}-{hash_facts(facts)}.json"
    if kept := read_kept(path):
        return kept["rows"]
    evaluator, rows, spent = bench.evaluator(), [], 0.0
    answers = CONTENDERS[name](bench, evaluator, bench.grid)
    while True:
        started = time.perf_counter()
        answer = next(answers, None)
        spent += time.perf_counter() - started
        if answer is None:
            break
        costs = vars(evaluator.cost)
        rows.append({"contender": name, "n_remove": answer[0], "removed": sorted(answer[1])} | costs)
        rows[-1]["seconds"] = round(spent, 1)
        print(rows[-1], flush=True)
    write_kept(path, {"rows": rows})
    return rows


def judge(bench: Bench, rows: pd.DataFrame, n_windows: int) -> pd.DataFrame:
    """Perplexity of every set on the three texts, and its ratio to SLEB's with the paired 95 % interval."""
    folder = bench.run.folder / "benchmark-search"
    key = hash_facts({"dtype": bench.run.settings.dtype, "blocks": len(bench.blocks), "windows": n_windows})
    order = np.random.default_rng(0).permutation(len(windows(bench.run)))[:n_windows]
    texts = {
        "validation": (bench.blocks, BATCH_SIZE),
        "test": (bench.run.blocks("test"), BATCH_SIZE),
        "wikitext2": (windows(bench.run)[np.sort(order)], 1),
    }
    sets = [frozenset(removed) for removed in rows["removed"]]
    sleb_of = {
        row.n_remove: frozenset(row.removed) for row in rows.itertuples() if row.contender.startswith("sleb")
    }
    for name, (blocks, batch_size) in texts.items():
        kept = Evaluator(bench.run.decoder, blocks, batch_size, folder / f"{name}-{key}")
        known = dict(zip(sets, kept.losses(sets), strict=True))
        rows[f"{name}_perplexity"] = [round(perplexity(known[removed]), 3) for removed in sets]
        if sleb_of:
            pairs = [(known[s], known[sleb_of[k]]) for s, k in zip(sets, rows["n_remove"], strict=True)]
            ends = np.array([perplexity_interval(values, base) for values, base in pairs])
            rows[f"{name}_to_sleb"] = [round(perplexity(values - base), 4) for values, base in pairs]
            rows[f"{name}_to_sleb_low"], rows[f"{name}_to_sleb_high"] = ends.round(4).T
    return rows


def rank_among_all(bench: Bench, names: list[str], n_remove: int) -> pd.DataFrame:
    """All sets of n_remove layers on the first blocks, best first: the contenders' places among them (1: none
    is better)."""
    slice_ = Evaluator(
        bench.run.decoder, bench.blocks[:SLICE], BATCH_SIZE, bench.run.folder / f"every-{SLICE}"
    )
    sets = [frozenset(each) for each in itertools.combinations(range(bench.n_layers), n_remove)]
    losses = slice_.losses(sets).mean(1)
    found = []
    for name in names:
        ((_, removed),) = CONTENDERS[name](bench, bench.evaluator(), [n_remove])
        place = 1 + int((losses < losses[sets.index(removed)]).sum())
        found.append(
            {
                "contender": name,
                "n_remove": n_remove,
                "removed": sorted(removed),
                "place": place,
                "of": len(sets),
                "perplexity": round(float(np.exp(losses[sets.index(removed)])), 3),
                "lowest_perplexity": round(float(np.exp(losses.min())), 3),
                "best": sorted(sets[int(losses.argmin())]),
            }
        )
    return pd.DataFrame(found)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="+", choices=GRIDS)
    parser.add_argument("--blocks", type=int, default=16, help="of validation; twice as many of test")
    parser.add_argument("--windows", type=int, default=16, help="of WikiText-2's test split")
    parser.add_argument("--data", default="", help="folder with wikitext2/; empty: the hub")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--every", type=int, nargs="*", default=[], help="K of which all sets are evaluated")
    given = parser.parse_args()
    for model in given.models:
        bench = Bench(model, given.blocks, given.data, given.dtype)
        bench.evaluator().losses([frozenset()])  # loaded and warm before any clock runs
        folder = provenance.runs_root() / "benchmark-search" / model
        command = f"python -m benchmarks.search {model} --blocks {given.blocks} --windows {given.windows}"
        if given.contenders != list(CONTENDERS):
            command += f" --contenders {' '.join(map(repr, given.contenders))}"
        command += f" --dtype {given.dtype} --data DATA"
        rows = pd.DataFrame([row for name in given.contenders for row in contend(bench, name, folder)])
        rows = judge(bench, rows, given.windows).assign(model=bench.run.checkpoint.label)
        rows["dtype"] = bench.run.settings.dtype
        write_rows(rows, RESULTS / "search.csv", command)
        print(rows.drop(columns="model").to_string(), flush=True)
        if given.every:
            parts = [rank_among_all(bench, given.contenders, n_remove) for n_remove in given.every]
            every = pd.concat(parts, ignore_index=True).assign(model=bench.run.checkpoint.label)
            command += f" --every {' '.join(map(str, given.every))}"
            write_rows(every, RESULTS / "search_every.csv", command)
            print(every.to_string(), flush=True)


if __name__ == "__main__":
    main()
