"""The chain of a run: each stage is made once for its settings, kept on disk, and read from there ever
after."""

import functools
import hashlib
import math
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from simdiff_utils.capture.peak import measure_capture_memory
from simdiff_utils.capture.statistics import LayerStatistics, capture_statistics
from simdiff_utils.criterion.equations import FORMS, choose_removed, fuse, normalise
from simdiff_utils.criterion.propose import METHODS, Candidate, Evidence, alpha_path, count_passes
from simdiff_utils.criterion.race import Evaluator
from simdiff_utils.criterion.search import search_ternary
from simdiff_utils.engine.decoder import open_decoder, stream_decoder
from simdiff_utils.engine.load import load_model, pick_dtype
from simdiff_utils.engine.perplexity import perplexity, perplexity_interval
from simdiff_utils.engine.weights import weight_files
from simdiff_utils.files import check_disk, read_json, read_kept, write_kept, write_whole
from simdiff_utils.provenance import describe_machine
from simdiff_utils.pruning.export import export_pruned, refuse_existing, verify_export
from simdiff_utils.run import RunFolder
from simdiff_utils.settings import SimDiffError, check_n_remove
from simdiff_utils.speed.bound import Work, bound_phases, ideal_seconds, measure_rates
from simdiff_utils.speed.memory import measure_peak_memory
from simdiff_utils.speed.parts import time_parts
from simdiff_utils.speed.timing import PROTOCOLS, Protocol, measure_speed, without_layers

_CAPTURE = ("dtype", "seed", "seq_len", "n_samples")
_SEARCH = (*_CAPTURE, "n_validation", "alpha", "search", "exact", "confidence", "eps", "max_iterations")
PRUNE = (*_SEARCH, "criterion", "n_remove")
_EXPORT = (*PRUNE, "n_test")
_SPEED = (
    *PRUNE,
    "speed_dtype",
    "protocol",
    "speed_batch_sizes",
    "prompt_len",
    "n_new_tokens",
    "n_timed_steps",
    "n_pairs",
    "compiled",
    "speed_grid",
)


class Run(RunFolder):
    """A run with its stages."""

    def statistics(self) -> LayerStatistics:
        """Stage capture: what every layer does to the calibration samples."""

        def make(folder: Path) -> dict:
            captured = capture_statistics(self.decoder, self.blocks("train"), self.settings.batch_size)
            captured.save(folder)
            return {"n_tokens": captured.n_samples * self.settings.seq_len}

        return LayerStatistics.load(self._stage("capture", _CAPTURE, make))

    def capture_memory(self) -> pd.DataFrame:
        """Stage memory: peak memory of a capture over a few numbers of samples, in memory and streamed."""

        def make(folder: Path) -> dict:
            largest = self.settings.n_samples
            n_samples = sorted({max(1, largest // 16), max(1, largest // 4), largest})
            measured = measure_capture_memory(
                self.checkpoint.folder, self.settings.dtype, n_samples, self.settings.seq_len
            )
            measured.to_csv(folder / "memory.csv", index=False)
            return {}

        return pd.read_csv(self._stage("memory", _CAPTURE, make) / "memory.csv")

    def losses(self, split: str, removed: frozenset[int] = frozenset()) -> np.ndarray:
        """Losses per block of a split without a set of layers, float64 [n]."""
        return self.evaluator(split).losses([removed])[0]

    def evaluator(self, split: str) -> Evaluator:
        """Losses of any sets of layers on a split; each is computed once, ever."""
        if split not in self._evaluators:
            folder = self._folder(f"losses-{split}", ("dtype", "seq_len", f"n_{split}"))
            self._evaluators[split] = Evaluator(
                self.decoder, self.blocks(split), self.settings.batch_size, folder
            )
        return self._evaluators[split]

    @functools.cached_property
    def _evaluators(self) -> dict[str, Evaluator]:
        return {}

    def choices(self, grid: list[int], criteria: list[str] | None = None) -> pd.DataFrame:
        """The set that each criterion removes, for each number of layers in `grid`; each is chosen once,
        ever.

        Args:
            criteria: names of `methods.METHODS`; None: those of the settings.

        Returns:
            one row per (n_remove, criterion): removed (sorted list), proposed_by (the part of the portfolio),
            low and high (the interval of alpha that chooses it; NaN where no alpha is involved), alpha (its
            middle), n_tied, merges (LaCo alone), n_candidates (distinct sets compared), n_passes (see
            `count_passes`), n_evaluations (perplexities asked for), validation_perplexity with the ends of
            its 95 % interval, validation_low and validation_high.
        """
        folder = self._folder("choices", _SEARCH)
        wanted = {
            (n_remove, criterion): folder / f"{criterion}-{n_remove}.json"
            for n_remove in grid
            for criterion in criteria or self.settings.criteria
        }
        kept = {pair: read_kept(path) for pair, path in wanted.items()}
        candidates = {pair: self._candidates(*pair) for pair, row in kept.items() if row is None}
        if candidates:
            evaluator = self.evaluator("validation")
            race = evaluator.race(
                {
                    pair: [c.removed for c in found]
                    for pair, found in candidates.items()
                    if not found[0].merges
                },
                self.settings.confidence,
                self.settings.exact,
            )
            for pair, found in candidates.items():
                winner = next(c for c in found if c.merges or c.removed == race.winners[pair])
                losses = evaluator.merged(winner.merges).losses([winner.removed])[0]
                low, high = perplexity_interval(losses)
                write_kept(
                    wanted[pair],
                    {
                        "n_remove": pair[0],
                        "criterion": pair[1],
                        "removed": sorted(winner.removed),
                        "proposed_by": winner.proposed_by,
                        "low": _or_none(winner.low),
                        "high": _or_none(winner.high),
                        "n_tied": winner.n_tied,
                        "merges": winner.merges,
                        "n_candidates": len({c.removed for c in found}),
                        "n_passes": count_passes(METHODS[pair[1]], found, self.n_layers, pair[0]),
                        "n_evaluations": len(found),
                        "validation_perplexity": perplexity(losses),
                        "validation_low": low,
                        "validation_high": high,
                    },
                )
                kept[pair] = read_kept(wanted[pair])
        table = pd.DataFrame(list(kept.values())).astype({"low": float, "high": float})
        table.insert(2, "alpha", (table["low"] + table["high"]) / 2)
        return table

    def _candidates(self, n_remove: int, criterion: str) -> list[Candidate]:
        """What a criterion proposes; one set where alpha is given, the probes' sets where the search is
        ternary."""
        if criterion not in FORMS or (self.settings.alpha == "auto" and self.settings.search == "path"):
            return METHODS[criterion].propose(self.evidence(), n_remove)
        if self.settings.alpha == "auto":
            probes = self.probes(criterion, n_remove)[["alpha", "removed"]].itertuples(index=False)
        else:
            alpha = float(self.settings.alpha)
            scores = fuse(*normalise(self.statistics().table(), criterion), alpha)
            probes = [(alpha, choose_removed(scores, n_remove))]
        return [Candidate(frozenset(removed), criterion, alpha, alpha) for alpha, removed in probes]

    def evidence(self) -> Evidence:
        """What methods may look at; model and validation text are loaded when one does."""
        return Evidence(
            self.statistics(),
            lambda: self.decoder,
            lambda: self.blocks("train"),
            lambda: self.evaluator("validation"),
            self.settings.seed,
            self.settings.confidence,
            self.settings.exact,
        )

    def probes(self, criterion: str, n_remove: int) -> pd.DataFrame:
        """Algorithm 1 as published: every alpha that the ternary search tried (see `search_ternary`)."""
        evaluator = self.evaluator("validation")
        return search_ternary(
            *normalise(self.statistics().table(), criterion),
            n_remove,
            lambda removed: perplexity(evaluator.losses([removed])),
            self.settings.eps,
            self.settings.max_iterations,
        )

    def steps(self, criterion: str, n_remove: int) -> pd.DataFrame:
        """Perplexity over alpha as the step curve it is: the alpha path of a form, every set on every block.

        Returns:
            the rows of `trace_path` for n_remove, and validation perplexity with its interval: perplexity,
            perplexity_low, perplexity_high.
        """
        path = alpha_path(self.statistics(), criterion)
        path = path[path["n_remove"] == n_remove].reset_index(drop=True)
        losses = self.evaluator("validation").losses([frozenset(removed) for removed in path["removed"]])
        intervals = np.array([perplexity_interval(values) for values in losses])
        return path.assign(
            perplexity=[perplexity(values) for values in losses],
            perplexity_low=intervals[:, 0],
            perplexity_high=intervals[:, 1],
        )

    def compare(self, grid: list[int]) -> pd.DataFrame:
        """The choices on the test split, which chose nothing, against dense and against cosine distance
        alone.

        Returns:
            the rows of `choices`, and: test_perplexity, ratio (to dense), to_cosine (ratio to ShortGPT's
            perplexity at the same n_remove) with the ends of its paired 95 % bootstrap interval,
            to_cosine_low and to_cosine_high, and verdict: "same set", "better", "worse", or "no difference
                shown" where the interval holds 1.
        """
        table = self.choices(grid)
        shortgpt = {n_remove: self._candidates(n_remove, "cosine")[0].removed for n_remove in grid}
        models = list(zip(table["merges"], map(frozenset, table["removed"]), strict=True))
        test = self.evaluator("test")
        plain = [frozenset(), *shortgpt.values(), *(removed for merges, removed in models if not merges)]
        known = dict(zip(plain, test.losses(plain), strict=True))  # all in one pass
        losses = [test.merged(merges).losses([removed])[0] for merges, removed in models]
        table["test_perplexity"] = [perplexity(values) for values in losses]
        table["ratio"] = table["test_perplexity"] / perplexity(known[frozenset()])
        base = [known[shortgpt[n_remove]] for n_remove in table["n_remove"]]
        table["to_cosine"] = [perplexity(values - b) for values, b in zip(losses, base, strict=True)]
        intervals = np.array([perplexity_interval(values, b) for values, b in zip(losses, base, strict=True)])
        table["to_cosine_low"], table["to_cosine_high"] = intervals.T
        table["verdict"] = [
            "same set"
            if model == ([], shortgpt[n_remove])
            else "better"
            if high < 1
            else "worse"
            if low > 1
            else "no difference shown"
            for model, n_remove, (low, high) in zip(models, table["n_remove"], intervals, strict=True)
        ]
        return table

    def chosen(self) -> dict:
        """What `settings.criterion` chooses for `settings.n_remove`: a row of `choices`."""
        check_n_remove(self.settings.n_remove, self.n_layers)
        return self.choices([self.settings.n_remove], [self.settings.criterion]).iloc[0].to_dict()

    def removed(self) -> frozenset[int]:
        """The set that `settings.criterion` removes for `settings.n_remove`; the layers that stay are
        unchanged."""
        chosen = self.chosen()
        if chosen["merges"]:
            raise SimDiffError(
                f"{self.settings.criterion} changes the weights of layers that stay, and only unchanged "
                "ones are exported; notebook 06 measures it: choose another criterion."
            )
        return frozenset(chosen["removed"])

    def check_room(self) -> None:
        """Refuse, before any work, an export that the disk cannot hold or that would overwrite something."""
        check_n_remove(self.settings.n_remove, self.n_layers)
        dense = sum(file.stat().st_size for file in weight_files(self.checkpoint.folder))
        n_bytes = int(dense * (1 - self.settings.n_remove / self.n_layers))
        if self.settings.export_to:
            refuse_existing(self._export_target(), self.settings.overwrite)
            check_disk(self._export_target(), n_bytes, "the pruned checkpoint")
        if not self._folder("prune", _EXPORT).exists():
            check_disk(self.folder, n_bytes, "the pruned checkpoint")

    def pruned_checkpoint(self) -> Path:
        """Stage prune: folder of the exported checkpoint without the chosen layers, opened again and
        compared.

        With `settings.export_to` a copy stands there, too.
        """

        def make(folder: Path) -> dict:
            removed = self.removed()
            export_pruned(self.checkpoint.folder, removed, folder / "model", self._pruning_facts())
            tight = self.decoder.streamed or self.settings.memory_gib  # no second model beside the dense one
            exported = (stream_decoder if tight else open_decoder)(folder / "model", self.settings.dtype)
            difference = verify_export(self.decoder, removed, exported, self.blocks("validation")[:1])
            return {
                "removed": sorted(removed),
                "kept": sorted(set(range(self.n_layers)) - removed),
                "reload_difference": difference,
            }

        return self.exported(self._stage("prune", _EXPORT, make) / "model")

    def exported(self, checkpoint: Path) -> Path:
        """The checkpoint itself, or its copy at `settings.export_to` where that names a folder."""
        if not self.settings.export_to:
            return checkpoint
        refuse_existing(self._export_target(), self.settings.overwrite)
        with write_whole(self._export_target()) as partial:
            shutil.copytree(checkpoint, partial)
        return self._export_target()

    def _export_target(self) -> Path:
        target, dense = Path(self.settings.export_to).expanduser().resolve(), self.checkpoint.folder.resolve()
        if target in (dense, *dense.parents):
            raise SimDiffError(
                f"export_to = {self.settings.export_to} holds the dense model itself; name a folder of "
                "its own."
            )
        return target

    def _pruning_facts(self) -> dict:
        """What `pruning.json` and the model card say of the set chosen; test perplexity chose nothing."""
        s, chosen, table = self.settings, self.chosen(), self.statistics().table()
        alpha = None if math.isnan(chosen["alpha"]) else chosen["alpha"]
        scores = []  # of a method that scores no layers, or none that are comparable
        if alpha is not None:
            scores = fuse(*normalise(table, chosen["proposed_by"]), alpha).tolist()
        elif s.criterion == "cosine":
            scores = table["cosine_distance"].tolist()
        dense, pruned = map(
            perplexity, self.evaluator("test").losses([frozenset(), frozenset(chosen["removed"])])
        )
        n_tokens = s.n_test * (s.seq_len - 1)
        calibration = self.blocks("train")
        return {
            "model": self.checkpoint.label,
            "source": self.checkpoint.hub_id or self.checkpoint.folder.name,
            "hub_id": self.checkpoint.hub_id,
            "criterion": s.criterion,
            "alpha": alpha,
            "scores": scores,
            "statistics": table.to_dict(orient="list"),
            "calibration": f"{s.n_samples} samples of {s.seq_len} tokens of {self.corpus.label}",
            "calibration_sha256": hashlib.sha256(calibration.numpy().tobytes()).hexdigest(),
            "text": self.corpus.label,
            "machine": describe_machine(),
            "measured": {
                f"perplexity, dense ({n_tokens:,} test tokens)": round(dense, 2),
                f"perplexity, pruned ({n_tokens:,} test tokens)": round(pruned, 2),
            },
            "settings": {name: getattr(s, name) for name in _EXPORT},
            "origin": self.origin(),
        }

    def protocols(self) -> list[Protocol]:
        """The protocol named, with the values that the settings give: one for each batch size."""
        s, named = self.settings, PROTOCOLS[self.settings.protocol]
        named = replace(
            named,
            prompt_len=s.prompt_len or named.prompt_len,
            n_timed_steps=s.n_timed_steps,
            n_new_tokens=s.n_new_tokens or named.n_new_tokens,
        )
        return [replace(named, batch_size=size) for size in s.speed_batch_sizes or [named.batch_size]]

    def speed(self) -> Path:
        """Stage speed: the dense model, the exported checkpoint, and sets of other sizes where they are asked
        for.

        The folder holds `samples.csv` (see `measure_speed`), `bounds.csv` (see `bound_phases`), `parts.csv`
        (see `time_parts`; of dense and exported), `memory.csv` (see `measure_peak_memory`), and in
        `result.json` the rates of the machine.
        """

        def make(folder: Path) -> dict:
            s, protocols = self.settings, self.protocols()
            exported = self.pruned_checkpoint()
            removed = frozenset(read_json(exported / "pruning.json")["removed"])
            sets = {
                n_remove: frozenset(self.choices([n_remove], [s.criterion]).iloc[0]["removed"])
                for n_remove in s.speed_grid
                if n_remove != len(removed)
            }
            dtype = pick_dtype(s.speed_dtype)
            with ThreadPoolExecutor() as pool:  # a process each; side by side, since only memory is asked for
                waiting = {
                    name: pool.submit(measure_peak_memory, path, dtype, protocols[-1])
                    for name, path in (("dense", self.checkpoint.folder), ("pruned", exported))
                }
                memory = {
                    name: job.result()
                    for name, job in tqdm(waiting.items(), desc="peak memory", unit="model")
                }
            dense, pruned = (load_model(path, s.speed_dtype) for path in (self.checkpoint.folder, exported))
            with ExitStack() as shallow:
                models = {removed: pruned} | {
                    other: shallow.enter_context(without_layers(dense, other)) for other in sets.values()
                }
                ways = (False, True) if s.compiled else (False,)
                samples = pd.concat(
                    [
                        measure_speed(dense, models, protocol, s.n_pairs, compiled, s.seed)
                        for protocol in protocols
                        for compiled in ways
                    ]
                )
                bounds = pd.concat(
                    [
                        bound_phases(model, protocol).assign(n_remove=len(lacking))
                        for lacking, model in ({frozenset(): dense} | models).items()
                        for protocol in protocols
                    ]
                )
                parts = time_parts({"dense": dense, "pruned": pruned}, protocols[0])
            rates = measure_rates(dense.device, dtype)
            bounds["ideal_seconds"] = [
                ideal_seconds(Work(row.weight_bytes, row.kv_bytes, row.operations), rates) * row.n_passes
                for row in bounds.itertuples()
            ]
            for name, table in (
                ("samples", samples),
                ("bounds", bounds),
                ("parts", parts),
                ("memory", pd.DataFrame(memory).T.rename_axis("model").reset_index()),
            ):
                table.to_csv(folder / f"{name}.csv", index=False)
            return {
                "dtype": str(dtype).removeprefix("torch."),
                "rates": asdict(rates),
                "removed": sorted(removed),
            }

        return self._stage("speed", _SPEED, make)


def _or_none(value: float) -> float | None:
    """JSON has no NaN."""
    return None if math.isnan(value) else value
