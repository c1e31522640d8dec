"""Settings: types, ranges and their sentences; groups, and the keys made of them."""

import os
import subprocess
import sys

import pytest
from pydantic import ValidationError

from simdiff_utils import SimDiffError
from simdiff_utils.files import hash_facts, repository_root
from simdiff_utils.registry import CRITERIA
from simdiff_utils.run import check_n_remove
from simdiff_utils.settings import CaptureSettings, SearchSettings, Settings


def refusal(call, *args, **kwargs) -> str:
    """The one sentence with which something is refused."""
    with pytest.raises(SimDiffError) as error:
        call(*args, **kwargs)
    sentence = str(error.value)
    assert sentence.endswith(".") and "\n" not in sentence, sentence
    return sentence


@pytest.mark.parametrize(
    "name, value, words",
    [
        # types
        ("n_remove", "6", "n_remove must be a whole number, got '6'"),
        ("n_remove", 6.0, "n_remove must be a whole number, got 6.0"),
        ("n_remove", True, "n_remove must be a whole number, got True"),
        ("n_remove", None, "n_remove must be a whole number, got None"),
        ("model", 3, "model must be a text, got 3"),
        ("eps", "0.01", "eps must be a number, got '0.01'"),
        ("eps", False, "eps must be a number, got False"),
        ("learning_rate", "1e-4", "write 1.0e-4 or 0.0001"),
        ("alpha", None, "alpha must be a number or a text, got None"),
        ("alpha", True, "alpha must be a number or a text, got True"),
        ("n_remove_grid", 6, "n_remove_grid must be a list of whole numbers, got 6"),
        ("n_remove_grid", (3, 6), "n_remove_grid must be a list"),
        ("n_remove_grid", "3,6", "n_remove_grid must be a list"),
        # ranges
        *[
            (name, 0, f"{name} must be at least 1, got 0")
            for name in (
                "n_samples",
                "n_validation",
                "n_test",
                "batch_size",
                "n_remove",
                "max_iterations",
                "n_pairs",
            )
        ],
        ("n_remove", -1, "n_remove must be at least 1, got -1"),
        ("seq_len", 1, "seq_len must be at least 2 tokens, got 1"),
        ("seed", -1, "seed must lie between 0 and 2**32 - 1, got -1"),
        ("seed", 2**32, "seed must lie between 0 and 2**32 - 1, got 4294967296"),
        ("eps", 0.0, "eps must lie between 0 and 1, got 0.0"),
        ("eps", float("nan"), "eps must lie between 0 and 1"),
        *[("eps", value, "eps must") for value in (1, 1.5, float("inf"))],
        ("prompt", "", "prompt must"),
        ("alpha", -0.1, 'alpha must be "auto" or a number in [0, 1], got -0.1'),
        ("alpha", 1.1, 'alpha must be "auto" or a number in [0, 1], got 1.1'),
        ("alpha", float("nan"), 'alpha must be "auto" or a number in [0, 1], got nan'),
        ("alpha", "best", """alpha must be "auto" or a number in [0, 1], got 'best'"""),
        ("alpha", "0.5", """alpha must be "auto" or a number in [0, 1], got '0.5'"""),
        ("n_remove_grid", [], "n_remove_grid must be a list of whole numbers of at least 1"),
        ("n_remove_grid", [3, 0], "n_remove_grid must be a list of whole numbers of at least 1, got [3, 0]"),
        ("n_remove_grid", [3, "6"], "n_remove_grid must be a list of whole numbers of at least 1"),
        ("n_remove_grid", [True], "n_remove_grid must be a list of whole numbers of at least 1"),
        ("criterion", "euclid", f"criterion must be one of {', '.join(CRITERIA)}; got 'euclid'"),
        ("criterion", "MASD", f"criterion must be one of {', '.join(CRITERIA)}; got 'MASD'"),
        ("criteria", "masd", "criteria must be a list of texts, got 'masd'"),
        ("criteria", [], f"criteria must be a list of some of {', '.join(CRITERIA)}; got []"),
        ("criteria", ["masd", "bi"], "got ['masd', 'bi']"),
        ("criteria", [1], "criteria must be a list of some of"),
        ("search", "grid", "search must be one of path, ternary; got 'grid'"),
        ("exact", 1, "exact must be true or false, got 1"),
        *[
            ("confidence", value, "confidence must lie between 0 and 1")
            for value in (0.0, 1.0, 1.5, float("nan"))
        ],
        ("dtype", "fp32", "dtype must be one of auto, float32, bfloat16, float16; got 'fp32'"),
        ("train_dtype", "int8", "train_dtype must be one of"),
        ("speed_dtype", "", "speed_dtype must be one of"),
        ("preset", "fast", "preset must be one of demo, published; got 'fast'"),
        ("max_perplexity_ratio", -1.0, "max_perplexity_ratio must be 0 (off) or more, got -1.0"),
        ("max_perplexity_ratio", float("nan"), "max_perplexity_ratio must be 0 (off) or more, got nan"),
        ("learning_rate", -1e-3, "learning_rate must be 0 (off) or more"),
        ("max_steps", -1, "max_steps must be 0 (off) or more, got -1"),
        *[
            (
                "target",
                value,
                "target must be params, gib or perplexity <= a number, or decode_speedup >= one",
            )
            for value in (
                "6",
                "params",
                "params >= 1e6",
                "decode_speedup <= 2",
                "gib <= -1",
                "loss <= 2",
                "gib<=1 x",
            )
        ],
        *[("protected", value, "protected must be a list of") for value in (3, [-1], [True], ["first"])],
    ],
)
def test_bad_values_are_refused_in_a_sentence_that_names_them(name, value, words):
    assert words in refusal(Settings, **{name: value})


@pytest.mark.parametrize(
    "name, value",
    [
        ("alpha", "auto"),
        ("alpha", 0),
        ("alpha", 1),
        ("alpha", 0.25),
        *[
            ("target", value)
            for value in ("", "params <= 100e6", "gib<=1.2", "perplexity <= 1.5x", "decode_speedup >= 2")
        ],
        ("protected", [0, 29]),
        ("eps", 1e-4),
        ("learning_rate", 0),
        ("seq_len", 2),
        ("n_remove_grid", [1]),
        ("max_perplexity_ratio", 1.5),
        ("n_remove", 1),
        ("seed", 0),
        ("criterion", "cosine"),
    ],
)
def test_good_values_are_taken_as_they_are(name, value):
    assert getattr(Settings(**{name: value}), name) == value


def test_every_setting_has_a_default_and_none_can_be_changed():
    settings = Settings()
    assert all(type(value) in (int, float, bool, str, list) for _, value in settings)
    with pytest.raises(ValidationError):
        settings.n_remove = 3
    assert Settings().n_remove_grid is not Settings().n_remove_grid


def test_other_settings_are_checked_as_well():
    assert Settings().replace(n_remove=3) == Settings(n_remove=3)
    assert "n_remove must be at least 1, got 0" in refusal(Settings().replace, n_remove=0)
    assert "there is no setting n_remvoe" in refusal(Settings, n_remvoe=3)


def test_a_criterion_of_ones_own_is_a_module_and_a_function():
    assert Settings(criterion="my_module:my_score").criterion == "my_module:my_score"
    assert Settings(criteria=["masd", "a.b:c"]).criteria == ["masd", "a.b:c"]
    for name in ("my_module", "my module:f", "a:b:c", ":f", "os.path:join()", "../a:b"):
        assert "criterion must be one of" in refusal(Settings, criterion=name)


@pytest.mark.parametrize(
    "n_remove, fine", [(0, False), (1, True), (29, True), (30, False), (31, False), (-3, False)]
)
def test_the_number_of_layers_to_remove_depends_on_the_model(n_remove, fine):
    if fine:
        check_n_remove(n_remove, 30)
    else:
        assert f"between 1 and 29 for a model of 30 layers, got {n_remove}" in refusal(
            check_n_remove, n_remove, 30
        )


# ---- groups --------------------------------------------------------------------------------------


def test_every_setting_stands_in_one_group():
    groups = Settings.__bases__
    names = [name for group in groups for name in group.model_fields]
    assert len(names) == len(set(names)) and set(names) == set(Settings.model_fields)


def test_the_facts_of_groups_are_their_values_and_no_others():
    facts = Settings(seed=3).of(CaptureSettings)
    assert facts == {"dtype": "float32", "seed": 3, "n_samples": 32, "seq_len": 256}
    assert "n_validation" not in Settings().of(SearchSettings, without=("n_validation",))


def test_the_key_changes_with_every_fact_and_not_with_their_order():
    facts = {"seed": 0, "model": "m", "grid": [1, 2]}
    key = hash_facts(facts)
    assert len(key) == 12 and set(key) <= set("0123456789abcdef")
    assert hash_facts(dict(reversed(facts.items()))) == key
    others = [facts | {"seed": 1}, facts | {"grid": [2, 1]}, facts | {"code": "c"}]
    assert len({key, *map(hash_facts, others)}) == 4


def test_the_key_is_the_same_in_another_process():
    script = (
        "import simdiff_utils.files as f, simdiff_utils.settings as s; "
        "print(f.hash_facts(dict(s.Settings())))"
    )
    for seed in ("1", "2"):
        command = [sys.executable, "-c", script]
        environment = os.environ | {"PYTHONHASHSEED": seed}
        done = subprocess.run(command, cwd=repository_root(), env=environment, capture_output=True, text=True)
        assert done.stdout.strip() == hash_facts(dict(Settings())), done.stderr


@pytest.mark.parametrize("name, value", [("alpha", 1), ("learning_rate", 0)])
def test_the_key_does_not_tell_1_from_1_point_0(name, value):
    one, other = Settings(**{name: value}), Settings(**{name: float(value)})
    assert hash_facts(dict(one)) == hash_facts(dict(other))
