"""The parameters cell: what a notebook declares, what papermill injects, and what `more` may hold."""

import pytest
from papermill.translators import PythonTranslator

from simdiff_utils import SimDiffError
from simdiff_utils.parameters import READS, from_notebook, readable
from simdiff_utils.settings import Settings


def read(namespace: dict) -> Settings:
    return from_notebook(namespace, "03")


def refusal(call, *args, **kwargs) -> str:
    """The one sentence with which something is refused."""
    with pytest.raises(SimDiffError) as error:
        call(*args, **kwargs)
    sentence = str(error.value)
    assert sentence.endswith(".") and "\n" not in sentence, sentence
    return sentence


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
    settings = read(run_cells(PARAMETERS, SETUP))
    assert settings == Settings(n_remove=6, alpha="auto", n_remove_grid=[3, 6])
    assert read(run_cells("seed: int = 7\n")) == Settings(seed=7)


def test_injected_values_win():
    injected = inject(n_remove=9, alpha=0.5, n_remove_grid=[1, 2])
    assert injected.startswith("# Parameters")
    assert read(run_cells(PARAMETERS, injected)) == Settings(n_remove=9, alpha=0.5, n_remove_grid=[1, 2])


def test_injected_names_that_the_notebook_does_not_declare_are_refused():
    sentence = refusal(read, run_cells(PARAMETERS, inject(n_remvoe=3, n_remove=3)))
    assert "unknown parameter n_remvoe" in sentence and "declares alpha, n_remove, n_remove_grid" in sentence
    # a setting, but none that this notebook has
    assert "unknown parameter max_steps" in refusal(read, run_cells(PARAMETERS, inject(max_steps=3)))


def test_injected_values_of_the_wrong_type_or_range_are_refused():
    assert "n_remove must be a whole number" in refusal(read, run_cells(PARAMETERS, inject(n_remove="3")))
    assert 'alpha must be "auto" or a number in [0, 1]' in refusal(
        read, run_cells(PARAMETERS, inject(alpha=2))
    )


def test_declared_names_that_are_no_settings_are_refused():
    assert "declares n_remvoe, which no setting is called" in refusal(read, run_cells("n_remvoe: int = 6\n"))


def test_cells_can_be_run_again_in_any_order():
    injected = inject(n_remove=9)
    again = PARAMETERS, injected, injected, SETUP
    namespace = run_cells(PARAMETERS, injected, SETUP, "%matplotlib inline", "y = (", *again)
    assert read(namespace).n_remove == 9
    assert read(run_cells(injected, PARAMETERS)).n_remove == 6  # the cell that ran last decides
    assert read(run_cells(PARAMETERS, PARAMETERS.replace("6", "8"))).n_remove == 8  # edited and run again
    assert read(run_cells(PARAMETERS, "n_remove = 4")).n_remove == 4  # set by hand further down


def test_a_mistyped_name_can_be_put_right_without_a_restart():
    assert read(run_cells("n_remvoe: int = 6\n", "n_remove: int = 6\n")) == Settings(n_remove=6)


def test_a_parameters_cell_that_is_not_recognised_is_refused_not_ignored():
    """One line without its type, and the whole cell would silently give the defaults."""
    refusal(read, run_cells("n_remove: int = 9\nseed = 7\n"))
    refusal(read, run_cells(SETUP))


def test_annotated_cells_of_the_readers_own_do_no_harm():
    settings = read(run_cells(PARAMETERS, "class A: pass\na = A()", "a.x: int = 3"))
    assert settings.n_remove == 6


def test_a_real_kernel_keeps_the_cells_and_shows_the_sentence_alone(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    from IPython.core.interactiveshell import InteractiveShell
    from traitlets.config import Config

    shell = InteractiveShell(config=Config({"HistoryManager": {"enabled": False}}))
    setup = 'from simdiff_utils.parameters import from_notebook\nfound = from_notebook(globals(), "03")'
    for cell in (PARAMETERS, inject(n_remove=9), setup):
        shell.run_cell(cell, store_history=True).raise_error()
    assert shell.user_ns["found"] == Settings(n_remove=9, n_remove_grid=[3, 6])

    shell.run_cell(inject(n_remvoe=3), store_history=True)
    capsys.readouterr()
    assert not shell.run_cell('from_notebook(globals(), "03")', store_history=True).success
    shown = "".join(capsys.readouterr())
    assert "SimDiffError: unknown parameter n_remvoe" in shown
    assert "Traceback" not in shown and "settings.py" not in shown


def test_a_kernel_without_history_still_knows_the_parameters():
    """nbval runs cells with store_history=False: the annotations say what the parameters cell declared."""
    namespace: dict = {"In": [""]}
    exec(PARAMETERS, namespace)
    assert read(namespace) == read(run_cells(PARAMETERS))


# ---- more ----------------------------------------------------------------------------------------

MORE = PARAMETERS + "more: dict = {}  # any other setting by name\n"


def test_what_the_cell_does_not_declare_can_be_given_in_more():
    assert read(run_cells(MORE)) == Settings(n_remove_grid=[3, 6])
    found = read(run_cells(MORE, inject(more={"eps": 0.2, "exact": True}, n_remove=9)))
    assert (found.eps, found.exact, found.n_remove) == (0.2, True, 9)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"epps": 0.2}, "more names epps; beside its cell this notebook reads"),
        ({"n_remove": 3}, "more names n_remove;"),  # declared: there it is to be changed
        ({"max_steps": 3}, "more names max_steps;"),  # a setting, and none that notebook 03 reads
        ({"eps": 2.0}, "eps must lie between 0 and 1, got 2.0"),
        ([3], "more must hold settings by name"),
    ],
)
def test_more_refuses_what_would_change_nothing(more, words):
    assert words in refusal(read, run_cells(MORE, inject(more=more)))


def test_every_setting_is_read_by_some_notebook():
    read_somewhere = set().union(*map(readable, READS)) | {"model", "text", "pruned"}
    assert read_somewhere == set(Settings.model_fields)
