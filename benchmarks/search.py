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
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from simdiff_utils.stages import Run

from simdiff_utils import provenance
from simdiff_utils.criterion.equations import normalise
from simdiff_utils.criterion.propose import METHODS, Evidence
from simdiff_utils.criterion.race import Evaluator
from simdiff_utils.criterion.search import greedy, search_ternary
from simdiff_utils.engine.perplexity import perplexity
from simdiff_utils.settings import Settings

MODELS = {"embedded:smollm2-135m-instruct": [3, 6, 9, 12], "embedded:gemma-3-270m": [2, 4, 6]}
FORMS = ("masd", "log-mssd")
DTYPE, N_BLOCKS, BATCH_SIZE, CONFIDENCE = "bfloat16", 64, 4, 0.99


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
        self.statistics = self.run.statistics()

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
            row = {
                "job": name,
                "seconds": time.perf_counter() - started,
                "peak_gib": provenance.peak_memory_gib(),
                "layer_tokens": evaluator.cost.layer_tokens - layers,
                "head_tokens": evaluator.cost.head_tokens - heads,
            } | found
            with self.path.open("a") as opened:
                opened.write(json.dumps(row) + "\n")
                opened.flush()
                os.fsync(opened.fileno())
            self.ledger[name] = row
            print(name, {k: v for k, v in row.items() if k not in ("job", "losses")}, flush=True)
        return self.ledger[name]

    # ---- jobs ------------------------------------------------------------------------------------

    def candidates(self, method: str, n_remove: int) -> list[frozenset[int]]:
        return list(
            dict.fromkeys(c.removed for c in METHODS[method].propose(Evidence(self.statistics), n_remove))
        )

    def race(self, method: str, n_remove: int, exact: bool) -> dict:
        sets, evaluator = self.candidates(method, n_remove), self.evaluator(self.blocks)

        def work() -> dict:
            winner = evaluator.race({0: sets}, CONFIDENCE, exact).winners[0]
            found = {
                "removed": sorted(winner),
                "n_sets": len(sets),
                "loss": float(evaluator.losses([winner]).mean()),
            }
            if exact:
                means = evaluator.losses(sets).mean(1).tolist()
                found["losses"] = [[sorted(s), mean] for s, mean in zip(sets, means, strict=True)]
            return found

        return self.job(f"{method}, K={n_remove}, {'exact' if exact else 'racing'}", work, evaluator)

    def plain_pass(self, n_remove: int, first: int) -> dict:
        evaluator = self.evaluator(self.blocks)
        removed = frozenset(range(first, first + n_remove))
        return self.job(
            f"pass, K={n_remove}, {first}",
            lambda: {"loss": float(evaluator.losses([removed]).mean())},
            evaluator,
        )

    def greedy_to(self, n_remove: int, exact: bool) -> None:
        """One job a step; the steps before are read from the folder and cost nothing."""
        evaluator = self.evaluator(self.blocks, "shared" if exact else "racing")
        for k in range(1, n_remove + 1):

            def work(k: int = k) -> dict:
                order = greedy(evaluator, k, confidence=CONFIDENCE, exact=exact)
                return {
                    "order": order,
                    "loss": float(evaluator.losses([frozenset(order)]).mean()),
                    "n_sets": self.n_layers - k + 1,
                }

            self.job(f"greedy, {'shared' if exact else 'racing'}, step {k}", work, evaluator)

    def ternary_in_full(self, form: str, n_remove: int) -> None:
        def evaluate(removed: frozenset[int]) -> float:
            return perplexity(self.evaluator(self.blocks).losses([removed]))

        def work() -> dict:
            probes = search_ternary(*self.lines(form), n_remove, evaluate, remember=False)
            best = probes.loc[probes["perplexity"].idxmin()]
            return {
                "removed": best["removed"],
                "loss": float(np.log(best["perplexity"])),
                "n_sets": len(probes),
            }

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
        found = {
            frozenset(row["removed"]): row["perplexity"]
            for name, row in self.ledger.items()
            if name.startswith("test")
        }
        evaluator = self.evaluator(self.run.blocks("test"))
        new = [s for s in dict.fromkeys(sets) if s not in found]
        if new:
            losses = dict(zip(new, evaluator.losses(new), strict=True))
            for s in new:
                row = self.job(
                    f"test {sorted(s)}",
                    lambda s=s: {"removed": sorted(s), "perplexity": perplexity(losses[s])},
                    evaluator,
                )
                found[s] = row["perplexity"]
        return found

    def lines(self, form: str) -> tuple[np.ndarray, np.ndarray]:
        return normalise(self.statistics.table(), form)

    # ---- the table -------------------------------------------------------------------------------

    def rates(self) -> tuple[float, float]:
        """Seconds of a full pass per layer, and of the rest of it, fitted to the plain passes."""
        passes = [
            (self.n_layers - int(name.split("=")[1].split(",")[0]), row["seconds"])
            for name, row in self.ledger.items()
            if name.startswith("pass")
        ]
        layer, rest = np.polyfit(*zip(*passes, strict=True), 1)
        return float(layer), float(rest)

    def seconds(self, layer_tokens: float, head_tokens: float) -> float:
        layer, rest = self.rates()
        n_tokens = self.blocks.numel()
        return layer * layer_tokens / n_tokens + rest * head_tokens / (n_tokens - N_BLOCKS)

    def rows(self) -> list[dict]:
        rows, head, n_tokens = [], N_BLOCKS * (self.blocks.shape[1] - 1), self.blocks.numel()

        def add(k: int, form: str, contender: str, how: str, job: dict, **facts) -> None:
            rows.append(
                {"model": self.model, "n_remove": k, "form": form, "contender": contender, "how": how}
                | {
                    name: job.get(name)
                    for name in (
                        "n_sets",
                        "layer_tokens",
                        "head_tokens",
                        "seconds",
                        "peak_gib",
                        "removed",
                        "loss",
                    )
                }
                | facts
            )

        for k in self.grid:
            one_pass = [
                row["seconds"] for name, row in self.ledger.items() if name.startswith(f"pass, K={k},")
            ]
            peak = max(
                (row["peak_gib"] for name, row in self.ledger.items() if name.startswith(f"pass, K={k},")),
                default=None,
            )
            for form in FORMS:
                exact = self.ledger.get(f"{form}, K={k}, exact")
                if exact and one_pass:
                    known = {frozenset(s): loss for s, loss in exact["losses"]}
                    probes = search_ternary(
                        *self.lines(form), k, lambda s, known=known: float(np.exp(known[s]))
                    )
                    best = probes.loc[probes["perplexity"].idxmin()]
                    answer = {
                        "removed": best["removed"],
                        "loss": float(np.log(best["perplexity"])),
                        "peak_gib": peak,
                    }
                    for contender, n in (
                        ("ternary, as published", len(probes)),
                        ("ternary, sets remembered", int((~probes["repeated"]).sum())),
                    ):
                        add(
                            k,
                            form,
                            contender,
                            "derived",
                            answer,
                            n_sets=n,
                            seconds=n * float(np.mean(one_pass)),
                            layer_tokens=n * (self.n_layers - k) * n_tokens,
                            head_tokens=n * head,
                        )
                for contender, name in (
                    ("ternary, as published", "ternary in full"),
                    ("alpha path", "exact"),
                    ("alpha path, racing", "racing"),
                ):
                    if job := self.ledger.get(f"{form}, K={k}, {name}"):
                        facts = {}
                        if name == "ternary in full":
                            facts = {
                                "layer_tokens": job["n_sets"] * (self.n_layers - k) * n_tokens,
                                "head_tokens": job["n_sets"] * head,
                            }
                        add(k, form, contender, "measured", job, **facts)
            n_sets = sum(self.n_layers - step for step in range(k))
            plain = sum((self.n_layers - step) * (self.n_layers - step - 1) for step in range(k)) * n_tokens
            shared = (
                sum((n - 1) * (n + 2) // 2 for n in range(self.n_layers - k + 1, self.n_layers + 1))
                * n_tokens
            )
            steps = {
                way: [self.ledger.get(f"greedy, {way}, step {step}") for step in range(1, k + 1)]
                for way in ("shared", "racing")
            }
            found = next((s[-1] for s in steps.values() if s[-1]), {})
            answer = {"removed": sorted(found["order"]), "loss": found["loss"]} if found else {}
            if one_pass:
                add(
                    k,
                    "",
                    "greedy",
                    "derived",
                    answer,
                    n_sets=n_sets,
                    layer_tokens=plain,
                    head_tokens=n_sets * head,
                    seconds=self.seconds(plain, n_sets * head),
                )
                add(
                    k,
                    "",
                    "greedy, shared prefixes",
                    "derived",
                    answer,
                    n_sets=n_sets,
                    layer_tokens=shared,
                    head_tokens=n_sets * head,
                    seconds=self.seconds(shared, n_sets * head),
                )
            for way, contender in (
                ("shared", "greedy, shared prefixes"),
                ("racing", "greedy, shared prefixes, racing"),
            ):
                if all(steps[way]):
                    total = {
                        name: sum(step[name] for step in steps[way])
                        for name in ("n_sets", "layer_tokens", "head_tokens", "seconds")
                    }
                    add(
                        k,
                        "",
                        contender,
                        "measured",
                        total
                        | {
                            "removed": sorted(steps[way][-1]["order"]),
                            "loss": steps[way][-1]["loss"],
                            "peak_gib": max(step["peak_gib"] for step in steps[way]),
                        },
                    )
            if job := self.ledger.get(f"portfolio, K={k}, racing"):
                add(k, "", "portfolio, racing", "measured", job)
        if job := self.ledger.get("greedy, plain, step 1"):
            n = self.n_layers
            derived = self.seconds(n * (n - 1) * n_tokens, n * head)
            for how, seconds in (("measured", job["seconds"]), ("derived", derived)):
                add(
                    1,
                    "",
                    "greedy",
                    how,
                    job,
                    removed=job["order"],
                    layer_tokens=n * (n - 1) * n_tokens,
                    head_tokens=n * head,
                    seconds=seconds,
                )
            first = self.ledger["greedy, shared, step 1"] | {
                "removed": self.ledger["greedy, shared, step 1"]["order"]
            }
            add(1, "", "greedy, shared prefixes", "measured", first)
        return rows


def main(target: Path, minutes: float) -> None:
    deadline = time.monotonic() + 60 * minutes
    benches = [Bench(model, provenance.runs_root() / "benchmark-search") for model in MODELS]
    small, other = benches
    jobs = []
    for bench in benches:
        bench.evaluator(bench.blocks[:BATCH_SIZE]).losses(
            [frozenset()]
        )  # loaded and warm before any clock runs
        jobs += [lambda b=bench, k=k: b.plain_pass(k, 0) for k in (0, bench.n_layers // 2)]
        for k in bench.grid:
            jobs += [
                lambda b=bench, k=k, f=first: b.plain_pass(k, f) for first in (5, bench.n_layers - k - 2)
            ]
            jobs += [
                lambda b=bench, k=k, f=form, e=exact: b.race(f, k, e)
                for form in FORMS
                for exact in (True, False)
            ]
            jobs.append(lambda b=bench, k=k: b.race("portfolio", k, False))
    jobs += [
        lambda: small.greedy_to(3, True),
        lambda: small.greedy_step_in_full(),
        lambda: small.greedy_to(6, False),
        lambda: other.greedy_to(2, False),
        lambda: other.greedy_to(2, True),
        lambda: small.ternary_in_full("masd", 6),
        lambda: small.greedy_to(12, False),
        lambda: other.greedy_to(6, False),
        lambda: small.greedy_to(6, True),
    ]
    for job in jobs:
        if time.monotonic() > deadline:
            break
        job()
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
    table["seconds"], table["arithmetic_seconds"] = (
        table["seconds"].round(1),
        table["arithmetic_seconds"].round(1),
    )
    for name in ("peak_gib", "validation_perplexity", "test_perplexity"):
        table[name] = table[name].astype(float).round(2)
    origin = provenance.provenance()
    text = (
        f"# python -m benchmarks.search · {DTYPE}, {N_BLOCKS} x {small.blocks.shape[1]} validation and test "
        f"tokens of {small.run.corpus.label}, batch {BATCH_SIZE}, confidence of racing {CONFIDENCE}\n"
        f"# {origin['machine']} · torch {torch.__version__} · {origin['time']}\n"
        "# measured: run from beginning to end; derived: from measured passes, see the script. arithmetic_seconds: "
        "layer- and head-tokens times what each costs in a plain pass\n"
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text + table.to_csv(index=False), encoding="utf-8")
    print("wrote", target)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("target", type=Path)
    parser.add_argument("--minutes", type=float, default=600)
    main(**vars(parser.parse_args()))
