"""Settings of a run: every parameter that a notebook may declare, in groups by room, checked by pydantic.

A stage's key is made of the groups it depends on: what a parameter makes old follows from where it stands.
"""

import re
from collections.abc import Callable
from functools import partial
from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, ValidationError

from simdiff_utils import SimDiffError
from simdiff_utils.registry import CRITERIA, is_criterion

DTYPES = ("auto", "float32", "bfloat16", "float16")
REPAIRS = ("none", "magnitude", "linear")
TRAININGS = ("none", "lora", "distillation")
# such as "params <= 100e6", "gib <= 0.8x": x, times the dense model's
TARGET = re.compile(
    r"(params|gib|perplexity|decode_speedup)(?:(?<!up) *<= *|(?<=up) *>= *)(\d+\.?\d*(?:[eE]\d+)?)(x?)"
)
_TYPES = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


def _must(fits: Callable[[object], bool], words: str, then: str = ",") -> AfterValidator:
    """A check of a value of the right type; the sentence reads "NAME must WORDS, got VALUE."."""

    def check(value: object) -> object:
        if not fits(value):
            raise ValueError(f"must {words}{then} got {value!r}.")
        return value

    return AfterValidator(check)


def _one_of(*choices: str) -> AfterValidator:
    return _must(choices.__contains__, f"be one of {', '.join(choices)}", ";")


def _check_criterion(value: str) -> str:
    if not is_criterion(value):  # asked of the registry as it is now: a notebook may have added a row
        raise ValueError(f"must be one of {', '.join(CRITERIA)}; got {value!r}.")
    return value


def _list_of(what: str, fits: Callable[[object], bool], items: str, empty: bool = False) -> BeforeValidator:
    """A check of a list before pydantic looks into it, so that one sentence speaks of the whole list."""

    def check(values: object) -> object:
        if not isinstance(values, list):
            raise ValueError(f"must be a list of {what}, got {values!r}.")
        if not (values or empty) or not all(map(fits, values)):
            raise ValueError(f"must be a list of {items} {values}.")
        return values

    return BeforeValidator(check)


Count = Annotated[int, _must(lambda n: n >= 1, "be at least 1")]
Tokens = Annotated[int, _must(lambda n: n >= 2, "be at least 2 tokens")]
OrOff = _must(lambda x: x >= 0, "be 0 (off) or more")
Inside = _must(lambda x: 0 < x < 1, "lie between 0 and 1")
Prompt = Annotated[str, _must(str.strip, "hold a word to start from")]
Dtype = Annotated[str, _one_of(*DTYPES)]
_COUNTS = "whole numbers of at least 1, got"
_counts = partial(_list_of, "whole numbers", lambda n: type(n) is int and n >= 1, _COUNTS)
_layers = _list_of("whole numbers", lambda n: type(n) is int and n >= 0, "layers, counted from 0; got", True)
_criteria = partial(_list_of, "texts", is_criterion, f"some of {', '.join(CRITERIA)}; got")


_TARGETS = (
    "be params, gib or perplexity <= a number, or decode_speedup >= one (1.5x: times the dense model's)"
)
Alpha = _must(lambda a: a == "auto" if isinstance(a, str) else 0 <= a <= 1, 'be "auto" or a number in [0, 1]')


# ---- groups; n_ counts, lengths are in tokens ----------------------------------------------------


class Group(BaseModel):
    """Settings that belong together."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")


class Sources(Group):
    """What is pruned, on what text, and a checkpoint already pruned: in a key by the hashes of the files."""

    model: str = "embedded:smollm2-135m-instruct"
    text: str = "embedded:wikipedia"
    pruned: str = ""


class Handling(Group):
    """How something is done, and not what comes out: in no key."""

    batch_size: Count = 2
    memory_gib: Annotated[float, OrOff] = 0.0
    trust_remote_code: bool = False
    result_file: str = ""


class Delivery(Group):
    """What a reader is shown of a checkpoint, and where a copy of it goes: in no key."""

    prompt: Prompt = "Albert Einstein was a physicist who"
    max_perplexity_ratio: Annotated[float, OrOff] = 0.0
    export_to: str = ""
    overwrite: bool = False


class CaptureSettings(Group):
    """Calibration capture."""

    dtype: Dtype = "float32"
    seed: Annotated[int, _must(lambda n: 0 <= n < 2**32, "lie between 0 and 2**32 - 1")] = 0
    n_samples: Count = 32
    seq_len: Tokens = 256


class SearchSettings(Group):
    """How a criterion's sets are found and compared: lowest perplexity on the validation split wins."""

    n_validation: Count = 8
    alpha: Annotated[float | str, Alpha] = "auto"
    search: Annotated[str, _one_of("path", "ternary")] = "path"
    exact: bool = False
    confidence: Annotated[float, Inside] = 0.99
    eps: Annotated[float, Inside] = 0.01
    max_iterations: Count = 50
    keep_pattern: bool = False
    protected: Annotated[list[int], _layers] = []


class ChoiceSettings(Group):
    """Which criterion's set is removed, and how many layers: n_remove, or what a target comes to."""

    criterion: Annotated[str, AfterValidator(_check_criterion)] = "masd"
    n_remove: Count = 6
    target: Annotated[str, _must(lambda t: not t or TARGET.fullmatch(t), _TARGETS)] = ""


class TableSettings(Group):
    """What is laid side by side, on the test split."""

    criteria: Annotated[list[str], _criteria()] = "cosine mssd masd log-mssd relative portfolio".split()
    n_remove_grid: Annotated[list[int], _counts()] = [6, 8, 12]


class ReportSettings(Group):
    """What is reported: blocks of the test split, which chooses nothing."""

    n_test: Count = 8


class RepairSettings(Group):
    """Recovery without training."""

    repair: Annotated[str, _one_of(*REPAIRS)] = "none"
    export_dtype: Annotated[str, _one_of(*DTYPES[1:])] = "float32"


class ChatSettings(Group):
    """Whether rows and questions go through the tokenizer's chat template."""

    chat_template: bool = False


class TrainingSettings(Group):
    """Recovery by training; 0, "preset" and [] keep the preset's value."""

    training: Annotated[str, _one_of(*TRAININGS)] = "lora"
    preset: Annotated[str, _one_of("demo", "published")] = "demo"
    train_data: str = "preset"
    learning_rate: Annotated[float, OrOff] = 0.0
    max_steps: Annotated[int, OrOff] = 0
    micro_batch_size: Annotated[int, OrOff] = 0
    max_length: Annotated[int, OrOff] = 0
    target_modules: list[str] = []
    train_dtype: Dtype = "auto"
    gradient_checkpointing: bool = False
    report_to: Annotated[str, _one_of("none", "tensorboard")] = "none"


class SpeedSettings(Group):
    """What is timed, and how; 0 and [] keep the protocol's value."""

    speed_dtype: Dtype = "auto"
    protocol: Annotated[str, _one_of("demo", "interactive", "prefill", "paper")] = "demo"
    speed_batch_sizes: Annotated[list[int], _counts(empty=True)] = []
    prompt_len: Annotated[int, OrOff] = 0
    n_new_tokens: Annotated[int, OrOff] = 0
    n_timed_steps: Annotated[int, OrOff] = 0
    n_pairs: Count = 5
    compiled: bool = False
    speed_grid: Annotated[list[int], _counts(empty=True)] = []


class ComparisonSettings(Group):
    """Every criterion on WikiText-2's test split, some in lm-eval."""

    measure: bool = False
    data_folder: str = ""
    window_len: Tokens = 2048
    n_windows: Count = 64
    suite: Annotated[str, _one_of("zero_shot", "nlu")] = "zero_shot"
    task_criteria: Annotated[list[str], _criteria(empty=True)] = "cosine mssd masd sleb portfolio".split()
    task_grid: Annotated[list[int], _counts(empty=True)] = [3, 6]
    task_limit: Annotated[int, OrOff] = 200
    n_stories: Annotated[int, OrOff] = 100


class Settings(
    Sources,
    Handling,
    Delivery,
    CaptureSettings,
    SearchSettings,
    ChoiceSettings,
    TableSettings,
    ReportSettings,
    RepairSettings,
    ChatSettings,
    TrainingSettings,
    SpeedSettings,
    ComparisonSettings,
):
    """All of them; a SimDiffError where a value is of the wrong type or out of range."""

    def __init__(self, **given: object) -> None:
        try:
            super().__init__(**given)
        except ValidationError as error:
            raise SimDiffError(_sentence(error.errors()[0], given)) from None

    def replace(self, **changes: object) -> "Settings":
        """The same settings but for some."""
        return Settings(**dict(self) | changes)

    def of(self, *groups: type[Group], without: tuple[str, ...] = ()) -> dict[str, object]:
        """Names and values of some groups."""
        names = [name for group in groups for name in group.model_fields if name not in without]
        return {name: getattr(self, name) for name in names}


def _sentence(error: dict, given: dict) -> str:
    """pydantic's first complaint in our words."""
    name = str(error["loc"][0])
    if error["type"] == "value_error":
        return f"{name} {error['ctx']['error']}"
    if name not in Settings.model_fields:
        return f"there is no setting {name}; see simdiff_utils/settings.py."
    kind, value = Settings.model_fields[name].annotation, given[name]
    words = _TYPES.get(kind, "a number or a text" if kind == float | str else "a list of texts")
    hint = (
        " (YAML reads 1e-4 as a text: write 1.0e-4 or 0.0001)" if (kind, type(value)) == (float, str) else ""
    )
    return f"{name} must be {words}, got {value!r}{hint}."
