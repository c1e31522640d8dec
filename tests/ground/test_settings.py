"""Settings: types, ranges and their sentences; what a notebook's cells declare and papermill injects."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
from papermill.translators import PythonTranslator

from simdiff_utils import SimDiffError
from simdiff_utils.parameters import from_notebook
from simdiff_utils.files import repository_root
from simdiff_utils.run import check_n_remove
from simdiff_utils.registry import CRITERIA
from simdiff_utils.settings import Settings


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
        ("seed", -1, "seed must be 0 or more, got -1"),
        ("eps", 0.0, "eps must lie between 0 and 1, got 0.0"),
        ("eps", float("nan"), "eps must lie between 0 and 1"),
        *[("eps", value, "eps must") for value in (1, 1.5, float("inf"))],
        ("prompt", "", "prompt must"),
        ("alpha", -0.1, r"alpha must lie in [0, 1], got -0.1"),
        ("alpha", 1.1, r"alpha must lie in [0, 1], got 1.1"),
        ("alpha", float("nan"), r"alpha must lie in [0, 1], got nan"),
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
    assert all(
        type(getattr(settings, f.name)) in (int, float, bool, str, list) for f in dataclasses.fields(settings)
    )
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.n_remove = 3
    assert Settings().n_remove_grid is not Settings().n_remove_grid


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


# ---- the key of a stage's folder
# -------------------------------------------------------------------------------


def test_the_key_changes_with_what_the_stage_depends_on_and_with_nothing_else():
    names = ("seed", "seq_len")
    key = Settings().key(names, model="m", text="t")
    assert len(key) == 12 and set(key) <= set("0123456789abcdef")
    assert Settings(n_remove=9, criterion="mssd").key(names, model="m", text="t") == key
    assert Settings().key(tuple(reversed(names)), text="t", model="m") == key
    others = {
        Settings(seed=1).key(names, model="m", text="t"),
        Settings(seq_len=128).key(names, model="m", text="t"),
        Settings().key(names, model="other", text="t"),
        Settings().key(names, model="m", text="other"),
        Settings().key(("seed",), model="m", text="t"),
        Settings().key(names, model="m", text="t", code="c"),
    }
    assert len(others | {key}) == 7


def test_the_key_is_the_same_in_another_process():
    script = 'from simdiff_utils.settings import Settings; printSettings.key"seed", "n_remove_grid", model="m"'
    keys = {
        subprocess.run(
            [sys.executable, "-c", script],
            cwd=repository_root(),
            env={"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert keys == {Settings().key(("seed", "n_remove_grid"), model="m")}


def test_the_key_refuses_names_that_are_no_settings():
    with pytest.raises(AttributeError):
        Settings().key(("n_sample",))


@pytest.mark.parametrize("name, value", [("alpha", 1), ("learning_rate", 0)])
def test_the_key_does_not_tell_1_from_1_point_0(name, value):
    assert Settings(**{name: value}).key((name,)) == Settings(**{name: float(value)}).key((name,))


# ---- notebooks
# -------------------------------------------------------------------------------------------------

PARAMETERS = """n_remove: int = 6  # layers to remove
alpha: float | str = "auto"  # in [0, 1]
n_remove_grid: list[int] = [3, 6]  # layers
"""
SETUP = "import math\nx = 3"


def run_cells(*cells: str) -> dict:
    """A kernel's namespace after these cells ran, with its input history."""
    namespace: dict = {"In": [""]}
    for cell in cells:
        namespace["In"].append(cell)
        try:
            exec(cell, namespace)
        except SyntaxError:
            continue  # magics and half-written cells stand in the history too
    return namespace


def inject(**parameters) -> str:
    """The cell that papermill itself writes below the parameters cell."""
    return PythonTranslator.codify(parameters)


def test_declared_values_reach_the_settings_and_all_else_keeps_its_default():
    settings = from_notebook(run_cells(PARAMETERS, SETUP))
    assert settings == Settings(n_remove=6, alpha="auto", n_remove_grid=[3, 6])
    assert from_notebook(run_cells("seed: int = 7\n")) == Settings(seed=7)


def test_injected_values_win():
    injected = inject(n_remove=9, alpha=0.5, n_remove_grid=[1, 2])
    assert injected.startswith("# Parameters")
    assert from_notebook(run_cells(PARAMETERS, injected)) == Settings(
        n_remove=9, alpha=0.5, n_remove_grid=[1, 2]
    )


def test_injected_names_that_the_notebook_does_not_declare_are_refused():
    sentence = refusal(from_notebook, run_cells(PARAMETERS, inject(n_remvoe=3, n_remove=3)))
    assert "unknown parameter n_remvoe" in sentence and "declares alpha, n_remove, n_remove_grid" in sentence
    # a setting, but none that this notebook has
    assert "unknown parameter max_steps" in refusal(from_notebook, run_cells(PARAMETERS, inject(max_steps=3)))


def test_injected_values_of_the_wrong_type_or_range_are_refused():
    assert "n_remove must be a whole number" in refusal(
        from_notebook, run_cells(PARAMETERS, inject(n_remove="3"))
    )
    assert "alpha must lie in [0, 1]" in refusal(from_notebook, run_cells(PARAMETERS, inject(alpha=2)))


def test_declared_names_that_are_no_settings_are_refused():
    assert "declares n_remvoe, which no setting is called" in refusal(
        from_notebook, run_cells("n_remvoe: int = 6\n")
    )


def test_cells_can_be_run_again_in_any_order():
    injected = inject(n_remove=9)
    again = PARAMETERS, injected, injected, SETUP
    namespace = run_cells(PARAMETERS, injected, SETUP, "%matplotlib inline", "y = (", *again)
    assert from_notebook(namespace).n_remove == 9
    assert from_notebook(run_cells(injected, PARAMETERS)).n_remove == 6  # the cell that ran last decides
    assert (
        from_notebook(run_cells(PARAMETERS, PARAMETERS.replace("6", "8"))).n_remove == 8
    )  # edited and run again
    assert from_notebook(run_cells(PARAMETERS, "n_remove = 4")).n_remove == 4  # set by hand further down


def test_a_mistyped_name_can_be_put_right_without_a_restart():
    assert from_notebook(run_cells("n_remvoe: int = 6\n", "n_remove: int = 6\n")) == Settings(n_remove=6)


def test_a_parameters_cell_that_is_not_recognised_is_refused_not_ignored():
    """One line without its type, and the whole cell would silently give the defaults."""
    refusal(from_notebook, run_cells("n_remove: int = 9\nseed = 7\n"))
    refusal(from_notebook, run_cells(SETUP))


def test_annotated_cells_of_the_readers_own_do_no_harm():
    settings = from_notebook(run_cells(PARAMETERS, "class A: pass\na = A()", "a.x: int = 3"))
    assert settings.n_remove == 6


def test_a_real_kernel_keeps_the_cells_and_shows_the_sentence_alone(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    from IPython.core.interactiveshell import InteractiveShell
    from traitlets.config import Config

    shell = InteractiveShell(config=Config({"HistoryManager": {"enabled": False}}))
    for cell in (
        PARAMETERS,
        inject(n_remove=9),
        "from simdiff_utils.settings import from_notebook"
        "found = from_notebook(globals())",
    ):
        shell.run_cell(cell, store_history=True).raise_error()
    assert shell.user_ns["found"] == Settings(n_remove=9, n_remove_grid=[3, 6])

    shell.run_cell(inject(n_remvoe=3), store_history=True)
    capsys.readouterr()
    assert not shell.run_cell("from_notebook(globals())", store_history=True).success
    shown = "".join(capsys.readouterr())
    assert "SimDiffError: unknown parameter n_remvoe" in shown
    assert "Traceback" not in shown and "settings.py" not in shown


# ---- where the repository is
# -------------------------------------------------------------------------------------


def test_the_repository_is_found_from_inside_and_the_place_itself_from_outside(tmp_path):
    root = Path(__file__).parents[2]
    assert repository_root(root / "notebooks") == repository_root(root / "simdiff_utils") == root
    (tmp_path / "pyproject.toml").touch()  # another project's
    assert repository_root(tmp_path) == tmp_path
    (tmp_path / "deep").mkdir()
    assert repository_root(tmp_path / "deep") == tmp_path / "deep"


def test_a_kernel_without_history_still_knows_the_parameters():
    """nbval runs cells with store_history=False: the annotations say what the parameters cell declared."""
    namespace: dict = {"In": [""]}
    exec(PARAMETERS, namespace)
    assert from_notebook(namespace) == from_notebook(run_cells(PARAMETERS))
