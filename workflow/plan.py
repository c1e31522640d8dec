"""Grids: from a config that names many models, criteria and numbers of layers to the notebook runs it asks
for.

A run's result file carries in its name a hash of the settings that its notebook reads, and of nothing else.
So a number of layers that is added later, or a setting of one notebook that is changed, makes new files for
just what depends on it.
"""

import ast
import base64
import contextlib
import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from itertools import product
from pathlib import Path

from simdiff_utils import SimDiffError
from simdiff_utils.settings import REPAIRS, TRAININGS, Settings

NOTEBOOKS = {
    "01": "01_calibration_capture",
    "02": "02_criterion_derivation",
    "03": "03_pruning",
    "04": "04_lora_recovery",
    "05": "05_speedup_measurement",
    "06": "06_comparison",
}
ASKED = {"pruning": "03", "recovery": "04", "speed": "05", "comparison": "06"}  # config key -> notebook
AXES = (
    "model",
    "seed",
    "criterion",
    "n_remove",
)  # settings that may be lists of values, each with runs of its own
FROM_MAKE = {
    "model": "SIMDIFF_MODEL",
    "text": "SIMDIFF_TEXT",
    "n_remove": "SIMDIFF_K",
    "criterion": "SIMDIFF_CRITERION",
    "alpha": "SIMDIFF_ALPHA",
    "dtype": "SIMDIFF_DTYPE",
}
_LOCAL = {"model": "*", "text": "*", "data_folder": "*/*"}  # settings that may name a folder -> its files
_WORDS = {"true": True, "false": False}


@dataclass(frozen=True)
class NotebookRun:
    """One notebook to be run.

    Attributes:
        notebook: its file name without ending.
        settings: what papermill gives it; every name is in its parameters cell.
        after: result files of the runs that have to be done before it: their stages are read, not their
            files.
    """

    notebook: str
    settings: dict
    after: tuple[str, ...] = ()


def read_config(config: Mapping, environment: Mapping[str, str]) -> dict:
    """A grid's config and what `make` was given, as {key: value}; words become what the setting's type
    wants."""
    asked = dict(config)
    if "encoded" in asked:
        asked = json.loads(base64.urlsafe_b64decode(asked["encoded"] + "==="))
    asked |= {
        name: environment[variable] for name, variable in FROM_MAKE.items() if environment.get(variable)
    }
    types = {field.name: field.type for field in fields(Settings)}
    types["gpu_gib"] = float
    return {name: _convert(value, types.get(name)) for name, value in asked.items()}


def encode_config(config: Mapping) -> str:
    """A config as one word of letters, digits, - and _, which `read_config` reads as the value of the key
    `encoded`."""
    if "encoded" in config:
        return config["encoded"]
    return base64.urlsafe_b64encode(json.dumps(dict(config)).encode()).decode().rstrip("=")


def _convert(value: object, wanted: object) -> object:
    """A word, or each word of a list or mapping, as the setting's type wants it; Settings refuses what is no
    such."""
    if isinstance(value, list):
        return [_convert(item, wanted) for item in value]
    if isinstance(value, dict):
        return {model: _convert(item, wanted) for model, item in value.items()}
    with contextlib.suppress(KeyError, ValueError):
        if isinstance(value, str):
            return {int: int, list[int]: int, float: float, float | str: float, bool: _WORDS.__getitem__}[
                wanted
            ](value)
    return value


def plan_runs(asked: dict, folder: Path) -> dict[str, NotebookRun]:
    """What a config asks for, checked: nothing is loaded, run or written.

    Args:
        asked: see `read_config`; the keys of `ASKED` (`recovery` may also list rungs, such as "linear+lora"),
            `gpu_gib` (see `resources.estimate_needs`), and settings. Those of `AXES` may be lists, every
            other may map each model to its value.
        folder: of the notebooks, whose parameters cells say what each takes.

    Returns:
        result file, relative to the grid's folder -> its run; those that a run comes after are there, too.

    Raises:
        SimDiffError: an unknown key, a setting that no notebook of this grid takes, a wrong type or value.
    """
    asked = dict(asked)
    gpu_gib = asked.pop("gpu_gib", 0)
    if type(gpu_gib) not in (int, float) or gpu_gib < 0:
        raise SimDiffError(f"gpu_gib has to be the memory of one GPU in GiB, or 0 for none; got {gpu_gib!r}.")
    wanted = {
        number: value
        for key, number in ASKED.items()
        if (value := _asked_for(key, asked.pop(key, key == "pruning")))
    }
    if not wanted:
        raise SimDiffError(f"nothing is asked for: one of {', '.join(ASKED)} has to be true.")
    if unknown := set(asked) - {field.name for field in fields(Settings)}:
        raise SimDiffError(f"unknown config key {', '.join(sorted(unknown))}; see the head of the Snakefile.")
    axes = {
        name: value if isinstance(value := asked.pop(name, getattr(Settings, name)), list) else [value]
        for name in AXES
    }
    for name, values in axes.items():
        if not values:
            raise SimDiffError(f"{name} is an empty list: there is nothing to run.")
    if len(axes["model"]) > 1 and asked.get("trust_remote_code") is True:
        raise SimDiffError(
            "trust_remote_code is turned on model by model, as in trust_remote_code: "
            f"{{{axes['model'][0]}: true, {axes['model'][1]}: false}}."
        )
    takes = {number: declared(folder / f"{NOTEBOOKS[number]}.ipynb") for number in _needed(wanted)}
    if ignored := set(asked) - {name for names in takes.values() for name in names}:
        raise SimDiffError(
            f"no notebook of this grid takes {', '.join(sorted(ignored))}: it runs "
            f"{', '.join(NOTEBOOKS[number] for number in takes)}."
        )
    runs: dict[str, NotebookRun] = {}
    for model, seed in product(axes["model"], axes["seed"]):
        given = {name: _pick(name, value, model) for name, value in asked.items()} | {
            "model": model,
            "seed": seed,
        }
        cells = [
            given | {"criterion": criterion, "n_remove": n_remove}
            for criterion, n_remove in product(axes["criterion"], axes["n_remove"])
        ]
        for settings in cells:
            Settings(**settings)
        _plan_model([_locate(settings) for settings in cells], wanted, takes, runs)
    return runs


def _asked_for(key: str, value: object) -> object:
    if isinstance(value, list) and key == "recovery":
        return value
    if str(value).lower() not in _WORDS:
        raise SimDiffError(
            f"{key} has to be true or false{', or a list of rungs' if key == 'recovery' else ''}; got {value!r}."
        )
    return _WORDS[str(value).lower()]


def _needed(wanted: Mapping[str, object]) -> list[str]:
    """Numbers of the notebooks that run: those asked for, and those before them. 06 needs none of the
    others."""
    return [number for number in NOTEBOOKS if number in wanted or (number < "04" and set(wanted) - {"06"})]


def _plan_model(
    cells: list[dict], wanted: Mapping[str, object], takes: dict, runs: dict[str, NotebookRun]
) -> None:
    """Add the runs of one model and seed, given the settings of each (criterion, number of layers)."""

    def add(number: str, settings: dict, after: tuple[str, ...] = (), word: str = "") -> str:
        own = {name: value for name, value in settings.items() if name in takes[number]}
        words = [
            number,
            *([own["criterion"], str(own["n_remove"])] if "criterion" in own else []),
            *filter(None, [word]),
        ]
        name = f"{_slug(settings['model'])}/{'-'.join(words)}-{_digest(own)}.json"
        runs[name] = NotebookRun(NOTEBOOKS[number], own, after)
        return name

    if "01" in takes:
        captured = add("01", cells[0])
        # 02 chooses the sets for every number asked at once, so that 03 finds its own
        grid = sorted(
            {*cells[0].get("n_remove_grid", Settings().n_remove_grid), *(cell["n_remove"] for cell in cells)}
        )
        before = (captured, add("02", cells[0] | {"n_remove_grid": grid}, (captured,)))
        for cell in cells:
            pruned = add("03", cell, before)
            if rungs := wanted.get("04"):
                for rung in [""] if rungs is True else rungs:
                    add("04", cell | (_split_rung(rung) if rung else {}), (pruned,), rung.replace("+", "-"))
            if "05" in wanted:
                add("05", cell, (pruned,))
    if "06" in wanted:  # whoever asks for it here wants it measured; alone it shows what the workbook has
        add("06", {"measure": True} | cells[0])


def _split_rung(rung: str) -> dict[str, str]:
    """Settings of a rung of the ladder of recovery, such as "linear", "lora" or "linear+distillation"."""
    settings = {"repair": "none", "training": "none"}
    for word in str(rung).split("+"):
        kind = "repair" if word in REPAIRS else "training" if word in TRAININGS else None
        if kind is None or word == "none":
            raise SimDiffError(
                f"there is no rung {rung!r} of recovery; a rung is one of {', '.join(REPAIRS[1:])}, one of "
                f"{', '.join(TRAININGS[1:])}, or both with a + between them."
            )
        settings[kind] = word
    return settings


def _pick(name: str, value: object, model: str) -> object:
    """A setting's value for one model, where the config maps each model to its own."""
    if not isinstance(value, dict):
        return value
    if model not in value:
        raise SimDiffError(
            f"{name} is given per model and names no {model}; it names {', '.join(map(str, value))}."
        )
    return value[model]


def _locate(settings: dict) -> dict:
    """Existing files and folders by their full path, since the notebooks run elsewhere; any other name as it
    is."""
    paths = {name: Path(settings[name]).expanduser() for name in _LOCAL if settings.get(name)}
    return settings | {name: str(path.resolve()) for name, path in paths.items() if path.exists()}


def _slug(model: str) -> str:
    return re.sub("[^a-z0-9]+", "-", Path(model).name.lower()).strip("-")[:60] or "model"


def _digest(settings: dict) -> str:
    """Hash of settings; local files count with their state."""
    state = [
        (str(path), path.stat().st_size, path.stat().st_mtime_ns)
        for name, files in _LOCAL.items()
        if os.path.isabs(settings.get(name, ""))
        for root in [Path(settings[name])]
        for path in sorted([root, *root.glob(files)])
        if path.is_file()
    ]
    return hashlib.sha256(json.dumps([settings, state], sort_keys=True).encode()).hexdigest()[:8]


def declared(notebook: Path) -> dict[str, str]:
    """Names in a notebook's parameters cell -> their types as written there.

    papermill's own reader passes over those of a union type.

    Raises:
        SimDiffError: a parameter that is no setting, or of another type than the setting.
    """
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    source = "".join(
        "".join(cell["source"]) for cell in cells if "parameters" in cell["metadata"].get("tags", [])
    )
    names = {
        node.target.id: ast.unparse(node.annotation)
        for node in ast.parse(source).body
        if isinstance(node, ast.AnnAssign)
    }
    for name, written in names.items():
        wanted = type(getattr(Settings(), name, None)).__name__
        if written != wanted:
            raise SimDiffError(
                f"{notebook.name} takes {name} as {written}, "
                + ("which is no setting." if wanted == "NoneType" else f"and the setting is {wanted}.")
                + " Restore its parameters cell."
            )
    return names
