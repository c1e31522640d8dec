"""The comparison on a tiny model: every number against one computed here, what is kept, and what the rows
say."""

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch

from benchmarks.comparison import read_ledger, write_ledger
from simdiff_utils import SimDiffError
from simdiff_utils.comparison import rows as comparison
from simdiff_utils.comparison.rows import PERPLEXITY, chosen_sets, measure, windows
from simdiff_utils.comparison.tables import compare_with_shortgpt, describe_criteria, stored_rows
from simdiff_utils.comparison.tasks.evaluate import evaluate_tasks
from simdiff_utils.comparison.tasks.load import TaskData
from simdiff_utils.comparison.tasks.suites import SUITES
from simdiff_utils.criterion import stage
from simdiff_utils.engine.surgery import layers_merged, layers_removed
from simdiff_utils.registry import CRITERIA
from simdiff_utils.run import Run
from simdiff_utils.settings import Settings

GRID = [1, 2]
NAMES = [name for name in CRITERIA if name not in ("magnitude", "taylor", "one-shot")]  # they protect all 6
WINDOW, N_WINDOWS = 12, 5


@pytest.fixture(scope="module")
def settings(tiny_model, tiny_text, data_folder):
    return Settings(
        model=str(tiny_model),
        text=str(tiny_text),
        n_samples=4,
        seq_len=32,
        n_validation=4,
        criteria=NAMES,
        n_remove_grid=GRID,
        data_folder=str(data_folder),
        window_len=WINDOW,
        n_windows=N_WINDOWS,
        task_criteria=["cosine", "sleb"],
        task_grid=[2],
        task_limit=6,
        n_stories=0,
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def run(settings, root, monkeypatch):
    monkeypatch.setenv("SIMDIFF_RUNS", str(root))
    return Run(settings)


@pytest.fixture
def rows(run):
    return measure(run)


@torch.inference_mode()
def window_losses_by_hand(run, data_folder, removed, merges):
    """Losses of every window in float64, from the model's own forward."""
    text = (data_folder / "wikitext2" / "wiki.test.raw").read_text(encoding="utf-8")
    lines = [line + "\n" if line.strip() else "" for line in text.split("\n")[:-1]]
    ids = run.tokenizer("\n\n".join(lines), add_special_tokens=False)["input_ids"]
    windows = torch.tensor([ids[i : i + WINDOW] for i in range(0, len(ids) - WINDOW + 1, WINDOW)])
    with layers_merged(run.model, merges), layers_removed(run.model, frozenset(removed)):
        logits = run.model(input_ids=windows, use_cache=False).logits[:, :-1].double()
    return -logits.log_softmax(-1).gather(-1, windows[:, 1:, None]).mean((1, 2)).numpy()


def test_perplexity_is_the_literatures_on_the_same_windows_for_all(run, rows, data_folder):
    measured = rows[rows["metric"] == PERPLEXITY].set_index(["criterion", "n_remove", "seed"])
    chosen = chosen_sets(run).set_index(["criterion", "n_remove", "seed"])
    assert list(measured.index) == list(chosen.index) and ("dense", 0, 0) in measured.index
    base = {}
    which = np.random.default_rng(0).permutation(len(window_losses_by_hand(run, data_folder, [], ())))[
        :N_WINDOWS
    ]
    for key, row in measured.iterrows():
        merges = tuple((stays, tuple(folded)) for stays, folded in chosen.loc[key, "merges"])
        losses = window_losses_by_hand(run, data_folder, chosen.loc[key, "removed"], merges)[which]
        base[key] = losses
        assert json.loads(row["removed"]) == chosen.loc[key, "removed"] and row["n"] == N_WINDOWS
        assert row["value"] == pytest.approx(math.exp(losses.mean()), rel=1e-4)
        stderr = losses.std(ddof=1) / math.sqrt(N_WINDOWS)
        assert row["stderr"] == pytest.approx(row["value"] * stderr, rel=1e-3)
        assert row["low"] <= row["value"] <= row["high"]
    ratios = rows[rows["metric"] == "ratio_to_cosine"].set_index(["criterion", "n_remove", "seed"])
    assert set(ratios.index) == set(measured.index) - {("dense", 0, 0)}
    for key, row in ratios.iterrows():
        expected = math.exp((base[key] - base["cosine", key[1], 0]).mean())
        assert row["value"] == pytest.approx(expected, rel=1e-3) and row["low"] <= row["value"] <= row["high"]


def test_rows_are_one_number_each_with_its_set_seed_cost_and_provenance(run, rows):
    assert list(rows.columns) == list(comparison.COLUMNS)
    assert not rows.duplicated(["criterion", "n_remove", "seed", "metric"]).any()
    counts = rows[rows["metric"] == "passes"].groupby("criterion")["seed"].nunique()
    assert {name: counts[name] for name in NAMES} == {name: CRITERIA[name].n_seeds for name in NAMES}
    passes = rows[rows["metric"] == "passes"].set_index(["criterion", "n_remove", "seed"])["value"]
    assert passes["cosine", 2, 0] == 1 and passes["entrodrop", 2, 0] == 1 and passes["tail", 1, 0] == 0
    assert passes["sleb", 2, 0] == 4 + 3 and passes["window", 2, 0] == 5
    assert rows["provenance"].dropna().str.contains(f"weights {run.checkpoint.sha256[:8]}").all()
    assert set(rows["model"]) == {"tiny"}


def test_task_scores_are_those_of_the_tasks_stage_for_the_criteria_and_numbers_asked(run, rows, data_folder):
    chosen = chosen_sets(run).set_index(["criterion", "n_remove", "seed"])["removed"]
    asked = {("dense", 0), ("cosine", 2), ("sleb", 2)}
    accuracies = rows[rows["metric"].isin([f"{task} acc" for task in SUITES["zero_shot"]])]
    assert set(zip(accuracies["criterion"], accuracies["n_remove"], strict=True)) == asked
    sets = [frozenset(chosen[(*pair, 0)]) for pair in sorted(asked)]
    scores = evaluate_tasks(
        run.decoder, run.tokenizer, sets, SUITES["zero_shot"], TaskData(data_folder, ("folder",)), 6
    )
    expected = scores[scores["metric"] == "acc"].assign(removed=lambda table: table["removed"].map(str))
    for criterion, n_remove in asked:
        mine = expected[expected["removed"] == str(chosen[criterion, n_remove, 0])].set_index("task")
        for row in accuracies[
            (accuracies["criterion"] == criterion) & (accuracies["n_remove"] == n_remove)
        ].itertuples():
            found = mine.loc[row.metric.removesuffix(" acc")]
            assert (row.value, row.stderr, row.n) == (found["value"], found["stderr"], 6)
            assert row.low == pytest.approx(row.value - 1.96 * row.stderr) and row.split.endswith("(folder)")
        average = rows[
            (rows["criterion"] == criterion) & (rows["n_remove"] == n_remove) & (rows["metric"] == "AVG")
        ]["value"]
        assert average.item() == pytest.approx(mine["value"].mean()) and len(mine) == 8
    retained = rows[rows["metric"] == "RP"].set_index("criterion")["value"]
    assert retained["dense"] == 100 and set(retained.index) == {"dense", "cosine", "sleb"}


def test_stories_are_answered_beside_the_tasks(run, rows, settings, monkeypatch):
    with pytest.raises(
        SimDiffError, match="coqa has the model write up to 256 tokens, and its context is 64"
    ):
        measure(Run(settings.replace(n_stories=3)))
    asked = []

    def note(*args, tasks, limit, **kwargs):
        asked.append((tuple(tasks), limit))
        return evaluate_tasks(*args, tasks=[task for task in tasks if task != "coqa"], limit=limit, **kwargs)

    monkeypatch.setattr(comparison, "evaluate_tasks", note)
    measure(Run(settings.replace(n_stories=3)))
    assert asked == [(SUITES["zero_shot"], 6), (("coqa",), 3)]


@pytest.fixture
def chosen(run):
    return chosen_sets(run)


@pytest.fixture
def later_code(chosen, monkeypatch):
    """The package's code is another one than that which chose."""
    for module in ("run", "criterion.stage"):
        monkeypatch.setattr(f"simdiff_utils.{module}.code_digest", lambda room: f"of a later {room}")


def refuse(*_args, **_kwargs):
    pytest.fail("computed again")


def test_what_was_measured_is_read_by_later_code_and_choices_are_made_again(
    rows, settings, chosen, later_code, monkeypatch
):
    monkeypatch.setattr(comparison.Evaluator, "_compute", refuse)
    monkeypatch.setattr("simdiff_utils.comparison.tasks.evaluate._compute", refuse)
    later = Run(settings)
    assert not stage.choice_file(later, "sleb", 2).exists()
    monkeypatch.setattr(comparison, "chosen_sets", lambda _: chosen)
    pd.testing.assert_frame_equal(measure(later), rows)


@pytest.fixture
def elsewhere(run, rows, chosen, settings, monkeypatch, tmp_path):
    """A run on a machine that has nothing but the ledger."""
    write_ledger([run], tmp_path / "ledger.jsonl")
    monkeypatch.setenv("SIMDIFF_RUNS", str(tmp_path / "elsewhere"))
    return Run(settings)


def test_another_machine_goes_on_from_the_ledger(elsewhere, rows, monkeypatch, tmp_path):
    read_ledger(elsewhere, tmp_path / "ledger.jsonl")
    monkeypatch.setattr("simdiff_utils.criterion.race.block_losses", refuse)
    monkeypatch.setattr("simdiff_utils.comparison.tasks.evaluate._compute", refuse)
    pd.testing.assert_frame_equal(measure(elsewhere), rows)
    write_ledger([elsewhere], tmp_path / "again.jsonl")
    assert (tmp_path / "again.jsonl").read_text() == (tmp_path / "ledger.jsonl").read_text()


def test_of_the_ledger_later_code_takes_what_was_measured_and_no_choice(elsewhere, tmp_path, later_code):
    read_ledger(elsewhere, tmp_path / "ledger.jsonl")
    assert not list(elsewhere.folder.glob("choices-*"))
    taken = {path.name.partition("-wikitext2")[0] for path in (elsewhere.folder / "comparison").iterdir()}
    assert taken == {"losses", "tasks"}


def test_more_windows_take_those_that_were_measured_again(run, rows, settings, monkeypatch):
    computed = []
    true = comparison.Evaluator._compute

    def spy(self, sets, blocks):
        computed.extend((removed, block) for removed in sets for block in blocks)
        true(self, sets, blocks)

    monkeypatch.setattr(comparison.Evaluator, "_compute", spy)
    more = measure(Run(settings.replace(n_windows=N_WINDOWS + 2, criteria=["cosine", "tail"], task_grid=[])))
    dense = [block for removed, block in computed if not removed]
    assert len(dense) == len(set(dense)) == 2
    assert (more[more["metric"] == PERPLEXITY]["n"] == N_WINDOWS + 2).all()


def test_too_many_windows_or_no_text_is_one_sentence(settings, run, tmp_path):
    with pytest.raises(SimDiffError, match="lower n_windows or window_len"):
        measure(Run(settings.replace(n_windows=10_000)))
    with pytest.raises(SimDiffError, match="no wikitext2/wiki.test.raw.gz in"):
        windows(Run(settings.replace(data_folder=str(tmp_path))))


def test_the_registry_as_a_table_says_what_is_compared_and_what_it_costs():
    table = describe_criteria(32, 8).set_index("name")
    assert list(table.index) == list(CRITERIA)
    compared = {"mssd", "masd", "log-mssd", "relative", "portfolio", "floating", "window", "laco"}
    assert set(table.index[table["then compares sets"] == "yes"]) == compared
    assert table.loc["sleb", "passes before comparing (L=32, K=8)"] == 212
    assert table.loc["taylor", "never removes (of 32)"] == "0, 1, 2, 3, 30, 31"


def test_a_model_that_was_not_measured_is_refused():
    with pytest.raises(SimDiffError, match="not nobody's: set measure = True"):
        stored_rows("nobody's")


def make_rows(cells):
    """Rows of one model from (criterion, n_remove, removed, perplexity, ratio, low, high, AVG)."""
    rows = []
    for criterion, n_remove, removed, perplexity, ratio, low, high, average in cells:
        shared = {"model": "m", "criterion": criterion, "n_remove": n_remove, "seed": 0, "removed": removed}
        rows.append(
            shared | {"metric": PERPLEXITY, "value": perplexity, "low": perplexity, "high": perplexity}
        )
        rows.append(shared | {"metric": "ratio_to_cosine", "value": ratio, "low": low, "high": high})
        if average is not None:
            rows.append(shared | {"metric": "AVG", "value": average})
    return pd.DataFrame(rows)


def test_a_difference_is_one_only_outside_its_interval():
    rows = make_rows(
        [
            ("cosine", 2, [1, 2], 50, 1, 1, 1, None),
            ("mssd", 2, [1, 2], 50, 1, 1, 1, None),
            ("masd", 2, [0, 2], 40, 0.8, 0.7, 0.9, None),
            ("sleb", 2, [3, 4], 49, 0.98, 0.9, 1.1, None),
            ("laco", 2, [1, 2], 90, 1.8, 1.5, 2.0, None),
        ]
    )
    assert list(compare_with_shortgpt(rows)["verdict"]) == [
        "same set",
        "same set",
        "better",
        "no difference shown",
        "worse",
    ]
