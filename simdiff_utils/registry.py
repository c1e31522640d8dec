"""The registry of criteria: every way to choose layers, a row each, for settings, tables, pictures and plans.

Nothing heavy is imported here: a row names its function, which is loaded when somebody asks for it. How to
add a criterion: docs/architecture.md.
"""

import importlib
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from simdiff_utils import SimDiffError

_OWN = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")  # my_module:my_score
_ROOM = "simdiff_utils.criterion"
_SEEN: dict[str, bytes] = {}  # users' modules: their files as they were imported


@dataclass(frozen=True)
class Criterion:
    """How layers are chosen, what that looks at, what it costs, and how it is drawn.

    Attributes:
        label, source: for tables and pictures.
        function: "module:name"; `gives` says what it takes and returns.
        gives: "scores": given what it sees, one float a layer; the layers of smallest score are removed.
            "line": given the statistics, two scores a layer, at alpha 0 and at alpha 1 (Eq. 7 between them);
            every set that some alpha chooses is a candidate. "sets": given `candidates.Evidence` and
            n_remove, the candidates.
        sees: of "statistics" (a table, a row a layer), "model", "calibration" (token ids), "gradients" (a
            pass takes them: forward and backward count as three) and "losses" (of any set on validation
            text); "scores" are given them in this order.
        passes: (n_layers, n_remove) -> passes of the model over its text before sets are compared.
        compares: whether sets (LaCo: models) are compared after that, a pass each.
        protects: how many first and how many last layers are never removed.
        n_seeds: how many draws a comparison shows.
        color, marker, ls: matplotlib's words for its look.
    """

    label: str
    source: str
    function: str
    gives: str = "scores"
    sees: tuple[str, ...] = ("statistics",)
    passes: Callable[[int, int], int] = lambda n_layers, n_remove: 1
    protects: tuple[int, int] = (0, 0)
    n_seeds: int = 1
    compares: bool = False
    color: str = "#777777"
    marker: str = "D"
    ls: str | tuple = "-"

    def protected(self, n_layers: int) -> frozenset[int]:
        """Layers that are never removed, 0-based."""
        first, last = self.protects
        return frozenset(i for i in range(n_layers) if i < first or i >= n_layers - last)


def _no_pass(_n_layers: int, _n_remove: int) -> int:
    return 0


_DOTTED, _DASHDOT, _LONG = (0, (1, 1)), (0, (3, 1, 1, 1)), (0, (5, 1))
SIMDIFF = "SimDiff, arXiv:2604.19520"
_OURS, _SHORTENED = f"this workbook, after {SIMDIFF}", "Shortened-LLM, arXiv:2402.02834"
_LINE = {"gives": "line", "sees": ("statistics", "losses"), "compares": True}

# Okabe-Ito colours, which colour-blind readers tell apart; markers and dashes tell them apart in grey.
# Not formatted: rows are easier to compare in a few lines each than in twelve.
# fmt: off
CRITERIA: dict[str, Criterion] = {
    "cosine": Criterion(
        "cosine (ShortGPT)", "ShortGPT, arXiv:2403.03853", f"{_ROOM}.equations:cosine_scores",
        color="#E69F00", marker="o"),
    "mssd": Criterion(
        "SimDiff-MSSD", SIMDIFF, f"{_ROOM}.equations:mssd_line", **_LINE,
        color="#0072B2", marker="s", ls="--"),
    "masd": Criterion(
        "SimDiff-MASD", SIMDIFF, f"{_ROOM}.equations:masd_line", **_LINE,
        color="#009E73", marker="^", ls="-."),
    "log-mssd": Criterion(
        "log-MSSD (ours)", _OURS, f"{_ROOM}.equations:log_mssd_line", **_LINE,
        color="#56B4E9", marker="v", ls=":"),
    "relative": Criterion(
        "relative (ours)", _OURS, f"{_ROOM}.equations:relative_line", **_LINE,
        color="#D55E00", marker="P", ls=_LONG),
    "portfolio": Criterion(
        "portfolio (ours)", "this workbook", f"{_ROOM}.propose:portfolio_sets", gives="sets",
        sees=("statistics", "losses"), compares=True,
        color="#CC79A7", marker="*"),
    "floating": Criterion(
        "floating (ours)", "this workbook", f"{_ROOM}.floating:floating_sets", gives="sets",
        sees=("statistics", "losses"), compares=True, color="#882255", marker="H"),
    "angular": Criterion(
        "angular block", "Gromov et al., arXiv:2403.17887", f"{_ROOM}.propose:angular_sets", gives="sets",
        color="#F0E442", marker="d", ls=_DOTTED),
    "tail": Criterion(
        "last layers", "none", f"{_ROOM}.propose:tail_sets", gives="sets", sees=(), passes=_no_pass,
        color="#999999", marker="<", ls=_DASHDOT),
    "random": Criterion(
        "random", "none", f"{_ROOM}.propose:random_sets", gives="sets", sees=(), passes=_no_pass, n_seeds=3,
        color="#999999", marker=".", ls=_DOTTED),
    "magnitude": Criterion(
        "magnitude (Mag+)", _SHORTENED, f"{_ROOM}.peers:magnitude_scores", sees=("model",), passes=_no_pass,
        protects=(4, 2),
        color="#999999", marker="x", ls=_DASHDOT),
    "taylor": Criterion(
        "Taylor+", _SHORTENED, f"{_ROOM}.peers:taylor_scores", sees=("model", "calibration", "gradients"),
        passes=lambda n_layers, n_remove: 3, protects=(4, 2), marker="+", ls=":"),
    "one-shot": Criterion(
        "one-shot perplexity (PPL+)", _SHORTENED, f"{_ROOM}.search:one_shot_scores", sees=("losses",),
        passes=lambda n_layers, n_remove: n_layers, protects=(4, 2), marker="1", ls=_LONG),
    "sleb": Criterion(
        "SLEB (greedy)", "SLEB, arXiv:2402.09025", f"{_ROOM}.search:sleb_sets", gives="sets",
        sees=("losses",),
        passes=lambda n_layers, n_remove: sum(n_layers - step - 2 for step in range(n_remove)),
        protects=(1, 1),
        color="#000000", marker="X"),
    "window": Criterion(
        "best window", "AMD Quark", f"{_ROOM}.propose:window_sets", gives="sets", sees=("losses",),
        passes=_no_pass, compares=True, marker="p", ls="--"),
    "entrodrop": Criterion(
        "EntroDrop, per layer", "EntroDrop, arXiv:2504.03794", f"{_ROOM}.peers:entropy_increases",
        sees=("model", "calibration"), protects=(2, 1), marker="h", ls="-."),
    "laco": Criterion(
        "LaCo", "LaCo, arXiv:2402.11187", f"{_ROOM}.laco:laco_sets", gives="sets",
        sees=("model", "calibration"), passes=_no_pass, compares=True,
        color="#999999", marker=">", ls=_DOTTED),
}
# fmt: on


def is_criterion(name: object) -> bool:
    """Whether a name is a row of the registry, or a user's own function as "module:function"."""
    return isinstance(name, str) and (name in CRITERIA or bool(_OWN.fullmatch(name)))


def find(name: str) -> Criterion:
    """The row of a criterion; for a user's own function, as in "my_module:my_score", a row made for it.

    Such a function is given the statistics (a table: a row a layer, columns as `LayerStatistics.table`) and
    returns one float a layer.

    Raises:
        SimDiffError: there is no such criterion.
    """
    if not is_criterion(name):
        raise SimDiffError(f"criterion must be one of {', '.join(CRITERIA)}; got {name!r}.")
    return CRITERIA.get(name) or Criterion(name, "your own", name)


def load(name: str) -> Callable:
    """A criterion's function; only now its module is imported (again, where its file was edited since).

    Raises:
        SimDiffError: there is no such criterion, module or function.
    """
    module_name, _, function = find(name).function.partition(":")
    try:
        module = _import_as_it_is(module_name)
    except ModuleNotFoundError as error:
        place = f"put {module_name}.py beside the notebook, or install it"
        raise SimDiffError(f"the criterion {name} is not found ({error}): {place}.") from error
    if not callable(getattr(module, function, None)):
        raise SimDiffError(f"the criterion {name} is not found: {module_name} has no function {function}.")
    return getattr(module, function)


def _import_as_it_is(name: str) -> ModuleType:
    """A module by its file of now: a kernel that runs on would compute with the code that it began with."""
    before = sys.modules.get(name)
    module = importlib.import_module(name)
    if name.startswith("simdiff_utils.") or not getattr(module, "__file__", None):
        return module
    source = Path(module.__file__).read_bytes()
    if before and _SEEN.get(name) != source:
        module = importlib.reload(module)
    _SEEN[name] = source
    return module


def of_kind(gives: str) -> list[str]:
    """Names of the criteria that give "scores", "line" or "sets"."""
    return [name for name, row in CRITERIA.items() if row.gives == gives]
