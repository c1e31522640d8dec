"""The parameters cell of a notebook: what it declares, and what papermill injects below it."""

import ast
from collections.abc import Iterable

from simdiff_utils import require
from simdiff_utils.settings import (
    CaptureSettings,
    ChatSettings,
    ChoiceSettings,
    ComparisonSettings,
    Delivery,
    Group,
    Handling,
    RepairSettings,
    ReportSettings,
    SearchSettings,
    Settings,
    SpeedSettings,
    TableSettings,
    TrainingSettings,
)

MORE = "more"  # the parameter that holds rarely needed settings by name
_CHOICE = (CaptureSettings, SearchSettings, ChoiceSettings)
# Which settings each notebook reads; those that its cell does not declare can be given in `more`.
READS: dict[str, tuple[type[Group], ...]] = {
    "01": (CaptureSettings,),
    "02": (CaptureSettings, SearchSettings, TableSettings),
    "03": (*_CHOICE, Delivery, TableSettings, ReportSettings),
    "04": (*_CHOICE, Delivery, ReportSettings, RepairSettings, TrainingSettings, ChatSettings),
    "05": (*_CHOICE, ReportSettings, SpeedSettings),
    "06": (CaptureSettings, SearchSettings, TableSettings, ComparisonSettings, ChatSettings),
}


def readable(number: str) -> set[str]:
    """Names of all settings that a notebook, named by its number, reads."""
    return {name for group in (Handling, *READS[number]) for name in group.model_fields}


def from_notebook(namespace: dict, number: str) -> Settings:
    """Settings from the parameters cell of the running notebook, and from what papermill injected below it.

    Args:
        namespace: the notebook's `globals()`.
        number: of the notebook, such as "02".

    Raises:
        SimDiffError: a name that the notebook does not declare (papermill only logs those), or a value of
            the wrong type or out of range.
    """
    from transformers.utils import logging  # here: the plan of a grid reads this module, and stays light

    logging.disable_progress_bar()  # each load would leave a red block in the notebook
    history = namespace.get("In", [])
    if any(history):
        declared, injected = _declared_and_injected(history)
    else:  # nbval keeps no history, and injects nothing
        declared, injected = set(namespace.get("__annotations__", {})), set()
    require(declared, "no parameters cell was run: each of its lines must read `name: type = value`.")
    _refuse("unknown parameter", injected - declared, "this notebook declares", declared)
    unknown = ", ".join(sorted(declared - {*Settings.model_fields, MORE}))
    require(
        not unknown,
        f"the parameters cell declares {unknown}, which no setting is called; see simdiff_utils/settings.py.",
    )
    more = namespace[MORE] if MORE in declared else {}
    require(
        isinstance(more, dict), f'{MORE} must hold settings by name, as in {{"eps": 0.02}}, got {more!r}.'
    )
    _refuse(
        f"{MORE} names",
        set(more) - (readable(number) - declared),
        "beside its cell this notebook reads",
        readable(number) - declared,
    )
    return Settings(**{name: namespace[name] for name in declared - {MORE}} | more)


def _refuse(what: str, names: Iterable[str], of: str, known: Iterable[str]) -> None:
    require(not names, f"{what} {', '.join(sorted(names))}; {of} {', '.join(sorted(known))}.")


def _declared_and_injected(cells: list[str]) -> tuple[set[str], set[str]]:
    """Names in the parameters cell run last, and in what papermill injected after it.

    Read from the kernel's input history, so that running the cells again, in any order, gives the same
    answer.
    """
    known = set(Settings.model_fields)
    declared: set[str] = set()
    injected: set[str] = set()
    for cell in cells:
        try:
            body = ast.parse(cell).body
        except SyntaxError:
            continue
        if body and all(isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name) for n in body):
            names = {node.target.id for node in body}
            if (
                names & known or not declared
            ) and not names <= declared:  # one of the reader's own declares nothing
                declared, injected = names, set()
        elif cell.lstrip().startswith("# Parameters"):  # the comment papermill puts on the cell it injects
            injected |= {
                target.id for node in body if isinstance(node, ast.Assign) for target in node.targets
            }
    return declared, injected
