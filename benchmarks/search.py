"""Eight ways to choose the layers, on the same validation text: what each computes, how long it takes, what
it finds.

    python -m benchmarks.search benchmarks/results/search.csv [--minutes 90]

Every job is written down when it is done: started again, the script goes on where it stopped, and the table
is written from what there is; a file named `pause` in runs/benchmark-search makes it wait before the next
job. Measured: the alpha path, racing, the portfolio, greedy with racing, greedy with shared prefixes for the
smaller numbers of layers; each in the same process, one after the other. Derived, since a full pass of the
model without K layers costs the same whatever the layers: the published ternary search (its number of passes
times the mean of two measured passes), plain greedy, and greedy with shared prefixes (the layer-tokens and
head-tokens that it computes, times the seconds of each, fitted to the plain passes). One ternary search and a
step of plain greedy are also run in full, to show how far off deriving is.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from simdiff_utils import provenance
from simdiff_utils.capture import stage as capture
from simdiff_utils.criterion.candidates import Evidence
from simdiff_utils.criterion.equations import normalise
from simdiff_utils.criterion.propose import propose
from simdiff_utils.criterion.race import Evaluator
from simdiff_utils.criterion.search import greedy, search_ternary
from simdiff_utils.engine.perplexity import perplexity
from simdiff_utils.run import Run
from simdiff_utils.settings import Settings

MODELS = {"embedded:smollm2-135m-instruct": [3, 6, 9, 12], "embedded:gemma-3-270m": [2, 4, 6]}
FORMS = ("masd", "log-mssd")
DTYPE, N_BLOCKS, BATCH_SIZE, CONFIDENCE = "bfloat16", 64, 4, 0.99
COSTS = ("n_sets", "layer_tokens", "head_tokens", "seconds")
WAYS = {"shared": "greedy, shared prefixes", "racing": "greedy, shared prefixes, racing"}
FACTS = (*COSTS, "peak_gib", "removed", "loss")  # what the table takes of a job


class Bench:
    """One model, its ledger of finished jobs, and the clock."""

    def __init__(self, model: str, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.grid, self.folder, self.model = MODELS[model], folder, model
        self.path = folder / f"{model.split(':')[1]}.jsonl"
        rows = self.path.read_text().splitlines() if self.path.exists() else []
        self.ledger = {row["job"]: row for row in map(json.loads, rows)}
        self.run = Run(Settings(model=model, dtype=DTYPE, n_validation=N_BLOCKS, n_test=N_BLOCKS))
        self.n_layers, self.blocks = self.run.n_layers, self.run.blocks("validation")
        self.statistics = capture.statistics(self.run)

    def evaluator(self, blocks: torch.Tensor, kept: str = "") -> Evaluator:
        folder = self.folder / f"{self.model.split(':')[1]}-{kept}" if kept else None
        return Evaluator(self.run.decoder, blocks, BATCH_SIZE, folder)

    def job(self, name: str, work, evaluator: Evaluator) -> dict:
        """Do a job that is not in the ledger: `work` gives what is to be noted; time, cost and memory are
        added."""
        if name not in self.ledger:
            while (self.folder / "pause").exists():
                time.sleep(1)
            layers, heads = evaluator.cost.layer_tokens, evaluator.cost.head_tokens
            Path("/proc/self/clear_refs").write_text("5")  # the peak of memory starts anew
            started = time.perf_counter()
            found = work()
            row = dict(
                job=name,
                seconds=time.perf_counter() - started,
                peak_gib=provenance.peak_memory_gib(),
                layer_tokens=evaluator.cost.layer_tokens - layers,
                head_tokens=evaluator.cost.head_tokens - heads,
                **found,
            )
            with self.path.open("a") as opened:
                opened.write(json.dumps(row) + "\n")
                opened.flush()
                os.fsync(opened.fileno())
            self.ledger[name] = row
            print(name, {k: v for k, v in row.items() if k not in ("job", "losses")}, flush=True)
        return self.ledger[name]

    # ---- jobs

    def candidates(self, method: str, n_remove: int) -> list[frozenset[int]]:
        proposed = propose(method, Evidence(self.statistics), n_remove)
        return list(dict.fromkeys(candidate.removed for candidate in proposed))

    def race(self, method: str, n_remove: int, exact: bool) -> dict:
        sets, evaluator = self.candidates(method, n_remove), self.evaluator(self.blocks)

        def work() -> dict:
            winner = evaluator.race({0: sets}, CONFIDENCE, exact).winners[0]
            loss = float(evaluator.losses([winner]).mean())
            found = {"removed": sorted(winner), "n_sets": len(sets), "loss": loss}
            if exact:
                means = evaluator.losses(sets).mean(1).tolist()
                found["losses"] = [[sorted(s), mean] for s, mean in zip(sets, means, strict=True)]
            return found

        return self.job(f"{method}, K={n_remove}, {'exact' if exact else 'racing'}", work, evaluator)

    def plain_pass(self, n_remove: int, first: int) -> dict:
        evaluator = self.evaluator(self.blocks)
        removed = frozenset(range(first, first + n_remove))

        def work() -> dict:
            return {"loss": float(evaluator.losses([removed]).mean())}

        return self.job(f"pass, K={n_remove}, {first}", work, evaluator)

    def greedy_to(self, n_remove: int, exact: bool) -> None:
        """One job a step; the steps before are read from the folder and cost nothing."""
        evaluator = self.evaluator(self.blocks, "shared" if exact else "racing")
        for k in range(1, n_remove + 1):

            def work(k: int = k) -> dict:
                order = greedy(evaluator, k, confidence=CONFIDENCE, exact=exact)
                loss = float(evaluator.losses([frozenset(order)]).mean())
                return {"order": order, "loss": loss, "n_sets": self.n_layers - k + 1}

            self.job(f"greedy, {'shared' if exact else 'racing'}, step {k}", work, evaluator)

    def ternary_in_full(self, form: str, n_remove: int) -> None:
        def evaluate(removed: frozenset[int]) -> float:
            return perplexity(self.evaluator(self.blocks).losses([removed]))

        def work() -> dict:
            probes = search_ternary(*self.lines(form), n_remove, evaluate, remember=False)
            return best_probe(probes) | {"n_sets": len(probes)}

        counts_nothing = self.evaluator(self.blocks)  # each probe has an evaluator of its own
        self.job(f"{form}, K={n_remove}, ternary in full", work, counts_nothing)

    def greedy_step_in_full(self) -> None:
        """The first step of plain greedy: every layer alone, a full pass each."""

        def work() -> dict:
            losses = [
                self.evaluator(self.blocks).losses([frozenset({i})]).mean() for i in range(self.n_layers)
            ]
            return {"order": [int(np.argmin(losses))], "loss": float(min(losses)), "n_sets": self.n_layers}

        self.job("greedy, plain, step 1", work, self.evaluator(self.blocks))

    def test(self, sets: list[frozenset[int]]) -> dict[frozenset[int], float]:
        rows = [row for name, row in self.ledger.items() if name.startswith("test")]
        found = {frozenset(row["removed"]): row["perplexity"] for row in rows}
        evaluator = self.evaluator(self.run.blocks("test"))
        new = [removed for removed in dict.fromkeys(sets) if removed not in found]
        for removed, losses in zip(new, evaluator.losses(new), strict=True) if new else ():
            facts = {"removed": sorted(removed), "perplexity": perplexity(losses)}
            row = self.job(f"test {sorted(removed)}", lambda facts=facts: facts, evaluator)
            found[removed] = row["perplexity"]
        return found

    def lines(self, form: str) -> tuple[np.ndarray, np.ndarray]:
        return normalise(self.statistics.table(), form)

    # ---- the table

    def passes(self, n_remove: int | str) -> list[dict]:
        """The plain passes of the model without that many layers."""
        return [row for name, row in self.ledger.items() if name.startswith(f"pass, K={n_remove},")]

    def rates(self) -> tuple[float, float]:
        """Seconds of a full pass per layer, and of the rest of it, fitted to the plain passes."""
        removed = {int(name.split("=")[1].split(",")[0]) for name in self.ledger if name.startswith("pass")}
        passes = [(self.n_layers - k, row["seconds"]) for k in sorted(removed) for row in self.passes(k)]
        layer, rest = np.polyfit(*zip(*passes, strict=True), 1)
        return float(layer), float(rest)

    def seconds(self, layer_tokens: float, head_tokens: float) -> float:
        layer, rest = self.rates()
        return layer * layer_tokens / self.blocks.numel() + rest * head_tokens / self.n_predicted

    @property
    def n_predicted(self) -> int:
        """Head-tokens of a full pass."""
        return self.blocks.numel() - N_BLOCKS

    def row(self, k: int, form: str, contender: str, how: str, job: dict, **facts) -> dict:
        named = {"model": self.model, "n_remove": k, "form": form, "contender": contender, "how": how}
        return named | {name: job.get(name) for name in FACTS} | facts

    def rows(self) -> list[dict]:
        rows = []
        for k in self.grid:
            for form in FORMS:
                rows += [*self.derived_ternary(k, form), *self.measured_forms(k, form)]
            rows += [*self.derived_greedy(k), *self.measured_greedy(k)]
            if job := self.ledger.get(f"portfolio, K={k}, racing"):
                rows.append(self.row(k, "", "portfolio, racing", "measured", job))
        return [*rows, *self.first_steps()]

    def work_of(self, n_sets: int, k: int) -> dict:
        """Layer-tokens and head-tokens of full passes of sets of k layers."""
        layer_tokens = n_sets * (self.n_layers - k) * self.blocks.numel()
        return {"layer_tokens": layer_tokens, "head_tokens": n_sets * self.n_predicted}

    def derived_ternary(self, k: int, form: str) -> Iterator[dict]:
        exact, passes = self.ledger.get(f"{form}, K={k}, exact"), self.passes(k)
        if not (exact and passes):
            return
        known = {frozenset(removed): loss for removed, loss in exact["losses"]}
        probes = search_ternary(*self.lines(form), k, lambda removed: float(np.exp(known[removed])))
        answer = best_probe(probes) | {"peak_gib": max(row["peak_gib"] for row in passes)}
        seconds = float(np.mean([row["seconds"] for row in passes]))
        counts = {
            "ternary, as published": len(probes),
            "ternary, sets remembered": int((~probes["repeated"]).sum()),
        }
        for contender, n in counts.items():
            costs = {"n_sets": n, "seconds": n * seconds} | self.work_of(n, k)
            yield self.row(k, form, contender, "derived", answer, **costs)

    def measured_forms(self, k: int, form: str) -> Iterator[dict]:
        names = {
            "ternary, as published": "ternary in full",
            "alpha path": "exact",
            "alpha path, racing": "racing",
        }
        for contender, name in names.items():
            if job := self.ledger.get(f"{form}, K={k}, {name}"):
                # the evaluator of a ternary search in full counts nothing
                facts = self.work_of(job["n_sets"], k) if name == "ternary in full" else {}
                yield self.row(k, form, contender, "measured", job, **facts)

    def greedy_steps(self, way: str, k: int) -> list[dict]:
        """Ledger of k steps; shorter where some were not done."""
        steps = [self.ledger.get(f"greedy, {way}, step {step}") for step in range(1, k + 1)]
        return [step | {"removed": sorted(step["order"])} for step in steps if step]

    def derived_greedy(self, k: int) -> Iterator[dict]:
        if not self.passes(k):
            return
        found = [steps[-1] for way in WAYS if len(steps := self.greedy_steps(way, k)) == k]
        answer = {name: found[0][name] for name in ("removed", "loss")} if found else {}
        left = [self.n_layers - step for step in range(k)]  # layers of the model before each step
        # a step tries each layer: n passes of n - 1 layers, or with shared prefixes (n - 1)(n + 2) / 2 layers
        plain = sum(n * (n - 1) for n in left) * self.blocks.numel()
        shared = sum((n - 1) * (n + 2) // 2 for n in left) * self.blocks.numel()
        for contender, layers in (("greedy", plain), (WAYS["shared"], shared)):
            heads = sum(left) * self.n_predicted
            costs = {"n_sets": sum(left), "layer_tokens": layers, "head_tokens": heads}
            seconds = self.seconds(layers, heads)
            yield self.row(k, "", contender, "derived", answer, **costs, seconds=seconds)

    def measured_greedy(self, k: int) -> Iterator[dict]:
        for way, contender in WAYS.items():
            steps = self.greedy_steps(way, k)
            if len(steps) == k:
                total = {name: sum(step[name] for step in steps) for name in COSTS}
                peak = max(step["peak_gib"] for step in steps)
                yield self.row(k, "", contender, "measured", steps[-1], **total | {"peak_gib": peak})

    def first_steps(self) -> Iterator[dict]:
        """The first step of plain greedy: measured beside derived, to show how far off deriving is."""
        if job := self.ledger.get("greedy, plain, step 1"):
            work = self.work_of(self.n_layers, 1)
            for how, seconds in (("measured", job["seconds"]), ("derived", self.seconds(*work.values()))):
                facts = {"removed": job["order"], "seconds": seconds} | work
                yield self.row(1, "", "greedy", how, job, **facts)
            for step in self.greedy_steps("shared", 1):
                yield self.row(1, "", WAYS["shared"], "measured", step)


def best_probe(probes: pd.DataFrame) -> dict:
    best = probes.loc[probes["perplexity"].idxmin()]
    return {"removed": best["removed"], "loss": float(np.log(best["perplexity"]))}


def plan_jobs(benches: list[Bench]) -> list[Callable[[], object]]:
    """What is to be measured, in the order in which it is wanted."""
    small, other = benches
    jobs = []
    for bench in benches:
        jobs += [partial(bench.plain_pass, k, 0) for k in (0, bench.n_layers // 2)]
        for k in bench.grid:
            jobs += [partial(bench.plain_pass, k, first) for first in (5, bench.n_layers - k - 2)]
            jobs += [partial(bench.race, form, k, exact) for form in FORMS for exact in (True, False)]
            jobs.append(partial(bench.race, "portfolio", k, False))
    return [
        *jobs,
        partial(small.greedy_to, 3, True),
        small.greedy_step_in_full,
        partial(small.greedy_to, 6, False),
        partial(other.greedy_to, 2, False),
        partial(other.greedy_to, 2, True),
        partial(small.ternary_in_full, "masd", 6),
        partial(small.greedy_to, 12, False),
        partial(other.greedy_to, 6, False),
        partial(small.greedy_to, 6, True),
    ]


def tabulate(benches: list[Bench]) -> pd.DataFrame:
    """All rows, with the perplexity of each set on the test split."""
    rows = []
    for bench in benches:
        found = bench.rows()
        test = bench.test([frozenset(row["removed"]) for row in found if row["removed"]])
        for row in found:
            row["validation_perplexity"] = row["loss"] and float(np.exp(row["loss"]))
            row["test_perplexity"] = test[frozenset(row["removed"])] if row["removed"] else None
            row["arithmetic_seconds"] = bench.seconds(row["layer_tokens"], row["head_tokens"])
        rows += found
    table = pd.DataFrame(rows).drop(columns="loss")
    digits = {"seconds": 1, "arithmetic_seconds": 1, "peak_gib": 2}
    digits |= {"validation_perplexity": 2, "test_perplexity": 2}
    return table.astype(dict.fromkeys(digits, float)).round(digits)


def main(target: Path, minutes: float) -> None:
    deadline = time.monotonic() + 60 * minutes
    benches = [Bench(model, provenance.runs_root() / "benchmark-search") for model in MODELS]
    for bench in benches:  # loaded and warm before any clock runs
        bench.evaluator(bench.blocks[:BATCH_SIZE]).losses([frozenset()])
    for job in plan_jobs(benches):
        if time.monotonic() > deadline:
            break
        job()
    table, small = tabulate(benches), benches[0]
    origin = provenance.provenance()
    text = (
        f"# python -m benchmarks.search · {DTYPE}, {N_BLOCKS} x {small.blocks.shape[1]} validation and test "
        f"tokens of {small.run.corpus.label}, batch {BATCH_SIZE}, confidence of racing {CONFIDENCE}\n"
        f"# {origin['machine']} · torch {torch.__version__} · {origin['time']}\n"
        "# measured: run from beginning to end; derived: from measured passes, see the script. "
        "arithmetic_seconds: layer- and head-tokens times what each costs in a plain pass\n"
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text + table.to_csv(index=False), encoding="utf-8")
    print("wrote", target)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("target", type=Path)
    parser.add_argument("--minutes", type=float, default=600)
    main(**vars(parser.parse_args()))
