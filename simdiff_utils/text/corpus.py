"""Corpora: texts with a fixed train, validation and test split.

Train is for calibration and recovery, validation for choosing alpha, test for reported numbers, never for
choosing.
"""

import functools
import hashlib
import itertools
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from simdiff_utils import SimDiffError, assets
from simdiff_utils.text.hub import load_hub, split_name
from simdiff_utils.text.rows import check_characters, find_file, read_rows, read_text
from simdiff_utils.text.wikipedia import load_articles

SPLITS = ("train", "validation", "test")
SUFFIXES = (".txt", ".md", ".txt.gz", ".jsonl", ".jsonl.gz")
OFFLINE_HINT = "offline, name a local .txt or .jsonl file, or embedded:wikipedia"


@dataclass(frozen=True)
class Corpus:
    """A text in three parts: `documents` maps train, validation and test to lists of documents."""

    label: str
    documents: dict[str, list[str]]

    @functools.cached_property
    def sha256(self) -> str:
        """Hash of the documents and of how they are split; the label does not enter."""
        return hashlib.sha256(json.dumps([self.documents[split] for split in SPLITS]).encode()).hexdigest()


def load_corpus(text: str) -> Corpus:
    """Load a text by name.

    Args:
        text: `embedded:wikipedia`; `wikitext2`; a local file (.txt, .md, .txt.gz: cut into 80, 10 and 10 % of
            its characters; .jsonl, .jsonl.gz: one document a row, in the field `text` or `page`, every tenth
            row to validation and to test); or a hub data set `org/name` or `org/name:config` with a column
            `text`.

    Raises:
        SimDiffError: nothing of that name, the hub cannot be reached, or a file that cannot be read or split.
    """
    if text == "embedded:wikipedia":
        return Corpus(assets.ASSETS["wikipedia"].label, _split_rows(load_articles()))
    if text == "wikitext2":
        return _load_splits("WikiText-2 (raw)", "Salesforce/wikitext", "wikitext-2-raw-v1")
    if path := find_file(text):
        return Corpus(path.name, _check_splits(text, _read_file(path)))
    if (name := split_name(text)) and not text.endswith(SUFFIXES):
        return _load_splits(text, *name)
    raise SimDiffError(
        f"there is no text {text!r}: give embedded:wikipedia, wikitext2, an existing file "
        f"({', '.join(SUFFIXES)}) or a hub data set as org/name."
    )


def load_wikitext2_test(data_folder: str = "") -> list[str]:
    """The rows of WikiText-2's raw test split, as the hub has them: a line each, "" for a blank one.

    Joined by blank lines they are the text whose perplexity GPTQ, SparseGPT, SliceGPT and SimDiff report.

    Args:
        data_folder: a folder with `wikitext2/wiki.test.raw.gz` (or without `.gz`); "" asks the hub.

    Raises:
        SimDiffError: the folder has no such file, or the hub cannot be reached.
    """
    if not data_folder:
        return load_corpus("wikitext2").documents["test"]
    folder = Path(data_folder).expanduser() / "wikitext2"
    places = (folder / "wiki.test.raw.gz", folder / "wiki.test.raw")
    path = next((path for path in places if path.is_file()), None)
    if path is None:
        raise SimDiffError(
            f"there is no wikitext2/wiki.test.raw.gz in {data_folder}: put it there, or leave data_folder "
            "empty where the hub can be reached."
        )
    return [f"{line}\n" if line.strip() else "" for line in read_text(path).removesuffix("\n").split("\n")]


def _split_rows(rows: Iterable[str]) -> dict[str, list[str]]:
    """Every tenth row to test and, from the fifth on, to validation: neighbours share topics, so mix."""
    documents: dict[str, list[str]] = {split: [] for split in SPLITS}
    for i, row in enumerate(rows):
        documents[{4: "validation", 9: "test"}.get(i % 10, "train")].append(row)
    return documents


def _split_characters(text: str) -> dict[str, list[str]]:
    """Paragraphs in sequence: the first 80 % of the characters to train, 10 % to each other split."""
    paragraphs = [part.strip("\n") for part in re.split(r"\n\s*\n", text) if part.strip()]
    ends = list(itertools.accumulate(map(len, paragraphs)))
    documents: dict[str, list[str]] = {split: [] for split in SPLITS}
    for paragraph, end in zip(paragraphs, ends, strict=True):
        middle = (end - len(paragraph) / 2) / ends[-1]
        documents["train" if middle < 0.8 else "validation" if middle < 0.9 else "test"].append(paragraph)
    return documents


def _check_splits(text: str, documents: dict[str, list[str]]) -> dict[str, list[str]]:
    if empty := [split for split in SPLITS if not documents[split]]:
        raise SimDiffError(
            f"{text} is too short: nothing is left for {' and '.join(empty)}; give at least ten "
            "documents, or ten paragraphs between blank lines."
        )
    return documents


def _read_file(path: Path) -> dict[str, list[str]]:
    if not path.name.endswith(SUFFIXES):
        raise SimDiffError(
            f"{path.name} is no text this can read: it must end in one of {', '.join(SUFFIXES)}."
        )
    if path.name.removesuffix(".gz").endswith(".jsonl"):
        return _split_rows(_read_documents(path))
    return _split_characters(read_text(path))


def _read_documents(path: Path) -> Iterable[str]:
    for i, row in enumerate(read_rows(path), start=1):
        fields = [row.get(name) for name in ("text", "page")] if isinstance(row, dict) else []
        document = next((field for field in fields if isinstance(field, str)), None)
        if document is None:
            raise SimDiffError(f"row {i} of {path.name} has no field `text` or `page` that holds a text.")
        check_characters(document, i, path.name)
        yield document


def _load_splits(label: str, name: str, config: str | None) -> Corpus:
    """A hub data set with its own three splits; where one is missing, its first split by rows.

    Rows stay as they are, empty ones too: published perplexities are of WikiText-2 joined by blank lines.
    """
    loaded = load_hub(name, config, OFFLINE_HINT)
    parts = {split: loaded[split] for split in SPLITS if split in loaded} or {
        "train": next(iter(loaded.values()))
    }
    columns = next(iter(parts.values())).column_names
    if "text" not in columns:
        raise SimDiffError(f"the data set {label} has no column `text`; it has {', '.join(columns)}.")
    rows = {split: [row or "" for row in part["text"]] for split, part in parts.items()}
    documents = rows if len(rows) == len(SPLITS) else _split_rows(next(iter(rows.values())))
    return Corpus(label, _check_splits(label, documents))
