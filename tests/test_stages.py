"""The stages of a search on a tiny model: what is chosen against evaluating every candidate here, one by one."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from simdiff_utils.alpha import search_ternary
from simdiff_utils.criteria import choose_removed, fuse, normalise
from simdiff_utils.methods import METHODS, alpha_path
from simdiff_utils.perplexity import perplexity
from simdiff_utils.settings import Settings, SimDiffError
from simdiff_utils.stages import Run
from simdiff_utils.surgery import layers_removed

GRID = [1, 2, 4]
CRITERIA = ["cosine", "masd", "relative", "portfolio"]


@pytest.fixture(scope="module")
def settings(tiny_model, tiny_text):
    return Settings(model=str(tiny_model), text=str(tiny_text), n_samples=4, seq_len=16, n_validation=12, n_test=6,
                    criteria=CRITERIA, n_remove_grid=GRID, n_remove=2, exact=True)


@pytest.fixture
def make_run(settings, tmp_path, monkeypatch):
    """Function: settings that differ -> a run with a folder of the test's own."""
    monkeypatch.setenv("SIMDIFF_RUNS", str(tmp_path / "runs"))
    return lambda **differing: Run(replace(settings, **differing))


@torch.inference_mode()
def perplexity_by_hand(run, split, removed):
    """From the logits of the model without the layers, block by block, in float64."""
    with layers_removed(run.model, frozenset(removed)):
        losses = []
        for block in run.blocks(split):
            logits = run.model(input_ids=block[None], use_cache=False).logits[0, :-1].double()
            losses.append(-logits.log_softmax(-1)[torch.arange(len(block) - 1), block[1:]].mean().item())
    return np.exp(np.mean(losses))


def test_each_criterion_gets_the_best_of_its_candidates(make_run):
    run = make_run()
    table = run.choices(GRID)
    assert list(zip(table["n_remove"], table["criterion"], strict=True)) == [(k, c) for k in GRID for c in CRITERIA]
    for row in table.itertuples():
        candidates = METHODS[row.criterion].propose(run.evidence(), row.n_remove)
        measured = {c.removed: perplexity_by_hand(run, "validation", c.removed) for c in candidates}
        best = min(measured, key=measured.get)
        assert frozenset(row.removed) == best and row.n_candidates == len(measured)
        assert row.validation_perplexity == pytest.approx(measured[best], rel=1e-4)
        assert row.validation_low < row.validation_perplexity < row.validation_high
        first = next(c for c in candidates if c.removed == best)
        assert row.proposed_by == first.proposed_by
        assert (row.low, row.high) == (first.low, first.high) or np.isnan(row.low)
    by_criterion = table.pivot(index="n_remove", columns="criterion", values="validation_perplexity")
    assert (by_criterion["portfolio"] <= by_criterion.min(axis=1) + 1e-9).all()


def test_what_was_chosen_is_read_and_not_computed_again(make_run):
    first = make_run().choices(GRID)
    run = make_run()
    again = run.choices(GRID)
    assert again.equals(first)
    assert run.evaluator("validation").cost.layer_tokens == run.evaluator("validation").cost.head_tokens == 0
    assert run.choices([2], ["tail"])["removed"].tolist() == [[4, 5]]
    for path in run.folder.glob("choices-*/*.json"):
        json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))


def test_racing_chooses_with_fewer_blocks_but_reports_on_all(make_run):
    exact, raced = make_run(), make_run(exact=False, confidence=0.5)
    exact.choices([2]), raced.choices([2])
    assert raced.evaluator("validation").cost.head_tokens <= exact.evaluator("validation").cost.head_tokens
    row = raced.chosen()
    by_hand = perplexity_by_hand(raced, "validation", row["removed"])
    assert row["validation_perplexity"] == pytest.approx(by_hand, rel=1e-4)


def test_the_published_search_is_that_of_its_function(make_run):
    run = make_run(search="ternary", criteria=["masd"], eps=0.1)
    probes = search_ternary(*normalise(run.statistics().table(), "masd"), 2,
                            lambda removed: perplexity_by_hand(run, "validation", removed), eps=0.1)
    best = probes.loc[probes["perplexity"].idxmin()]
    row = run.choices([2]).iloc[0]
    assert row["removed"] == best["removed"] and row["n_evaluations"] == len(probes)
    assert row["low"] == row["high"] == best["alpha"]
    assert run.probes("masd", 2).drop(columns="perplexity").equals(probes.drop(columns="perplexity"))


def test_a_given_alpha_is_taken_as_it_is(make_run):
    run = make_run(alpha=0.25)
    row = run.choices([2], ["masd"]).iloc[0]
    assert row["alpha"] == 0.25
    assert frozenset(row["removed"]) == choose_removed(fuse(*normalise(run.statistics().table(), "masd"), 0.25), 2)


def test_steps_hold_every_set_of_the_path_on_every_block(make_run):
    run = make_run()
    steps = run.steps("relative", 2)
    path = alpha_path(run.statistics(), "relative")
    assert steps["removed"].tolist() == path.loc[path["n_remove"] == 2, "removed"].tolist()
    for row in steps.itertuples():
        assert row.perplexity == pytest.approx(perplexity_by_hand(run, "validation", row.removed), rel=1e-4)
        assert row.perplexity_low < row.perplexity < row.perplexity_high


def test_no_difference_inside_its_interval_is_called_a_win(make_run):
    run = make_run()
    table = run.compare(GRID)
    assert {"same set", "better", "worse", "no difference shown"} >= set(table["verdict"])
    shortgpt = table[table["criterion"] == "cosine"].set_index("n_remove")
    assert (shortgpt["verdict"] == "same set").all() and (shortgpt["to_cosine"] == 1).all()
    dense = perplexity_by_hand(run, "test", frozenset())
    for row in table.itertuples():
        measured = perplexity_by_hand(run, "test", row.removed)
        assert row.test_perplexity == pytest.approx(measured, rel=1e-4)
        assert row.ratio == pytest.approx(measured / dense, rel=1e-4)
        assert row.to_cosine == pytest.approx(measured / shortgpt.loc[row.n_remove, "test_perplexity"], rel=1e-4)
        same = row.removed == shortgpt.loc[row.n_remove, "removed"]
        assert (row.verdict == "same set") == same
        if not same:
            inside = row.to_cosine_low <= 1 <= row.to_cosine_high
            assert row.verdict == ("no difference shown" if inside else "better" if row.to_cosine < 1 else "worse")


def test_the_model_decides_how_many_layers_can_go(make_run):
    with pytest.raises(SimDiffError, match="n_remove must lie between 1 and 5"):
        make_run(n_remove=7)
    assert perplexity(make_run().losses("test")) == pytest.approx(perplexity_by_hand(make_run(), "test", []), rel=1e-4)
