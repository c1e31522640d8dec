"""What a task's results depend on, and where they are kept: a small JSON file for each task and set."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from simdiff_utils.comparison.tasks.load import TaskRows
from simdiff_utils.files import read_kept, write_kept

Removed = frozenset[int]


@dataclass
class Job:
    """One task for all sets.

    Attributes:
        rows: the task and its rows.
        facts: all that results depend on beside the set; their key.
        paths: set -> where its results are kept; None: nowhere.
        known: set -> its results, a row a metric.
    """

    rows: TaskRows
    facts: dict
    paths: dict[Removed, Path | None]
    known: dict[Removed, list[dict]]

    @classmethod
    def plan(cls, rows: TaskRows, shared: dict, sets: tuple[Removed, ...], folder: Path | None) -> "Job":
        """The job with what of it is known already.

        Args:
            shared: facts that are the same for all tasks.
        """
        # no examples are ever shown; both facts stay in the key, so that results kept before are found
        no_shots = {"n_shots": 0, "shots_sha256": ""}
        facts = shared | no_shots | {"task": rows.task, "task_version": rows.version} | origin(rows)
        paths = {removed: folder and _path(Path(folder), removed, facts) for removed in sets}
        kept = {removed: read_kept(path) for removed, path in paths.items() if path}
        known = {removed: data["results"] for removed, data in kept.items() if data}
        # what an older version kept without the single answers is asked again
        known = {removed: rows for removed, rows in known.items() if all("hits" in row for row in rows)}
        return cls(rows, facts, paths, known)

    @property
    def unknown(self) -> tuple[Removed, ...]:
        """Sets that have to be computed."""
        return tuple(removed for removed in self.paths if removed not in self.known)

    def keep(self, removed: Removed, results: list[dict]) -> None:
        """Note the results of a set, on disk too where there is a folder."""
        if self.paths[removed]:
            write_kept(self.paths[removed], {"results": results, "depends_on": self.facts})
        self.known[removed] = results


def origin(rows: TaskRows) -> dict[str, str]:
    """Where the scored rows came from, and their hash."""
    return {"source": rows.source, "split": rows.split, "data_sha256": rows.sha256}


def _path(folder: Path, removed: Removed, facts: dict) -> Path:
    key = json.dumps(facts | {"removed": sorted(removed)}, sort_keys=True, default=str)
    name = f"{facts['task']}-{f'without-{len(removed)}' if removed else 'dense'}"
    return folder / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def hash_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of all that turns text into tokens; padding and truncation, whoever set them, do not enter."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = json.loads(backend.to_str()) if backend else tokenizer.get_vocab()
    parts = {name: part for name, part in parts.items() if name not in ("padding", "truncation")}
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    whole = json.dumps([type(tokenizer).__name__, parts, special], sort_keys=True)
    return hashlib.sha256(whole.encode()).hexdigest()
