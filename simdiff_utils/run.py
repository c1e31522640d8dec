"""A run: one model, one text, one set of settings; what it reads, loaded when first needed, and where results
lie.

A stage's folder carries a hash of the settings that the stage depends on, of the model's weights, of the text
and of this package's code. Changing the number of layers to remove reuses the capture; nothing stale is ever
read.
"""

import functools
import hashlib
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from time import perf_counter

import pandas as pd
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from simdiff_utils import provenance
from simdiff_utils.engine.decoder import Decoder, open_decoder
from simdiff_utils.engine.load import load_tokenizer
from simdiff_utils.files import read_json, write_json, write_kept, write_whole
from simdiff_utils.models.checkpoints import hash_once, resolve_checkpoint
from simdiff_utils.settings import Settings, SimDiffError, check_n_remove
from simdiff_utils.text.blocks import draw_blocks, token_blocks
from simdiff_utils.text.corpus import Corpus, load_corpus

_HASHES = "hashes.json"  # of a stage's files, written last
_HOW_NOT_WHAT = {
    "result_file",
    "memory_gib",
    "export_to",
    "overwrite",
    "trust_remote_code",
}  # they change no number


class RunFolder:
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
        self.checkpoint = resolve_checkpoint(settings.model, settings.trust_remote_code)
        config = AutoConfig.from_pretrained(self.checkpoint.folder).get_text_config()
        self.n_layers: int = config.num_hidden_layers
        self.grid = settings.n_remove_grid
        default = set(Settings().n_remove_grid)
        if default <= set(self.grid):  # nobody asked for the default ones: keep those that fit the model
            self.grid = [
                n_remove for n_remove in self.grid if n_remove < self.n_layers or n_remove not in default
            ]
        for n_remove in self.grid:
            check_n_remove(n_remove, self.n_layers)
        if (
            settings.n_remove != Settings.n_remove
        ):  # the default is checked where it is used: 01 and 02 have none
            check_n_remove(settings.n_remove, self.n_layers)
        context = getattr(config, "max_position_embeddings", None)
        if context and settings.seq_len > context:
            raise SimDiffError(
                f"seq_len = {settings.seq_len} is longer than the context of {context} tokens that "
                f"{self.checkpoint.label} was built for; lower seq_len."
            )

    @functools.cached_property
    def decoder(self) -> Decoder:
        """The dense model in `settings.dtype`, in memory or streamed as `settings.memory_gib` allows."""
        return open_decoder(
            self.checkpoint.folder,
            self.settings.dtype,
            self.settings.memory_gib,
            self.settings.batch_size * self.settings.seq_len,
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
        """Token ids [n, seq_len]: `train` draws the calibration samples at random, the others are spread
        evenly."""
        name = {"train": "n_samples", "validation": "n_validation", "test": "n_test"}[split]
        seed = self.settings.seed if split == "train" else None
        return draw_blocks(self.split_blocks(split), getattr(self.settings, name), seed, parameter=name)

    # ---- where things lie
    # --------------------------------------------------------------------------------------

    @property
    def folder(self) -> Path:
        """Folder of everything made from this model."""
        slug = re.sub(r"[^a-z0-9]+", "-", self.checkpoint.label.lower()).strip("-")
        return provenance.runs_root() / f"{slug}-{self.checkpoint.sha256[:8]}"

    def _folder(self, stage: str, names: tuple[str, ...]) -> Path:
        return self.folder / f"{stage}-{self._key(names, text=self.corpus.sha256)}"

    def _key(self, names: tuple[str, ...], **identity: str) -> str:
        return self.settings.key(names, model=self.checkpoint.sha256, **identity, **self._made_by())

    def _made_by(self) -> dict[str, str]:
        """What makes the results, as it enters the names of their folders: this package's code."""
        return {"code": code_digest()}

    def _stage(self, stage: str, names: tuple[str, ...], make: Callable[[Path], dict]) -> Path:
        """Folder of a stage, made by `make` (which returns its facts) if it is not there yet, or was damaged
        since."""
        target = self._folder(stage, names)
        if not is_sound(target):
            if target.exists():
                tqdm.write(
                    f"{target.name} is damaged (a file of it is not as it was written): made again.",
                    file=sys.stderr,
                )
                shutil.rmtree(target)
            with write_whole(target, replace=False) as partial:
                partial.mkdir()
                started = perf_counter()
                facts = make(partial)
                write_json(
                    partial / "result.json",
                    facts
                    | {
                        "stage": stage,
                        "seconds": round(perf_counter() - started, 1),
                        "settings": {name: getattr(self.settings, name) for name in names},
                        "origin": self.origin(),
                    },
                )
                write_json(partial / _HASHES, _hash_folder(partial))
        return target

    def origin(self) -> dict:
        """Provenance of whatever this run writes: model, text, hashes, versions, machine."""
        return provenance.provenance() | {
            "model": self.checkpoint.label,
            "model_sha256": self.checkpoint.sha256,
            "n_layers": self.n_layers,
            "text": self.corpus.label,
            "text_sha256": self.corpus.sha256,
            "code_sha256": code_digest(),
        }

    def finish(self, notebook: str, headline: dict, tables: dict[str, pd.DataFrame], figures: dict) -> Path:
        """Last cell of a notebook: write its tables (CSV), figures (PNG) and `result.json`, whole or not at
        all.

        Args:
            notebook: its file name without ending.
            headline: the few numbers or words that the closing summary shows.
            tables, figures: name -> data frame, name -> matplotlib figure.
        """
        names = tuple(sorted(set(asdict(self.settings)) - _HOW_NOT_WHAT))
        target = self.folder / f"{notebook}-{self._key(names, text=self.corpus.sha256)}"
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
                "peak_memory_gib": round(provenance.peak_memory_gib(), 2),
                "settings": {name: getattr(self.settings, name) for name in names},
                "origin": self.origin(),
            }
            write_json(partial / "result.json", result)
        if self.settings.result_file:
            write_kept(Path(self.settings.result_file), result)
        return target


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


@functools.cache
def code_digest() -> str:
    """Hash of this package's code, so that results of older code are never taken for today's (pictures
    aside)."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        if not path.name.startswith("plots"):
            digest.update(path.read_bytes())
    return digest.hexdigest()
