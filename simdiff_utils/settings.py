"""Settings of a run: one validated dataclass, fed from a notebook's parameters cell."""

import ast
import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

CRITERIA = (
    "cosine",
    "mssd",
    "masd",
    "log-mssd",
    "relative",
    "portfolio",
    "angular",
    "tail",
    "random",
    "magnitude",
    "taylor",
    "one-shot",
    "sleb",
    "window",
    "entrodrop",
    "laco",
)  # keys of methods.METHODS
SEARCHES = ("path", "ternary")
DTYPES = ("auto", "float32", "bfloat16", "float16")
PRESETS = ("demo", "published")
REPAIRS = ("none", "magnitude", "linear")  # no repair, and those of repair.REPAIRS
TRAININGS = ("none", "lora", "distillation")
REPORTS = ("none", "tensorboard")
PROTOCOLS = ("demo", "interactive", "prefill", "paper")  # keys of speed.PROTOCOLS
TASK_SUITES = ("zero_shot", "nlu")  # keys of tasks.SUITES


class SimDiffError(ValueError):
    """Bad input or an impossible request; the message is one sentence that says what to do."""

    def _render_traceback_(self) -> list[str]:
        """What IPython shows instead of a traceback: the sentence is all a reader needs."""
        return [f"SimDiffError: {self}"]


def one_line(error: BaseException) -> str:
    """What a library's error says, as one line for our own sentence."""
    return " ".join(str(error).split())


@dataclass(frozen=True)
class Settings:
    """Every parameter that a notebook may declare, with its default.

    A notebook declares the ones it uses; `from_notebook` checks them. `n_` counts, lengths are in tokens.
    """

    # what is pruned, and on what text
    model: str = "embedded:smollm2-135m-instruct"
    text: str = "embedded:wikipedia"
    dtype: str = "float32"
    seed: int = 0
    batch_size: int = 2
    memory_gib: float = 0.0
    trust_remote_code: bool = False
    # calibration capture
    n_samples: int = 32
    seq_len: int = 256
    # criterion: of several candidate sets, the one of lowest perplexity on the validation split is taken
    criteria: list[str] = field(
        default_factory=lambda: ["cosine", "mssd", "masd", "log-mssd", "relative", "portfolio"]
    )
    criterion: str = "masd"
    alpha: float | str = "auto"
    n_remove_grid: list[int] = field(default_factory=lambda: [3, 6, 8, 9, 12])
    n_validation: int = 8
    search: str = "path"
    exact: bool = False
    confidence: float = 0.99
    eps: float = 0.01
    max_iterations: int = 50
    # pruning, reported on the test split
    n_remove: int = 6
    n_test: int = 8
    max_perplexity_ratio: float = 0.0
    prompt: str = "Albert Einstein was a physicist who"
    export_to: str = ""
    overwrite: bool = False
    # recovery: a repair without training, then training; 0, "preset" and [] keep the preset's value
    repair: str = "none"
    training: str = "lora"
    preset: str = "demo"
    train_data: str = "preset"
    chat_template: bool = False
    learning_rate: float = 0.0
    max_steps: int = 0
    micro_batch_size: int = 0
    max_length: int = 0
    target_modules: list[str] = field(default_factory=list)
    train_dtype: str = "auto"
    gradient_checkpointing: bool = False
    report_to: str = "none"
    export_dtype: str = "float32"
    # speed: 0 and [] keep the protocol's value
    speed_dtype: str = "auto"
    protocol: str = "demo"
    speed_batch_sizes: list[int] = field(default_factory=list)
    prompt_len: int = 0
    n_new_tokens: int = 0
    n_timed_steps: int = 0
    n_pairs: int = 5
    compiled: bool = False
    speed_grid: list[int] = field(default_factory=list)
    # comparison: every method on WikiText-2's test split, some in lm-eval
    measure: bool = False
    data_folder: str = ""
    window_len: int = 2048
    n_windows: int = 64
    suite: str = "zero_shot"
    task_criteria: list[str] = field(default_factory=lambda: ["cosine", "mssd", "masd", "sleb", "portfolio"])
    task_grid: list[int] = field(default_factory=lambda: [3, 6])
    task_limit: int = 200
    n_stories: int = 100
    # batch runs: where the last cell writes its proof of success ("" = nowhere)
    result_file: str = ""

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            _check_type(f.name, value, f.type)
            if type(value) is int and f.type is not int:  # 1 and 1.0 are one setting and must hash alike
                object.__setattr__(self, f.name, float(value))
        for name in (
            "n_samples",
            "n_validation",
            "n_test",
            "batch_size",
            "n_remove",
            "max_iterations",
            "n_pairs",
            "n_windows",
        ):
            _require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("seq_len", "window_len"):
            _require(
                getattr(self, name) >= 2, f"{name} must be at least 2 tokens, got {getattr(self, name)}."
            )
        _require(self.seed >= 0, f"seed must be 0 or more, got {self.seed}.")
        _require(0 < self.eps < 1, f"eps must lie between 0 and 1, got {self.eps}.")
        _require(
            0 < self.confidence < 1,
            f"confidence must lie between 0 and 1, got {self.confidence}; exact = True drops nothing early.",
        )
        _require(self.prompt.strip(), f"prompt must hold a word to start from, got {self.prompt!r}.")
        for name, numbers in (
            ("n_remove_grid", self.n_remove_grid),
            ("task_grid", self.task_grid or [1]),  # [] is none
            ("speed_batch_sizes", self.speed_batch_sizes or [1]),
            ("speed_grid", self.speed_grid or [1]),
        ):
            _require(
                numbers and all(type(k) is int and k >= 1 for k in numbers),
                f"{name} must be a list of whole numbers of at least 1, got {numbers}.",
            )
        if isinstance(self.alpha, str):
            _require(self.alpha == "auto", f'alpha must be "auto" or a number in [0, 1], got {self.alpha!r}.')
        else:
            _require(0 <= self.alpha <= 1, f"alpha must lie in [0, 1], got {self.alpha}.")
        for name, criteria in (
            ("criteria", self.criteria),
            ("task_criteria", self.task_criteria or ["cosine"]),
        ):
            _require(
                criteria and set(criteria) <= set(CRITERIA),
                f"{name} must be a list of some of {', '.join(CRITERIA)}; got {criteria}.",
            )
        for name, choices in (
            ("criterion", CRITERIA),
            ("search", SEARCHES),
            ("dtype", DTYPES),
            ("train_dtype", DTYPES),
            ("speed_dtype", DTYPES),
            ("export_dtype", DTYPES[1:]),
            ("preset", PRESETS),
            ("repair", REPAIRS),
            ("training", TRAININGS),
            ("report_to", REPORTS),
            ("suite", TASK_SUITES),
            ("protocol", PROTOCOLS),
        ):
            _require(
                getattr(self, name) in choices,
                f"{name} must be one of {', '.join(choices)}; got {getattr(self, name)!r}.",
            )
        for name in (
            "max_perplexity_ratio",
            "learning_rate",
            "max_steps",
            "micro_batch_size",
            "max_length",
            "memory_gib",
            "task_limit",
            "n_stories",
            "prompt_len",
            "n_new_tokens",
            "n_timed_steps",
        ):
            _require(getattr(self, name) >= 0, f"{name} must be 0 (off) or more, got {getattr(self, name)}.")

    def key(self, names: tuple[str, ...], **identity: str) -> str:
        """Hash of the settings named and of what they resolved to (hashes of model, text, code): 12 hex
        digits."""
        facts = {name: getattr(self, name) for name in names} | identity
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]


def check_n_remove(n_remove: int, n_layers: int) -> None:
    """Refuse a number of layers to remove outside [1, n_layers - 1]."""
    _require(
        1 <= n_remove < n_layers,
        f"n_remove must lie between 1 and {n_layers - 1} for a model of {n_layers} layers, got {n_remove}.",
    )


def check_removed(removed: frozenset[int], n_layers: int) -> None:
    """Refuse a set of layers to remove that names no layer of the model, or all of them."""
    _require(
        removed <= set(range(n_layers)) and len(removed) < n_layers,
        f"cannot remove layers {sorted(removed)} of a model with layers 0 to {n_layers - 1}; "
        "name indices in that range and leave one.",
    )


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
    _require(declared, "no parameters cell was run: each of its lines must read `name: type = value`.")
    unknown = sorted(injected - declared)
    _require(
        not unknown,
        f"unknown parameter {', '.join(unknown)}; this notebook declares {', '.join(sorted(declared))}.",
    )
    known = {f.name for f in dataclasses.fields(Settings)}
    _require(
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
    known = {f.name for f in dataclasses.fields(Settings)}
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


def _check_type(name: str, value: object, annotation: object) -> None:
    words = {
        int: "a whole number",
        float: "a number",
        str: "a text",
        list[int]: "a list of whole numbers",
        list[str]: "a list of texts",
        bool: "true or false",
        float | str: "a number or a text",
    }
    ok = {
        int: type(value) is int,
        float: type(value) in (int, float),
        str: isinstance(value, str),
        list[int]: isinstance(value, list),
        list[str]: isinstance(value, list),
        bool: type(value) is bool,
        float | str: type(value) in (int, float, str),
    }[annotation]
    hint = ""
    if annotation is float and isinstance(value, str):
        hint = " (YAML reads 1e-4 as a text: write 1.0e-4 or 0.0001)"
    _require(ok, f"{name} must be {words[annotation]}, got {value!r}{hint}.")


def _require(condition: object, sentence: str) -> None:
    if not condition:
        raise SimDiffError(sentence)


def repository_root(start: Path | None = None) -> Path:
    """The folder that holds `pyproject.toml`, from anywhere inside the repository; else the working
    directory."""
    here = (start or Path.cwd()).resolve()
    for folder in (here, *here.parents):
        if (folder / "pyproject.toml").exists() and (folder / "simdiff_utils").is_dir():
            return folder
    return here
