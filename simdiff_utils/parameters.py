"""The parameters cell of a notebook: what it declares, and what papermill injects below it."""

import ast

from simdiff_utils import require
from simdiff_utils.settings import Settings


def from_notebook(namespace: dict) -> Settings:
    """Settings from the parameters cell of the running notebook, and from what papermill injected below it.

    Args:
        namespace: the notebook's `globals()`.

    Raises:
        SimDiffError: a name that the notebook does not declare (papermill only logs those), or a value of
            the wrong type or out of range.
    """
    history = namespace.get("In", [])
    if any(history):
        declared, injected = _declared_and_injected(history)
    else:  # nbval keeps no history, and injects nothing
        declared, injected = set(namespace.get("__annotations__", {})), set()
    require(declared, "no parameters cell was run: each of its lines must read `name: type = value`.")
    unknown = sorted(injected - declared)
    require(
        not unknown,
        f"unknown parameter {', '.join(unknown)}; this notebook declares {', '.join(sorted(declared))}.",
    )
    known = set(Settings.model_fields)
    require(
        declared <= known,
        f"the parameters cell declares {', '.join(sorted(declared - known))}, "
        "which no setting is called; see simdiff_utils/settings.py.",
    )
    return Settings(**{name: namespace[name] for name in declared})


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
        if body and all(
            isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) for node in body
        ):
            names = {node.target.id for node in body}
            if (
                names & known or not declared
            ) and not names <= declared:  # a cell of the reader's own declares nothing
                declared, injected = names, set()
        elif cell.lstrip().startswith("# Parameters"):  # the comment papermill puts on the cell it injects
            injected |= {
                target.id for node in body if isinstance(node, ast.Assign) for target in node.targets
            }
    return declared, injected
