"""Data of benchmark tasks: a folder of local files, the hub, or an embedded copy; on top lm-eval's own task.

lm-eval's task file says the prompt, the target, the metrics and the version; only where the rows come from is
replaced, and all splits but the scored one are taken out of the task: it is asked zero-shot. Tasks that
lm-eval lacks, or cannot load beside transformers 5, stand in `lm_eval_tasks/` of this package.
"""

import functools
import hashlib
import importlib.util
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from simdiff_utils import SimDiffError, one_line
from simdiff_utils.comparison.tasks.sources import (
    MissingData,
    from_embedded,
    from_folder,
    from_hub,
    scored_splits,
)

if TYPE_CHECKING:  # both are slow to import, and not needed until there is a task
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

SOURCES = ("folder", "hub", "embedded")
_NAME_LINE = r"^[\"']?task[\"']?:[ \t]*[\"']?([\w.:-]+)[\"']?[ \t]*$"  # of a task file
_OWN_TASKS = Path(__file__).parent / "lm_eval_tasks"


@dataclass(frozen=True)
class TaskRows:
    """Rows of one task, and what to score them with.

    Attributes:
        task: its name in lm-eval.
        config: the task file, its functions resolved.
        source: "folder", "hub" or "embedded".
        split: name of the scored split, as the task file has it.
        rows: that split's rows.
    """

    task: str
    config: dict
    source: str
    split: str
    rows: "Dataset"

    @property
    def version(self) -> str:
        """Version that the task file states."""
        return str((self.config.get("metadata") or {}).get("version", "none"))

    @property
    def generates(self) -> bool:
        """Answers are texts to be written, not continuations to be scored."""
        return self.config.get("output_type", "generate_until") == "generate_until"

    @functools.cached_property
    def sha256(self) -> str:
        """Hash of the rows as JSON, in order: the same rows from another source hash alike."""
        digest = hashlib.sha256()
        for row in self.rows:
            digest.update(json.dumps(row, sort_keys=True, ensure_ascii=False, default=str).encode() + b"\n")
        return digest.hexdigest()

    def build(self) -> "ConfigurableTask":
        """lm-eval's task over these rows.

        Raises:
            SimDiffError: the rows lack what the task file asks for.
        """
        from lm_eval.api.task import ConfigurableTask

        unread = ("tag", "group", "task_list", "fewshot_config")
        config = {key: value for key, value in self.config.items() if key not in unread}
        for key in ("training_split", "fewshot_split", "validation_split", "test_split"):
            config[key] = self.split if key == self._split_key else None
        if config.get("process_docs"):  # lm-eval asks for the same rows again and again
            config["process_docs"] = functools.cache(config["process_docs"])
        config["custom_dataset"] = lambda **_metadata: {self.split: self.rows}
        try:
            task = ConfigurableTask(config=config)
            for name in map(config.get, ("doc_to_text", "doc_to_target", "doc_to_choice")):
                # lm-eval takes a field that is not there for a text, and scores every answer against it
                if isinstance(name, str) and name.isidentifier() and name not in task.features:
                    raise KeyError(name)
        except Exception as error:  # whatever a task's functions make of a row they do not know
            raise SimDiffError(
                f"lm-eval cannot make a question of the rows of {self.task} ({self.source}; "
                f"{type(error).__name__}: {one_line(error)}): give them the hub's fields."
            ) from error
        return task

    @property
    def _split_key(self) -> str:
        return "test_split" if self.config.get("test_split") == self.split else "validation_split"


@dataclass(frozen=True)
class TaskData:
    """Where tasks find their rows: the first source that has a split to score is taken.

    Attributes:
        folder: local files `<folder>/<task>/<split>.jsonl.gz` (or .jsonl) with the hub's field names; the
            parts of a data set may also lie as `<folder>/<data set>/<part>_<split>.jsonl.gz`, such as
            race/high_test.
        sources: those to ask, in this order.
    """

    folder: Path | None = None
    sources: tuple[str, ...] = SOURCES
    _found: dict[str, TaskRows] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.folder is not None and not Path(self.folder).is_dir():
            raise SimDiffError(
                f"there is no data folder {self.folder}: name one that holds <task>/<split>.jsonl.gz."
            )
        if not set(self.sources) <= set(SOURCES):
            raise SimDiffError(
                f"sources must be some of {', '.join(SOURCES)}; got {', '.join(self.sources)}."
            )

    def find(self, task: str) -> TaskRows:
        """The rows of a task, read once.

        Raises:
            SimDiffError: lm-eval has no such task; a file cannot be read.
            MissingData: no source has rows to score.
        """
        if task not in self._found:
            self._found[task] = self._find(task)
        return self._found[task]

    def missing(self, tasks: Iterable[str]) -> dict[str, str]:
        """The tasks whose rows are in no source, each with the sentence for its empty cell."""
        sentences = {}
        for task in tasks:
            try:
                self.find(task)
            except MissingData as error:
                sentences[task] = str(error)
        return sentences

    def _find(self, task: str) -> TaskRows:
        config = _load_config(task)
        local = functools.partial(from_folder, self.folder)
        load = {"folder": local, "hub": from_hub, "embedded": from_embedded}
        reasons = []
        for source in self.sources:
            try:
                return TaskRows(task, config, source, *load[source](task, config))
            except MissingData as error:
                reasons.append(str(error))
        wanted = next(iter(scored_splits(config)), "test")
        raise MissingData(
            f"there are no rows for {task} ({'; '.join(reasons)}): put {task}/{wanted}.jsonl.gz into the "
            "data folder, or leave the task out."
        )


@functools.cache
def _task_files() -> dict[str, Path]:
    """Task -> task file, ours before lm-eval's; of several of a name the first, as in lm-eval.

    lm-eval's own index parses thousands of files: ten times as long as looking for one line in each.
    """
    lm_eval_tasks = Path(importlib.util.find_spec("lm_eval").origin).parent / "tasks"
    files = {}
    for path in [*sorted(_OWN_TASKS.glob("*.yaml")), *sorted(lm_eval_tasks.rglob("*.yaml"))]:
        if name := re.search(_NAME_LINE, path.read_text(encoding="utf-8"), re.MULTILINE):
            files.setdefault(name.group(1), path)
    return files


def _load_config(task: str) -> dict:
    """The task file with its functions; an inline dict would not merge with lm-eval's task of that name."""
    from lm_eval.tasks._yaml_loader import load_yaml

    path = _task_files().get(task)
    if path is None:
        raise SimDiffError(
            f"there is no task {task!r} in lm-eval, or it is a group of tasks: name single ones such as "
            "piqa or arc_easy."
        )
    try:
        config = load_yaml(path)
    except Exception as error:  # of a function's module, such as a package that is not installed
        raise SimDiffError(
            f"lm-eval cannot load its task {task} ({one_line(error)}): leave it out."
        ) from error
    if "class" in config:
        raise SimDiffError(
            f"lm-eval's task {task} is a program of its own, whose rows cannot be replaced: leave it out."
        )
    return config
