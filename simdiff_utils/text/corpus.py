"""Text: corpora with a fixed train, validation and test split, and their token blocks.

Train is for calibration and recovery, validation for choosing alpha, test for reported numbers, never for
choosing.
"""

import functools
import gzip
import hashlib
import itertools
import json
import re
from dataclasses import dataclass
from pathlib import Path

from simdiff_utils import SimDiffError, assets, one_line
from simdiff_utils.files import repository_root
from simdiff_utils.text.wikipedia import load_articles

SPLITS = ("train", "validation", "test")
SUFFIXES = (".txt", ".md", ".txt.gz", ".jsonl", ".jsonl.gz")
OFFLINE_HINT = "offline, name a local .txt or .jsonl file, or embedded:wikipedia"


@dataclass(frozen=True)
class Corpus:
    """A text in three parts: `documents` maps train, validation and test to lists of documents."""

    label: str
    licence: str
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
        asset = assets.ASSETS["wikipedia"]
        return Corpus(asset.label, asset.licence, _split_rows(load_articles()))
    if text == "wikitext2":
        return _load_hub("Salesforce/wikitext", "wikitext-2-raw-v1", "WikiText-2 (raw)", "CC BY-SA")
    path = _find_file(text)
    if path is not None:
        return _check_splits(text, Corpus(path.name, "the user's own", _read_file(path)))
    if re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", text) and not text.endswith(SUFFIXES):
        name, _, config = text.partition(":")
        return _load_hub(name, config or None, text, "see the data set's page")
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
    places = [
        Path(data_folder).expanduser() / "wikitext2" / name for name in ("wiki.test.raw.gz", "wiki.test.raw")
    ]
    path = next((path for path in places if path.is_file()), None)
    if path is None:
        raise SimDiffError(
            f"there is no wikitext2/wiki.test.raw.gz in {data_folder}: put it there, or leave data_folder "
            "empty where the hub can be reached."
        )
    return [f"{line}\n" if line.strip() else "" for line in _read_text(path).removesuffix("\n").split("\n")]


def _split_rows(rows: list[str]) -> dict[str, list[str]]:
    """Every tenth row, from the fifth on, to validation, every tenth to test: neighbours share topics, so
    mix."""
    split_of = {4: "validation", 9: "test"}
    documents: dict[str, list[str]] = {split: [] for split in SPLITS}
    for i, row in enumerate(rows):
        documents[split_of.get(i % 10, "train")].append(row)
    return documents


def _split_characters(text: str) -> dict[str, list[str]]:
    """Paragraphs, one after another: to train those in the first 80 % of the characters, 10 % to each other
    split."""
    chunks = [chunk.strip("\n") for chunk in re.split(r"\n\s*\n", text) if chunk.strip()]
    ends = list(itertools.accumulate(map(len, chunks)))
    documents: dict[str, list[str]] = {split: [] for split in SPLITS}
    for chunk, end in zip(chunks, ends, strict=True):
        middle = (end - len(chunk) / 2) / ends[-1]
        documents["train" if middle < 0.8 else "validation" if middle < 0.9 else "test"].append(chunk)
    return documents


def _check_splits(text: str, corpus: Corpus) -> Corpus:
    empty = [split for split in SPLITS if not corpus.documents[split]]
    if empty:
        raise SimDiffError(
            f"{text} is too short: nothing is left for {' and '.join(empty)}; give at least ten "
            "documents, or ten paragraphs between blank lines."
        )
    return corpus


def _find_file(text: str) -> Path | None:
    """The file of that name, seen from here or from the repository's root (notebooks run in their own
    folder)."""
    candidates = (Path(text).expanduser(), repository_root() / text)
    path = next((path for path in candidates if path.is_file()), None)
    if path is not None and not path.name.endswith(SUFFIXES):
        raise SimDiffError(
            f"{path.name} is no text this can read: it must end in one of {', '.join(SUFFIXES)}."
        )
    return path


def _read_file(path: Path) -> dict[str, list[str]]:
    content = _read_text(path)
    if path.name.removesuffix(".gz").endswith(".jsonl"):
        return _split_rows(
            [
                _read_row(line, f"line {i} of {path.name}")
                for i, line in enumerate(content.split("\n"), start=1)
                if line.strip()
            ]
        )
    return _split_characters(content)


def _read_text(path: Path) -> str:
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig") as file:
            return file.read()
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise SimDiffError(f"cannot read {path.name} as UTF-8 text ({error}).") from error


def _read_row(line: str, where: str) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise SimDiffError(f"{where} is not JSON ({error}).") from error
    for field in ("text", "page"):
        if isinstance(row, dict) and isinstance(row.get(field), str):
            return row[field]
    raise SimDiffError(f"{where} has no field `text` or `page` that holds a text.")


def _load_hub(name: str, config: str | None, label: str, licence: str) -> Corpus:
    """A hub data set with its own three splits; where one is missing, its first split by rows.

    Rows stay as they are, empty ones too: WikiText-2 joined by blank lines is what published perplexities
        use.
    """
    import datasets  # here, not above: slow to import, and needed by few

    try:
        loaded = datasets.load_dataset(name, config)
    except Exception as error:  # a dozen kinds, from no connection to no such config; all end the same way
        reason = one_line(error)[:200]
        advice = "accept the licence on its page, then `hf auth login`" if "gated" in reason else OFFLINE_HINT
        raise SimDiffError(
            f"cannot load {name} from the Hugging Face hub ({reason}): check the name; {advice}."
        ) from error
    parts = {split: loaded[split] for split in SPLITS if split in loaded} or {
        "train": next(iter(loaded.values()))
    }
    columns = next(iter(parts.values())).column_names
    if "text" not in columns:
        raise SimDiffError(f"the data set {label} has no column `text`; it has {', '.join(columns)}.")
    rows = {split: [row or "" for row in part["text"]] for split, part in parts.items()}
    documents = rows if len(rows) == len(SPLITS) else _split_rows(next(iter(rows.values())))
    return _check_splits(label, Corpus(label, licence, documents))
