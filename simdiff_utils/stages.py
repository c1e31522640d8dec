"""The chain of a run: each stage is made once for its settings, kept on disk, and read from there ever after.

A stage's folder carries a hash of the settings that the stage depends on, of the model's weights, of the text and
of this package's code. Changing the number of layers to remove reuses the capture; nothing stale is ever read.
"""

import functools
import hashlib
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from time import perf_counter

import numpy as np
import pandas as pd
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from simdiff_utils import results
from simdiff_utils.alpha import search_ternary
from simdiff_utils.capture import LayerStatistics, capture_statistics
from simdiff_utils.criteria import choose_removed, fuse
from simdiff_utils.files import read_json, write_json, write_whole
from simdiff_utils.models import load_model, load_tokenizer, pick_dtype, resolve_checkpoint
from simdiff_utils.perplexity import block_losses, perplexity
from simdiff_utils.recovery import Recipe, alpaca_dataset, block_dataset, recipe_for, train_lora
from simdiff_utils.settings import CRITERIA, Settings, SimDiffError, check_n_remove
from simdiff_utils.speed import measure_peak_memory, measure_speed, parameters_read_per_token
from simdiff_utils.surgery import export_pruned, verify_reload
from simdiff_utils.text import Corpus, draw_blocks, load_corpus, token_blocks

_CAPTURE = ("dtype", "seed", "seq_len", "n_samples")
_SEARCH = (*_CAPTURE, "n_validation", "alpha", "eps", "max_iterations")
_PRUNE = (*_SEARCH, "criterion", "n_remove")
_RECOVERY = (*_PRUNE, "preset", "train_data", "learning_rate", "max_steps", "train_dtype")
_SPEED = (*_PRUNE, "speed_dtype", "speed_batch_size", "prefill_len", "prompt_len", "n_new_tokens", "n_repeats")


class Run:
    """One model, one text, one set of settings. Model, tokenizer and text are loaded when first needed.

    Attributes:
        settings: as the notebook gave them.
        checkpoint: the dense model's folder, label and hash.
        n_layers: of the dense model.
        grid: the numbers of layers to compare.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.started = perf_counter()
        self.checkpoint = resolve_checkpoint(settings.model)
        config = AutoConfig.from_pretrained(self.checkpoint.folder).get_text_config()
        self.n_layers: int = config.num_hidden_layers
        self.grid = settings.n_remove_grid
        default = set(Settings().n_remove_grid)
        if default <= set(self.grid):  # nobody asked for the default ones: keep those that fit the model
            self.grid = [n_remove for n_remove in self.grid if n_remove < self.n_layers or n_remove not in default]
        for n_remove in self.grid:
            check_n_remove(n_remove, self.n_layers)
        if settings.n_remove != Settings.n_remove:  # the default is checked where it is used: 01 and 02 have none
            check_n_remove(settings.n_remove, self.n_layers)
        context = getattr(config, "max_position_embeddings", None)
        if context and settings.seq_len > context:
            raise SimDiffError(f"seq_len = {settings.seq_len} is longer than the context of {context} tokens that "
                               f"{self.checkpoint.label} was built for; lower seq_len.")

    @functools.cached_property
    def model(self) -> PreTrainedModel:
        """The dense model in `settings.dtype`."""
        return load_model(self.checkpoint.folder, self.settings.dtype)

    @functools.cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The checkpoint's tokenizer."""
        return load_tokenizer(self.checkpoint.folder)

    @functools.cached_property
    def corpus(self) -> Corpus:
        """The text with its three splits."""
        return load_corpus(self.settings.text)

    @functools.cached_property
    def _tokenised(self) -> dict[str, Tensor]:
        return {}

    def split_blocks(self, split: str) -> Tensor:
        """Every block of a split, [n_blocks, seq_len]; tokenised once."""
        if split not in self._tokenised:
            documents = self.corpus.documents[split]
            self._tokenised[split] = token_blocks(self.tokenizer, documents, self.settings.seq_len)
        return self._tokenised[split]

    def blocks(self, split: str) -> Tensor:
        """Token ids [n, seq_len]: `train` draws the calibration samples at random, the others are spread evenly."""
        name = {"train": "n_samples", "validation": "n_validation", "test": "n_test"}[split]
        seed = self.settings.seed if split == "train" else None
        return draw_blocks(self.split_blocks(split), getattr(self.settings, name), seed, parameter=name)

    # ---- stages -----------------------------------------------------------------------------------------------

    def statistics(self) -> LayerStatistics:
        """Stage capture: what every layer does to the calibration samples."""
        def make(folder: Path) -> dict:
            captured = capture_statistics(self.model, self.blocks("train"), self.settings.batch_size)
            captured.save(folder)
            return {"n_tokens": captured.n_samples * self.settings.seq_len}
        return LayerStatistics.load(self._stage("capture", _CAPTURE, make))

    def losses(self, split: str, removed: frozenset[int] = frozenset()) -> np.ndarray:
        """Losses per block of a split without a set of layers, float64 [n]; every set is evaluated once, ever."""
        folder = self._folder(f"losses-{split}", ("dtype", "seq_len", f"n_{split}"))
        path = folder / (("without-" + "-".join(map(str, sorted(removed))) if removed else "dense") + ".json")
        if not path.exists():
            losses = block_losses(self.model, self.blocks(split), removed, self.settings.batch_size)
            write_json(path, {"removed": sorted(removed), "losses": losses.tolist()})
        return np.array(read_json(path)["losses"])

    def choices(self, grid: list[int]) -> pd.DataFrame:
        """Stage criterion: the set that each criterion removes, for each number of layers in `grid`.

        Returns:
            one row per (n_remove, criterion): alpha (NaN for cosine, which has none), removed (sorted list),
            validation_perplexity, n_probes and n_sets (perplexities asked for, and distinct sets among them).
        """
        table = self.statistics().table()
        return pd.DataFrame([self._choose(table, criterion, n_remove)
                             for n_remove in tqdm(grid, desc="choosing", unit="K") for criterion in CRITERIA])

    def _choose(self, table: pd.DataFrame, criterion: str, n_remove: int) -> dict:
        search = self.probes(criterion, n_remove, table)
        best = search.loc[search["perplexity"].idxmin()]
        return {"n_remove": n_remove, "criterion": criterion, "alpha": best["alpha"], "removed": best["removed"],
                "validation_perplexity": best["perplexity"], "n_probes": len(search),
                "n_sets": int((~search["repeated"]).sum())}

    def probes(self, criterion: str, n_remove: int, table: pd.DataFrame | None = None) -> pd.DataFrame:
        """Every alpha that the search for one criterion tried: alpha, perplexity, removed, repeated."""
        table = self.statistics().table() if table is None else table
        l_sim = table["cosine_distance"].to_numpy()

        def evaluate(removed: frozenset[int]) -> float:
            return perplexity(self.losses("validation", removed))

        if criterion == "cosine" or self.settings.alpha != "auto":
            alpha = float("nan") if criterion == "cosine" else float(self.settings.alpha)
            importance = l_sim if criterion == "cosine" else fuse(l_sim, table[criterion].to_numpy(), alpha)
            removed = choose_removed(importance, n_remove)
            return pd.DataFrame([{"alpha": alpha, "perplexity": evaluate(removed), "removed": sorted(removed),
                                  "repeated": False}])
        return search_ternary(l_sim, table[criterion].to_numpy(), n_remove, evaluate,
                              self.settings.eps, self.settings.max_iterations).probes

    def compare(self, grid: list[int]) -> pd.DataFrame:
        """The choices with their perplexity on the test split, which chose nothing, and its ratio to dense."""
        table = self.choices(grid)
        table["test_perplexity"] = [perplexity(self.losses("test", frozenset(removed)))
                                    for removed in tqdm(table["removed"], desc="test split", unit="set")]
        table["ratio"] = table["test_perplexity"] / perplexity(self.losses("test"))
        return table

    def removed(self) -> frozenset[int]:
        """The set that `settings.criterion` removes for `settings.n_remove`."""
        check_n_remove(self.settings.n_remove, self.n_layers)
        return frozenset(self._choose(self.statistics().table(), self.settings.criterion,
                                      self.settings.n_remove)["removed"])

    def pruned_checkpoint(self) -> Path:
        """Stage prune: folder of the exported checkpoint without the chosen layers, reloaded and compared."""
        def make(folder: Path) -> dict:
            removed = self.removed()
            export_pruned(self.model, self.tokenizer, removed, folder / "model")
            difference = verify_reload(self.model, removed, folder / "model", self.blocks("validation")[:1])
            return {"removed": sorted(removed), "kept": sorted(set(range(self.n_layers)) - removed),
                    "reload_difference": difference}
        return self._stage("prune", _PRUNE, make) / "model"

    def recovery(self) -> Path:
        """Stage recovery: folder with `model/` (LoRA merged), `adapter/`, `log.csv` and `result.json`."""
        def make(folder: Path) -> dict:
            recipe = recipe_for(self.settings.preset, self.settings.learning_rate, self.settings.max_steps)
            train, held_out = self._training_rows(recipe)
            model = load_model(self.pruned_checkpoint(), "float32")
            dtype = pick_dtype(self.settings.train_dtype)
            model, log, n_trained = train_lora(model, self.tokenizer, train, held_out, recipe, folder, dtype,
                                               self.settings.seed)
            log.to_csv(folder / "log.csv", index=False)
            export_pruned(model, self.tokenizer, frozenset(), folder / "model")
            return {"n_trained": n_trained, "n_parameters": model.num_parameters(), "n_steps": int(log["step"].max()),
                    "train_seconds": log["seconds"].max(), "dtype": str(dtype).removeprefix("torch.")}
        return self._stage("recovery", _RECOVERY, make)

    def _training_rows(self, recipe: Recipe) -> tuple[list[dict], list[dict]]:
        data = recipe.data if self.settings.train_data == "preset" else self.settings.train_data
        if data != "text":
            return alpaca_dataset(data, self.tokenizer, recipe.max_length, self.settings.seed, recipe.n_validation)
        blocks = token_blocks(self.tokenizer, self.corpus.documents["train"], recipe.max_length)
        n_wanted = recipe.batch_size * recipe.max_steps or len(blocks)
        blocks = draw_blocks(blocks, min(n_wanted, len(blocks)), self.settings.seed)
        return block_dataset(blocks), block_dataset(self.blocks("validation"))

    def speed(self) -> Path:
        """Stage speed: folder with `measurements.csv` and `result.json` (parameters, peak memory)."""
        def make(folder: Path) -> dict:
            s = self.settings
            folders = {"dense": self.checkpoint.folder, "pruned": self.pruned_checkpoint()}
            sizes = {"batch_size": s.speed_batch_size, "prefill_len": s.prefill_len, "prompt_len": s.prompt_len,
                     "n_new_tokens": s.n_new_tokens}
            dtype = pick_dtype(s.speed_dtype)
            with ThreadPoolExecutor() as pool:  # a process each; side by side, since only memory is asked for
                waiting = {name: pool.submit(measure_peak_memory, path, dtype, **sizes)
                           for name, path in folders.items()}
                memory = {name: job.result() for name, job in tqdm(waiting.items(), desc="peak memory", unit="model")}
            models = {name: load_model(path, s.speed_dtype) for name, path in folders.items()}
            measurements = measure_speed(models, **sizes, n_repeats=s.n_repeats, seed=s.seed)
            measurements.to_csv(folder / "measurements.csv", index=False)
            return {"memory": memory, "dtype": str(dtype).removeprefix("torch."),
                    "parameters_read_per_token": {n: parameters_read_per_token(m) for n, m in models.items()}}
        return self._stage("speed", _SPEED, make)

    # ---- where things lie --------------------------------------------------------------------------------------

    @property
    def folder(self) -> Path:
        """Folder of everything made from this model."""
        slug = re.sub(r"[^a-z0-9]+", "-", self.checkpoint.label.lower()).strip("-")
        return results.runs_root() / f"{slug}-{self.checkpoint.sha256[:8]}"

    def _folder(self, stage: str, names: tuple[str, ...]) -> Path:
        key = self.settings.key(names, model=self.checkpoint.sha256, text=self.corpus.sha256, code=code_digest())
        return self.folder / f"{stage}-{key}"

    def _stage(self, stage: str, names: tuple[str, ...], make) -> Path:
        target = self._folder(stage, names)
        if not target.exists():
            with write_whole(target, replace=False) as partial:
                partial.mkdir()
                started = perf_counter()
                facts = make(partial)
                write_json(partial / "result.json", facts | {
                    "stage": stage, "seconds": round(perf_counter() - started, 1),
                    "settings": {name: getattr(self.settings, name) for name in names}, "origin": self.origin()})
        return target

    def origin(self) -> dict:
        """Provenance of whatever this run writes: model, text, hashes, versions, machine."""
        return results.provenance() | {
            "model": self.checkpoint.label, "model_sha256": self.checkpoint.sha256, "n_layers": self.n_layers,
            "text": self.corpus.label, "text_sha256": self.corpus.sha256, "code_sha256": code_digest()}

    def finish(self, notebook: str, headline: dict, tables: dict[str, pd.DataFrame], figures: dict) -> Path:
        """Last cell of a notebook: write its tables (CSV), figures (PNG) and `result.json`, whole or not at all.

        Args:
            notebook: its file name without ending.
            headline: the few numbers or words that the closing summary shows.
            tables, figures: name -> data frame, name -> matplotlib figure.
        """
        names = tuple(sorted(set(asdict(self.settings)) - {"result_file"}))
        target = self._folder(notebook, names)
        with write_whole(target) as partial:
            partial.mkdir()
            for name, table in tables.items():
                table.to_csv(partial / f"{name}.csv", index=False)
            for name, figure in figures.items():
                figure.savefig(partial / f"{name}.png", dpi=150, bbox_inches="tight")
            result = {"notebook": notebook, "headline": headline, "folder": str(target),
                      "seconds": round(perf_counter() - self.started, 1),
                      "peak_memory_gib": round(results.peak_memory_gib(), 2),
                      "settings": {name: getattr(self.settings, name) for name in names}, "origin": self.origin()}
            write_json(partial / "result.json", result)
        if self.settings.result_file:
            write_json(Path(self.settings.result_file), result)
        return target


@functools.cache
def code_digest() -> str:
    """Hash of this package's code, so that results of older code are never taken for today's (pictures aside)."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        if path.name != "plots.py":
            digest.update(path.read_bytes())
    return digest.hexdigest()
