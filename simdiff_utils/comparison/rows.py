"""The comparison of notebook 06: every method on one model under one protocol, as tidy rows.

Measurements are facts of weights, text and protocol: unlike the other stages they outlive changes of this
code, so that a comparison of many hours survives a new plot. `PROTOCOL` is raised when what is measured
changes.
"""

import functools
import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from torch import LongTensor
from tqdm.auto import tqdm

from simdiff_utils.comparison.tasks.evaluate import BLANK, SUITES, average_accuracy, evaluate_tasks
from simdiff_utils.comparison.tasks.load import TaskData
from simdiff_utils.criterion.propose import METHODS
from simdiff_utils.criterion.race import Evaluator
from simdiff_utils.engine.perplexity import perplexity, perplexity_interval
from simdiff_utils.engine.surgery import Merge
from simdiff_utils.settings import SimDiffError
from simdiff_utils.stages import Run
from simdiff_utils.text.blocks import token_blocks
from simdiff_utils.text.corpus import load_wikitext2_test

PROTOCOL = "1"
PERPLEXITY = "wikitext2_perplexity"
FOLDER = "comparison"  # below the model's: choices, losses, task scores
_WINDOWS_AT_ONCE = 2  # what a kill can lose
COLUMNS = (
    "model",
    "method",
    "n_remove",
    "seed",
    "removed",
    "metric",
    "value",
    "stderr",
    "low",
    "high",
    "n",
    "split",
    "provenance",
)


class Comparison(Run):
    """A run that measures every method of `settings.criteria` at every K of `settings.n_remove_grid`."""

    def rows(self) -> pd.DataFrame:
        """Everything measured; what is there already is read.

        Returns:
            tidy, one row per number (`COLUMNS`): method "dense" has n_remove 0; metrics are
            wikitext2_perplexity (stderr by the delta method, low and high the ends of a 95 % bootstrap
            interval over windows), ratio_to_cosine (of perplexities, paired by window), passes (what finding
            the set costs), and for the methods of `settings.task_criteria` acc, acc_norm, f1 ... of each
            task, AVG (or AVG-7) and RP.
        """
        chosen = self.chosen_sets()
        rows = pd.DataFrame([*self._perplexity_rows(chosen), *self._task_rows(chosen)], columns=COLUMNS)
        return rows.assign(
            model=self.checkpoint.label, removed=[json.dumps(removed) for removed in rows["removed"]]
        )

    def chosen_sets(self) -> pd.DataFrame:
        """The set of each method, K and seed, the dense model first: n_remove, method, seed, removed, merges,
        n_passes."""
        seeded = [name for name in self.settings.criteria if METHODS[name].n_seeds > 1]
        chosen = [dict(n_remove=0, method="dense", seed=0, removed=[], merges=[], n_passes=0)]
        single = [name for name in self.settings.criteria if name not in seeded]
        if single:
            table = self.choices(self.grid, single).rename(columns={"criterion": "method"}).assign(seed=0)
            chosen += table[list(chosen[0])].to_dict("records")
        for n_remove in self.grid:
            for name in seeded:
                for seed in range(METHODS[name].n_seeds):
                    (drawn,) = METHODS[name].propose(replace(self.evidence(), seed=seed), n_remove)
                    chosen.append(
                        dict(
                            n_remove=n_remove,
                            method=name,
                            seed=seed,
                            removed=sorted(drawn.removed),
                            merges=[],
                            n_passes=0,
                        )
                    )
        return pd.DataFrame(chosen)

    # ---- perplexity
    # ------------------------------------------------------------------------------------------------

    def windows(self) -> LongTensor:
        """WikiText-2's test split by the literature's protocol: joined, tokenised once, all windows of
        `settings.window_len` tokens that do not overlap (each beginning with BOS where the tokenizer prepends
        it)."""
        if "wikitext2" not in self._tokenised:
            rows = load_wikitext2_test(self.settings.data_folder)
            self._tokenised["wikitext2"] = token_blocks(self.tokenizer, rows, self.settings.window_len)
        return self._tokenised["wikitext2"]

    def _perplexity_rows(self, chosen: pd.DataFrame) -> Iterator[dict]:
        windows, s = self.windows(), self.settings
        if s.n_windows > len(windows):
            raise SimDiffError(
                f"WikiText-2's test split has {len(windows)} windows of {s.window_len} tokens, "
                f"{s.n_windows} were asked for: lower n_windows or window_len."
            )
        which = np.random.default_rng(0).permutation(len(windows))[
            : s.n_windows
        ]  # more windows later: these again
        losses = self._window_losses(chosen, which)
        provenance = self._provenance(f"{s.n_windows} of {len(windows)} windows of {s.window_len} tokens")
        shortgpt = {
            row.n_remove: values
            for row, values in zip(chosen.itertuples(), losses, strict=True)
            if row.method == "cosine"
        }
        for row, values in zip(chosen.itertuples(), losses, strict=True):
            shared = dict(
                method=row.method,
                n_remove=row.n_remove,
                seed=row.seed,
                removed=row.removed,
                n=s.n_windows,
                split="WikiText-2 test",
                provenance=provenance,
            )
            value, (low, high) = perplexity(values), perplexity_interval(values)
            stderr = (
                value * float(np.std(values, ddof=1) / np.sqrt(len(values)))
                if len(values) > 1
                else float("nan")
            )
            yield shared | dict(metric=PERPLEXITY, value=value, stderr=stderr, low=low, high=high)
            if row.n_remove in shortgpt:
                base = shortgpt[row.n_remove]
                low, high = perplexity_interval(values, base)
                yield shared | dict(
                    metric="ratio_to_cosine", value=perplexity(values - base), low=low, high=high
                )
                yield shared | dict(metric="passes", value=row.n_passes, n=1, split="")

    def _window_losses(self, chosen: pd.DataFrame, which: np.ndarray) -> list[np.ndarray]:
        """Losses of every chosen model on some windows, float64 [n_windows] each, a few windows at a time."""
        key = self._key(
            ("dtype", "window_len"), windows=hashlib.sha256(self.windows().numpy().tobytes()).hexdigest()
        )
        evaluator = Evaluator(
            self.decoder, self.windows(), 1, self.folder / FOLDER / f"losses-wikitext2-{key}"
        )
        sets: dict[tuple[Merge, ...], dict[frozenset[int], None]] = {}
        for row in chosen.itertuples():
            sets.setdefault(_freeze(row.merges), {})[frozenset(row.removed)] = None
        evaluators = {merges: evaluator.merged(merges) for merges in sets}
        size = (
            len(which) if self.decoder.streamed else _WINDOWS_AT_ONCE
        )  # streamed, each pass reads all weights
        for start in tqdm(
            range(0, len(which), size), desc=f"WikiText-2, {size} windows at once", unit="pass"
        ):
            for merges, removed in sets.items():
                evaluators[merges].losses(removed, np.sort(which[start : start + size]))
        return [
            evaluators[_freeze(row.merges)].losses([frozenset(row.removed)], which)[0]
            for row in chosen.itertuples()
        ]

    # ---- tasks
    # -----------------------------------------------------------------------------------------------------

    def _task_rows(self, chosen: pd.DataFrame) -> Iterator[dict]:
        """Accuracy and F1 of the methods and numbers of layers asked for, and of the dense model."""
        s = self.settings
        asked = chosen[
            (chosen["n_remove"] == 0)
            | (chosen["method"].isin(s.task_criteria) & chosen["n_remove"].isin(s.task_grid))
        ]
        if not s.task_criteria or not s.task_grid:
            return
        sets = {frozenset(row.removed): None for row in asked.itertuples() if not row.merges}
        available = [task for task in SUITES[s.suite] if task not in self.missing_tasks]
        evaluate = functools.partial(
            evaluate_tasks,
            lambda: self.decoder,
            self.tokenizer,
            sets,
            data=self.task_data,
            chat_template=s.chat_template,
            folder=self.folder / FOLDER / "tasks",
            identity={"model": self.checkpoint.sha256, "dtype": s.dtype, "protocol": PROTOCOL},
        )
        scores = evaluate(tasks=[task for task in available if task != "coqa"], limit=s.task_limit or None)
        if (
            s.n_stories and "coqa" not in self.missing_tasks and not self.decoder.streamed
        ):  # generates with the cache
            scores = pd.concat([scores, evaluate(tasks=["coqa"], limit=s.n_stories)])
        averages = average_accuracy(scores) if s.suite == "zero_shot" else pd.DataFrame()
        for row in asked[~asked["merges"].astype(bool)].itertuples():
            shared = dict(method=row.method, n_remove=row.n_remove, seed=row.seed, removed=row.removed)
            for score in scores[scores["removed"].map(tuple) == tuple(row.removed)].itertuples():
                yield (
                    shared
                    | _with_interval(score.value, score.stderr)
                    | dict(
                        metric=f"{score.task} {score.metric}",
                        n=score.n_samples,
                        split=f"{score.split} ({score.source})",
                        provenance=self._provenance(
                            f"lm-eval task version {score.task_version}, first documents",
                            f"data {score.data_sha256[:8]}",
                        ),
                    )
                )
            for average in averages[averages["removed"].map(tuple) == tuple(row.removed)].itertuples():
                shared |= dict(
                    n=average.n_tasks,
                    provenance=self._provenance(f"{s.task_limit or 'all'} documents a task"),
                )
                yield shared | _with_interval(average.value, average.stderr) | dict(metric=average.metric)
                yield shared | dict(metric=average.metric.replace("AVG", "RP"), value=average.RP)

    @functools.cached_property
    def task_data(self) -> TaskData:
        """Where the tasks' rows come from: `settings.data_folder`, else the hub, else the embedded copy."""
        return TaskData(Path(self.settings.data_folder).expanduser() if self.settings.data_folder else None)

    @functools.cached_property
    def missing_tasks(self) -> dict[str, str]:
        """The cells of the suite that stay empty, each with its sentence."""
        cells = self.task_data.missing((*SUITES[self.settings.suite], "coqa"))
        return cells | (BLANK if self.settings.suite == "nlu" else {})

    def _folder(self, stage: str, names: tuple[str, ...]) -> Path:
        return self.folder / FOLDER / f"{stage}-{self._key(names, text=self.corpus.sha256)}"

    def _made_by(self) -> dict[str, str]:
        return {"protocol": PROTOCOL}

    def _provenance(self, *facts: str) -> str:
        return ", ".join((*facts, self.settings.dtype, f"weights {self.checkpoint.sha256[:8]}"))


def _freeze(merges: list) -> tuple[Merge, ...]:
    """Merges as JSON gives them, as they are asked for."""
    return tuple((stays, tuple(folded)) for stays, folded in merges)


def _with_interval(value: float, stderr: float) -> dict:
    """The ends of the 95 % interval by the normal distribution, as lm-eval's standard errors are meant."""
    return dict(value=value, stderr=stderr, low=value - 1.96 * stderr, high=value + 1.96 * stderr)
