"""Grids: from a config that names many models, criteria and numbers of layers to the notebook runs it asks
for.

A run's result file carries in its name a hash of the settings that its notebook reads, and of nothing else.
So a number of layers that is added later, or a setting of one notebook that is changed, makes new files for
just what depends on it.
"""

import ast
import hashlib
import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from types import UnionType
from typing import Annotated, get_origin

from pydantic import Field, TypeAdapter, ValidationError

from simdiff_utils import SimDiffError
from simdiff_utils.parameters import MORE, readable
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
AXES = ("model", "seed", "criterion", "n_remove")  # may be lists of values, each with runs of its own
FROM_MAKE = {
    "model": "SIMDIFF_MODEL",
    "text": "SIMDIFF_TEXT",
    "n_remove": "SIMDIFF_K",
    "target": "SIMDIFF_TARGET",
    "criterion": "SIMDIFF_CRITERION",
    "alpha": "SIMDIFF_ALPHA",
    "dtype": "SIMDIFF_DTYPE",
}
_LOCAL = {"model": "*", "text": "*", "data_folder": "*/*"}  # settings that may name a folder -> its files
_CRITERIA = ("criterion", "criteria", "task_criteria")  # settings that name criteria
_WORDS = {"true": True, "false": False}


@dataclass(frozen=True)
class NotebookRun:
    """One notebook to be run.

    Attributes:
        notebook: its file name without ending.
        settings: those that it reads and that were asked for, by name.
        parameters: the same as papermill gives them: what its cell does not declare stands in `more`.
        after: result files of the runs that have to be done before it: their stages are read, not their
            files.
    """

    notebook: str
    settings: dict
    parameters: dict
    after: tuple[str, ...] = ()


# ---- what is asked for


def setting_types() -> dict[str, object]:
    """Name of each setting -> its type."""
    return {name: field.annotation for name, field in Settings.model_fields.items()}


def read_config(config: Mapping, environment: Mapping[str, str]) -> dict:
    """A grid's config and what `make` was given, as {key: value}; words become what the setting's type
    wants."""
    given = {name: environment[variable] for name, variable in FROM_MAKE.items() if environment.get(variable)}
    types = setting_types() | {"gpu_gib": float}
    return {
        name: _read_words(value, types[name]) if name in types else value
        for name, value in {**config, **given}.items()
    }


def _read_words(value: object, wanted: object) -> object:
    """Words, which is all that `make` and lists on the command line give, as numbers where those are wanted.

    What does not become one stays as it is, for Settings to refuse.
    """
    if isinstance(value, dict):  # each model's own
        return {model: _read_words(item, wanted) for model, item in value.items()}
    if isinstance(value, list) and get_origin(wanted) is not list:  # an axis
        return [_read_words(item, wanted) for item in value]
    if isinstance(wanted, UnionType):  # float | str: a number where it can be one
        wanted = Annotated[wanted, Field(union_mode="left_to_right")]
    if isinstance(value, str | list):
        with suppress(ValidationError):
            return TypeAdapter(wanted).validate_python(value)
    return value


# ---- the runs


def plan_runs(asked: dict, folder: Path) -> dict[str, NotebookRun]:
    """What a config asks for, checked: nothing is loaded, run or written.

    Args:
        asked: see `read_config`; the keys of `ASKED` (`recovery` may also list rungs, such as "linear+lora"),
            `gpu_gib` (see `needs.estimate_needs`), and settings. Those of `AXES` may be lists, every other
            may map each model to its value.
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
    wanted = _pop_wanted(asked)
    if unknown := set(asked) - set(setting_types()):
        raise SimDiffError(f"unknown config key {', '.join(sorted(unknown))}; see the head of the Snakefile.")
    if asked.get("target") and "n_remove" in asked:
        raise SimDiffError("n_remove (K) and target both say how many layers go: give one of them.")
    axes = _pop_axes(asked)
    takes = {number: declared(folder / f"{NOTEBOOKS[number]}.ipynb") for number in _needed(wanted)}
    _check_taken(asked, takes)

    runs: dict[str, NotebookRun] = {}
    for model, seed in product(axes["model"], axes["seed"]):
        shared = {name: _pick(name, value, model) for name, value in asked.items()}
        shared |= {"model": model, "seed": seed}
        cells = [
            shared | {"criterion": criterion} | ({} if shared.get("target") else {"n_remove": n_remove})
            for criterion, n_remove in product(axes["criterion"], axes["n_remove"])
        ]
        for settings in cells:
            Settings(**settings)  # refuses what is wrong before anything starts
        runs |= _plan_model([_locate(settings) for settings in cells], wanted, takes, folder)
    return runs


def _pop_wanted(asked: dict) -> dict[str, object]:
    """Take the keys of `ASKED` out of a config: number of each notebook asked for -> True, or its rungs."""
    wanted = {}
    for key, number in ASKED.items():
        value = asked.pop(key, key == "pruning")
        if key == "recovery" and isinstance(value, list):
            wanted[number] = value
        elif (word := str(value).lower()) in _WORDS:
            wanted[number] = _WORDS[word]
        else:
            rungs = ", or a list of rungs" if key == "recovery" else ""
            raise SimDiffError(f"{key} has to be true or false{rungs}; got {value!r}.")
    wanted = {number: value for number, value in wanted.items() if value}
    if not wanted:
        raise SimDiffError(f"nothing is asked for: one of {', '.join(ASKED)} has to be true.")
    return wanted


def _pop_axes(asked: dict) -> dict[str, list]:
    """Take the settings of `AXES` out of a config, each as the list of its values."""
    usual, axes = Settings(), {}
    for name in AXES:
        value = asked.pop(name, getattr(usual, name))
        axes[name] = value if isinstance(value, list) else [value]
        if not axes[name]:
            raise SimDiffError(f"{name} is an empty list: there is nothing to run.")
    models = axes["model"]
    if len(models) > 1 and asked.get("trust_remote_code") is True:  # one model's code is read, not all
        raise SimDiffError(
            "trust_remote_code is turned on model by model, as in trust_remote_code: "
            f"{{{models[0]}: true, {models[1]}: false}}."
        )
    return axes


def _needed(wanted: Mapping[str, object]) -> list[str]:
    """Numbers of the notebooks that run: those asked for, and those before them. 06 needs none of the
    others."""
    chain = bool(set(wanted) - {"06"})
    return [number for number in NOTEBOOKS if number in wanted or (chain and number < "04")]


def _check_taken(asked: Mapping[str, object], takes: Mapping[str, set[str]]) -> None:
    """Refuse a setting that would change nothing."""
    if ignored := set(asked).difference(*takes.values(), *map(readable, takes)):
        raise SimDiffError(
            f"no notebook of this grid takes {', '.join(sorted(ignored))}: it runs "
            f"{', '.join(NOTEBOOKS[number] for number in takes)}."
        )


def _plan_model(
    cells: list[dict], wanted: Mapping[str, object], takes: Mapping[str, set[str]], folder: Path
) -> dict[str, NotebookRun]:
    """The runs of one model and seed, given the settings of each (criterion, number of layers)."""
    runs = {}

    def add(number: str, settings: dict, after: tuple[str, ...] = (), rung: str = "") -> str:
        named = takes[number]
        own = {name: value for name, value in settings.items() if name in named | readable(number)}
        more = {name: value for name, value in own.items() if name not in named}
        parameters = {name: value for name, value in own.items() if name in named} | (
            {MORE: more} if more else {}
        )
        result = _name_result(number, own, rung, folder)
        runs[result] = NotebookRun(NOTEBOOKS[number], own, parameters, after)
        return result

    if "06" in wanted:  # whoever asks for it here wants it measured; alone it shows what the workbook has
        add("06", {"measure": True} | cells[0])
    if "01" not in takes:
        return runs

    # 01 and 02 know neither criterion nor number: any cell's settings will do. 02 chooses the sets for every
    # number asked at once, so that 03 finds its own.
    grid = {*cells[0].get("n_remove_grid", Settings().n_remove_grid)}
    grid |= {cell["n_remove"] for cell in cells if "n_remove" in cell}
    captured = add("01", cells[0])
    chosen = add("02", cells[0] | {"n_remove_grid": sorted(grid)}, (captured,))
    for cell in cells:
        pruned = add("03", cell, (captured, chosen))
        rungs = wanted.get("04", [])
        for rung in [""] if rungs is True else rungs:  # "": the notebook's own
            add("04", cell | _split_rung(rung), (pruned,), rung)
        if "05" in wanted:
            add("05", cell, (pruned,))
    return runs


def _split_rung(rung: str) -> dict[str, str]:
    """Settings of a rung of the ladder of recovery, such as "linear", "lora" or "linear+distillation"."""
    if not rung:
        return {}
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
        named = ", ".join(map(str, value))
        raise SimDiffError(f"{name} is given per model and names no {model}; it names {named}.")
    return value[model]


def _locate(settings: dict) -> dict:
    """Existing files and folders by their full path, since the notebooks run elsewhere; any other name as it
    is."""
    paths = {name: Path(settings[name]).expanduser() for name in _LOCAL if settings.get(name)}
    return settings | {name: str(path.resolve()) for name, path in paths.items() if path.exists()}


# ---- names of result files


def _name_result(number: str, settings: dict, rung: str, folder: Path) -> str:
    """Such as some-model/04-masd-6-linear-lora-0123abcd.json."""
    words = [number]
    if "criterion" in settings:
        words += [_slug(settings["criterion"]), _slug(str(settings.get("n_remove") or settings["target"]))]
    if rung:
        words.append(_slug(rung))
    return f"{_slug(Path(settings['model']).name)}/{'-'.join([*words, _digest(settings, folder)])}.json"


def _slug(name: str) -> str:
    return re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")[:60] or "model"


def _digest(settings: dict, folder: Path) -> str:
    """Hash of settings; a user's own files count with their state, those of criteria in `folder` too."""
    state = [
        (str(path), path.stat().st_size, path.stat().st_mtime_ns)
        for path in [*_local_files(settings), *_criterion_files(settings, folder)]
    ]
    return hashlib.sha256(json.dumps([settings, state], sort_keys=True).encode()).hexdigest()[:8]


def _local_files(settings: dict) -> list[Path]:
    roots = {name: Path(settings[name]) for name in _LOCAL if os.path.isabs(settings.get(name, ""))}
    files = [path for name, root in roots.items() for path in sorted([root, *root.glob(_LOCAL[name])])]
    return [path for path in files if path.is_file()]


def _criterion_files(settings: dict, folder: Path) -> list[Path]:
    """Where a criterion is a function of the user's own, `package.module:function`: the module's file."""
    named = [settings.get(name, []) for name in _CRITERIA]
    criteria = {name for value in named for name in ([value] if isinstance(value, str) else value)}
    modules = sorted({name.partition(":")[0] for name in criteria if ":" in name})
    files = [folder / f"{module.replace('.', '/')}.py" for module in modules]
    return [path for path in files if path.is_file()]


# ---- what a notebook takes


def declared(notebook: Path) -> set[str]:
    """Names in a notebook's parameters cell. papermill's own reader passes over those of a union type.

    Raises:
        SimDiffError: a parameter that is no setting, or of another type than the setting.
    """
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    tagged = [cell for cell in cells if "parameters" in cell["metadata"].get("tags", [])]
    lines = ast.parse("".join("".join(cell["source"]) for cell in tagged)).body
    named = {
        line.target.id: ast.unparse(line.annotation) for line in lines if isinstance(line, ast.AnnAssign)
    }
    usual = Settings()
    for name, written in named.items():
        wanted = type(getattr(usual, name, None)).__name__
        if written != wanted and name != MORE:
            why = "which is no setting" if wanted == "NoneType" else f"and the setting is {wanted}"
            raise SimDiffError(
                f"{notebook.name} takes {name} as {written}, {why}. Restore its parameters cell."
            )
    return set(named)
