"""A run: one model, one text, one set of settings; what it reads, and where what it makes is kept.

A stage is made once and kept in a folder whose name carries its key: a hash of the groups of settings that it
depends on, of the model's weights, of the text, and of the code of its room and of the rooms below. Changing
the number of layers to remove reuses the capture; nothing stale is ever read.
"""

import hashlib
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import pandas as pd
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from simdiff_utils import SimDiffError, require
from simdiff_utils.engine.decoder import Decoder, open_decoder
from simdiff_utils.engine.load import load_tokenizer, read_config
from simdiff_utils.files import hash_facts, read_json, write_json, write_kept, write_whole
from simdiff_utils.models.checkpoints import hash_once, resolve_checkpoint
from simdiff_utils.provenance import code_digest, peak_memory_gib, provenance, runs_root
from simdiff_utils.settings import Delivery, Group, Handling, Settings
from simdiff_utils.text.blocks import check_token_ids, draw_blocks, token_blocks
from simdiff_utils.text.corpus import Corpus, load_corpus

_HASHES = "hashes.json"  # of a stage's files, written last
_SIZES = {
    "train": "n_samples",
    "validation": "n_validation",
    "test": "n_test",
}  # split -> how many of its blocks


class Run:
    """One model, one text, one set of settings. Model, tokenizer and text are loaded when first needed.

    Attributes:
        settings: as the notebook gave them.
        checkpoint: the dense model's folder, label and hash.
        n_layers, n_embeddings: of the dense model.
        grid: the numbers of layers to compare.
        shared: what rooms keep in memory for this model and text, by name; runs made by `replace` share it.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.started = perf_counter()
        self.shared: dict[object, object] = {}
        self.checkpoint = resolve_checkpoint(settings.model, settings.trust_remote_code)
        config = read_config(self.checkpoint.folder).get_text_config()
        self.n_layers: int = config.num_hidden_layers
        self.n_embeddings: int | None = getattr(config, "vocab_size", None)
        self.grid = settings.n_remove_grid
        default = set(Settings().n_remove_grid)
        if default <= set(self.grid):  # nobody asked for the default ones: keep those that fit the model
            self.grid = [k for k in self.grid if k < self.n_layers or k not in default] or [1]
        asked = {settings.n_remove} - {Settings().n_remove}  # 01 and 02 have none
        for n_remove in (*self.grid, *asked):
            check_n_remove(n_remove, self.n_layers)
        context = getattr(config, "max_position_embeddings", None)
        if context and settings.seq_len > context:
            raise SimDiffError(
                f"seq_len = {settings.seq_len} is longer than the context of {context} tokens that "
                f"{self.checkpoint.label} was built for; lower seq_len."
            )

    def replace(self, **settings: object) -> "Run":
        """The same run with other settings; what was loaded or computed for this model and text is shared."""
        other = object.__new__(Run)
        vars(other).update(vars(self), settings=self.settings.replace(**settings))
        return other

    def once(self, name: object, make: Callable[[], object]) -> object:
        """What `make` returns, made once for all runs that share this model and text."""
        if name not in self.shared:
            self.shared[name] = make()
        return self.shared[name]

    # ---- what is read ----------------------------------------------------------------------------

    @property
    def decoder(self) -> Decoder:
        """The dense model in `settings.dtype`, in memory or streamed as `settings.memory_gib` allows."""
        s = self.settings
        return self.once(
            ("decoder", s.dtype),
            lambda: open_decoder(self.checkpoint.folder, s.dtype, s.memory_gib, s.batch_size * s.seq_len),
        )

    @property
    def model(self) -> PreTrainedModel:
        """The dense model, whole in memory."""
        if self.decoder.streamed:
            raise SimDiffError(
                f"{self.checkpoint.label} is streamed from disk, and this step needs it in memory: "
                "raise memory_gib where there is room."
            )
        return self.decoder.model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The checkpoint's tokenizer."""
        folder, trusted = self.checkpoint.folder, self.settings.trust_remote_code
        return self.once("tokenizer", lambda: load_tokenizer(folder, trusted))

    @property
    def corpus(self) -> Corpus:
        """The text with its three splits."""
        return self.once("corpus", lambda: load_corpus(self.settings.text))

    def split_blocks(self, split: str) -> Tensor:
        """Every block of a split, [n_blocks, seq_len]; tokenised once."""
        seq_len = self.settings.seq_len

        def make() -> Tensor:
            blocks = token_blocks(self.tokenizer, self.corpus.documents[split], seq_len)
            check_token_ids(int(blocks.max()), self.n_embeddings)
            return blocks

        return self.once(("blocks", split, seq_len), make)

    def blocks(self, split: str) -> Tensor:
        """Token ids [n, seq_len]: `train` draws the calibration samples at random, the others are spread
        evenly."""
        name = _SIZES[split]
        seed = self.settings.seed if split == "train" else None
        return draw_blocks(self.split_blocks(split), getattr(self.settings, name), seed, parameter=name)

    # ---- what is made ----------------------------------------------------------------------------

    @property
    def folder(self) -> Path:
        """Folder of everything made from this model."""
        slug = re.sub(r"[^a-z0-9]+", "-", self.checkpoint.label.lower()).strip("-")
        return runs_root() / f"{slug}-{self.checkpoint.sha256[:8]}"

    def stage_folder(self, stage: str, room: str, groups: tuple[type[Group], ...], **facts: object) -> Path:
        """Where a stage lies or will lie.

        Args:
            room: the module whose code makes it, such as "simdiff_utils.capture"; rooms below it count as
                well.
            groups: of the settings that it depends on.
            facts: whatever else it depends on.
        """
        made_of = {"model": self.checkpoint.sha256, "text": self.corpus.sha256, "code": code_digest(room)}
        return self.folder / f"{stage}-{hash_facts(self.settings.of(*groups) | made_of | facts)}"

    def stage(
        self,
        stage: str,
        room: str,
        groups: tuple[type[Group], ...],
        make: Callable[[Path], dict],
        **facts: object,
    ) -> Path:
        """Folder of a stage, made by `make` (which returns its facts) if it is not there yet, or was damaged
        since."""
        target = self.stage_folder(stage, room, groups, **facts)
        if is_sound(target):
            return target
        if target.exists():
            said = f"{target.name} is damaged (a file of it is not as it was written): made again."
            tqdm.write(said, file=sys.stderr)
            shutil.rmtree(target)
        with write_whole(target, replace=False) as partial:
            partial.mkdir()
            started = perf_counter()
            result = make(partial) | {"stage": stage, "seconds": round(perf_counter() - started, 1)}
            write_json(
                partial / "result.json",
                result | {"settings": self.settings.of(*groups), "origin": self.origin()},
            )
            write_json(partial / _HASHES, _hash_folder(partial))
        return target

    def origin(self) -> dict:
        """Provenance of whatever this run writes: model, text, hashes, versions, machine."""
        return provenance() | {
            "model": self.checkpoint.label,
            "model_sha256": self.checkpoint.sha256,
            "n_layers": self.n_layers,
            "text": self.corpus.label,
            "text_sha256": self.corpus.sha256,
            "code_sha256": code_digest("simdiff_utils"),
        }

    def finish(self, notebook: str, headline: dict, tables: dict[str, pd.DataFrame], figures: dict) -> Path:
        """Last cell of a notebook: write its tables (CSV), figures (PNG) and `result.json`, whole or not at
        all.

        Args:
            notebook: its file name without ending.
            headline: the few numbers or words that the closing summary shows.
            tables, figures: name -> data frame, name -> matplotlib figure; None where there is nothing to
                show.
        """
        how = {*Handling.model_fields, *Delivery.model_fields}
        settings = {name: value for name, value in self.settings if name not in how}
        key = hash_facts(settings | {"model": self.checkpoint.sha256, "text": self.corpus.sha256})
        target = self.folder / f"{notebook}-{key}"
        with write_whole(target) as partial:
            partial.mkdir()
            for name, table in tables.items():
                table.to_csv(partial / f"{name}.csv", index=False)
            for name, figure in figures.items():
                figure.savefig(partial / f"{name}.png", dpi=150, bbox_inches="tight")
            result = {
                "notebook": notebook,
                "headline": headline,
                "folder": str(target),
                "seconds": round(perf_counter() - self.started, 1),
                "peak_memory_gib": round(peak_memory_gib(), 2),
                "settings": settings,
                "origin": self.origin(),
            }
            write_json(partial / "result.json", result)
        if self.settings.result_file:
            write_kept(Path(self.settings.result_file), result)
        return target


def check_n_remove(n_remove: int, n_layers: int) -> None:
    """Refuse a number of layers to remove outside [1, n_layers - 1]."""
    require(n_layers > 1, "a model of one layer has none that could be removed.")
    require(
        1 <= n_remove < n_layers,
        f"n_remove must lie between 1 and {n_layers - 1} for a model of {n_layers} layers, got {n_remove}.",
    )


def hash_blocks(blocks: Tensor) -> str:
    """sha256 of token ids: what was measured on them is found again by it."""
    return hashlib.sha256(blocks.numpy().tobytes()).hexdigest()


def _hash_folder(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hash_once(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path != folder / _HASHES
    }


def is_sound(folder: Path) -> bool:
    """Whether a stage's folder holds just what was written there."""
    try:
        return read_json(folder / _HASHES) == _hash_folder(folder)
    except (OSError, ValueError):
        return False
