"""The choices of a search on a tiny model, against evaluating every candidate here, one by one."""

import functools
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from simdiff_utils import SimDiffError
from simdiff_utils.capture import stage as capture
from simdiff_utils.criterion import laco, stage
from simdiff_utils.criterion.candidates import Candidate
from simdiff_utils.criterion.equations import choose_removed, fuse, normalise
from simdiff_utils.criterion.laco import Merges
from simdiff_utils.criterion.propose import count_passes, propose, search_probes
from simdiff_utils.criterion.search import search_ternary
from simdiff_utils.engine.decoder import stream_decoder
from simdiff_utils.engine.perplexity import perplexity
from simdiff_utils.engine.surgery import layers_removed
from simdiff_utils.registry import CRITERIA
from tests.helpers import merge_by_hand

GRID = [1, 2, 4]
NAMES = ["cosine", "masd", "relative", "portfolio"]


@torch.inference_mode()
def perplexity_by_hand(run, split, removed):
    """From the logits of the model without the layers, in float64."""
    blocks = run.blocks(split)
    with layers_removed(run.model, frozenset(removed)):
        logits = run.model(input_ids=blocks, use_cache=False).logits[:, :-1].double()
    found = -logits.log_softmax(-1).gather(-1, blocks[:, 1:, None])
    return np.exp(found.mean().item())


def test_each_criterion_gets_the_best_of_its_candidates(make_run):
    run = make_run()
    table = stage.choices(run, GRID)
    assert list(zip(table["n_remove"], table["criterion"], strict=True)) == [
        (k, c) for k in GRID for c in NAMES
    ]
    for row in table.itertuples():
        candidates = propose(row.criterion, stage.evidence(run), row.n_remove)
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
    first = stage.choices(make_run(), GRID)
    run = make_run()
    again = stage.choices(run, GRID)
    assert again.equals(first)
    assert (
        stage.evaluator(run, "validation").cost.layer_tokens
        == stage.evaluator(run, "validation").cost.head_tokens
        == 0
    )
    assert stage.choices(run, [2], ["tail"])["removed"].tolist() == [[4, 5]]
    for path in run.folder.glob("choices-*/*.json"):
        json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))


def test_racing_chooses_with_fewer_blocks_but_reports_on_all(make_run):
    exact, raced = make_run(), make_run(exact=False, confidence=0.5)
    stage.choices(exact, [2]), stage.choices(raced, [2])
    assert (
        stage.evaluator(raced, "validation").cost.head_tokens
        <= stage.evaluator(exact, "validation").cost.head_tokens
    )
    row = stage.chosen(raced)
    by_hand = perplexity_by_hand(raced, "validation", row["removed"])
    assert row["validation_perplexity"] == pytest.approx(by_hand, rel=1e-4)


def test_the_published_search_is_that_of_its_function(make_run):
    run = make_run(search="ternary", criteria=["masd"], eps=0.1)
    probes = search_ternary(
        *normalise(capture.statistics(run).table(), "masd"),
        2,
        lambda removed: perplexity_by_hand(run, "validation", removed),
        eps=0.1,
    )
    best = probes.loc[probes["perplexity"].idxmin()]
    row = stage.choices(run, [2]).iloc[0]
    assert row["removed"] == best["removed"] and row["n_evaluations"] == len(probes)
    assert row["low"] == row["high"] == best["alpha"]
    assert (
        search_probes("masd", stage.evidence(run), 2)
        .drop(columns="perplexity")
        .equals(probes.drop(columns="perplexity"))
    )


def test_a_given_alpha_is_taken_as_it_is(make_run):
    run = make_run(alpha=0.25)
    row = stage.choices(run, [2], ["masd"]).iloc[0]
    assert row["alpha"] == 0.25
    assert frozenset(row["removed"]) == choose_removed(
        fuse(*normalise(capture.statistics(run).table(), "masd"), 0.25), 2
    )


def test_steps_hold_every_set_of_the_path_on_every_block(make_run):
    run = make_run()
    steps = stage.steps(run, "relative", 2)
    path = stage.evidence(run).alpha_path("relative")
    assert steps["removed"].tolist() == path.loc[path["n_remove"] == 2, "removed"].tolist()
    for row in steps.itertuples():
        assert row.perplexity == pytest.approx(perplexity_by_hand(run, "validation", row.removed), rel=1e-4)
        assert row.perplexity_low < row.perplexity < row.perplexity_high


def test_no_difference_inside_its_interval_is_called_a_win(make_run):
    run = make_run()
    table = stage.compare(run, GRID)
    assert {"same set", "better", "worse", "no difference shown"} >= set(table["verdict"])
    shortgpt = table[table["criterion"] == "cosine"].set_index("n_remove")
    assert (shortgpt["verdict"] == "same set").all() and (shortgpt["to_cosine"] == 1).all()
    dense = perplexity_by_hand(run, "test", frozenset())
    for row in table.itertuples():
        measured = perplexity_by_hand(run, "test", row.removed)
        assert row.test_perplexity == pytest.approx(measured, rel=1e-4)
        assert row.ratio == pytest.approx(measured / dense, rel=1e-4)
        assert row.to_cosine == pytest.approx(
            measured / shortgpt.loc[row.n_remove, "test_perplexity"], rel=1e-4
        )
        same = row.removed == shortgpt.loc[row.n_remove, "removed"]
        assert (row.verdict == "same set") == same
        if not same:
            inside = row.to_cosine_low <= 1 <= row.to_cosine_high
            assert row.verdict == (
                "no difference shown" if inside else "better" if row.to_cosine < 1 else "worse"
            )


def test_the_model_decides_how_many_layers_can_go(make_run):
    with pytest.raises(SimDiffError, match="n_remove must lie between 1 and 5"):
        make_run(n_remove=7)
    assert perplexity(stage.losses(make_run(), "test")) == pytest.approx(
        perplexity_by_hand(make_run(), "test", []), rel=1e-4
    )


# ---- the peers


@pytest.fixture(scope="module")
def deep_model(tmp_path_factory, make_tiny, tokenizer):
    """A folder with a model of 9 layers: of 6, Shortened-LLM's methods protect all."""
    folder = tmp_path_factory.mktemp("models") / "deep"
    make_tiny("llama", num_hidden_layers=9).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def merged_by_hand(run, row):
    """A run on a copy of the model, the merges of a row of choices in its weights."""
    return SimpleNamespace(model=merge_by_hand(run.model, row.merges), blocks=run.blocks)


def test_every_peers_choice_is_its_best_set_and_lacos_is_measured_merged(make_run, deep_model):
    run = make_run(model=deep_model, n_samples=6, seq_len=32, exact=False)
    assert set(stage.choices(run, [2], ["laco"])["criterion"]) == {"laco"}  # alone, too
    table = stage.choices(run, [2], list(CRITERIA)).set_index("criterion")
    assert tuple(table.index) == tuple(CRITERIA)
    expected_passes = {
        "cosine": 1,
        "angular": 1,
        "tail": 0,
        "random": 0,
        "magnitude": 0,
        "taylor": 3,
        "one-shot": 9,
        "sleb": 7 + 6,
        "window": 8,
        "entrodrop": 1,
    }
    by_hand = functools.cache(functools.partial(perplexity_by_hand, run, "validation"))
    for row in table.itertuples():
        candidates = propose(row.Index, stage.evidence(run), 2)
        assert row.n_passes == expected_passes.get(row.Index, count_passes(row.Index, candidates, 9, 2))
        assert row.n_candidates == len({candidate.removed for candidate in candidates})
        if row.Index == "laco":
            assert row.n_passes == candidates[0].n_models > 1
            assert row.merges == [[stays, list(folded)] for stays, folded in candidates[0].edit.merges] != []
            assert sorted(i for _, folded in row.merges for i in folded) == row.removed
            measured = {
                frozenset(row.removed): perplexity_by_hand(
                    merged_by_hand(run, row), "validation", row.removed
                )
            }
            assert abs(by_hand(frozenset(row.removed)) / row.validation_perplexity - 1) > 0.01
        else:
            assert row.merges == []
            measured = {c.removed: by_hand(c.removed) for c in candidates}
        best = min(measured, key=measured.get)
        assert frozenset(row.removed) == best
        assert row.validation_perplexity == pytest.approx(measured[best], rel=1e-4)
    again = make_run(model=deep_model, n_samples=6, seq_len=32, exact=False)
    assert stage.choices(again, [2], list(CRITERIA)).set_index("criterion").equals(table)
    assert not [name for name in again.shared if name[0] in ("losses", "decoder")], "read, not computed"


def test_the_comparison_on_the_test_split_measures_lacos_model_merged(make_run):
    run = make_run(criteria=["cosine", "laco", "window"])
    table = stage.compare(run, [1, 2])
    for row in table.itertuples():
        by_hand = perplexity_by_hand(merged_by_hand(run, row), "test", row.removed)
        assert row.test_perplexity == pytest.approx(by_hand, rel=1e-4)
        assert (row.criterion != "laco") or row.verdict != "same set"
    laco = table[table["criterion"] == "laco"]
    shortgpt = table[table["criterion"] == "cosine"]
    np.testing.assert_allclose(
        laco["to_cosine"], laco["test_perplexity"].to_numpy() / shortgpt["test_perplexity"]
    )


def test_a_set_that_cosine_chooses_too_is_another_model_once_merged(make_run, monkeypatch):
    run = make_run(criteria=["cosine", "laco"])
    (candidate,) = propose("cosine", stage.evidence(run), 1)
    (layer_idx,) = candidate.removed
    edit = Merges((((layer_idx + 1) % 6, (layer_idx,)),))
    merged = replace(candidate, proposed_by="laco", edit=edit, n_models=2)
    monkeypatch.setattr(laco, "laco_sets", lambda *_: [merged])
    table = stage.compare(run, [1]).set_index("criterion")
    assert table.loc["laco", "removed"] == table.loc["cosine", "removed"]
    assert table.loc["cosine", "verdict"] == "same set" != table.loc["laco", "verdict"]
    assert table.loc["laco", "test_perplexity"] != table.loc["cosine", "test_perplexity"]


def test_random_follows_the_settings_seed(make_run):
    drawn = {
        seed: stage.choices(make_run(seed=seed), [3], ["random"]).iloc[0]["removed"] for seed in range(4)
    }
    for seed, removed in drawn.items():
        assert removed == sorted(np.random.default_rng(seed).permutation(6)[:3].tolist())
    assert len(set(map(tuple, drawn.values()))) > 1


@pytest.mark.parametrize("criterion", ["magnitude", "taylor", "sleb"])
def test_more_layers_than_a_peer_may_touch_are_refused_in_the_run_too(make_run, criterion):
    with pytest.raises(SimDiffError, match="protect") as error:
        stage.choices(make_run(), [5], [criterion])
    assert "\n" not in str(error.value)


def test_streamed_from_disk_every_choice_is_the_same_or_one_sentence(
    make_run, deep_model, tmp_path, monkeypatch
):
    expected = stage.choices(
        make_run(model=deep_model, seq_len=32),
        [2],
        [name for name in CRITERIA if name not in ("taylor", "laco")],
    )
    monkeypatch.setenv("SIMDIFF_RUNS", str(tmp_path / "streamed"))
    run = make_run(model=deep_model, seq_len=32)
    run.once(("decoder", "float32"), lambda: stream_decoder(run.checkpoint.folder, "float32"))
    assert stage.choices(run, [2], list(expected["criterion"])).equals(expected)
    assert stage.evaluator(run, "validation").cost.layer_tokens > 0
    for criterion in ("taylor", "laco"):
        with pytest.raises(
            SimDiffError, match=rf"^{criterion} .* needs the model in memory: raise memory_gib\.$"
        ):
            stage.choices(run, [2], [criterion])


def test_of_several_edited_models_the_best_is_taken(make_run, monkeypatch):
    run = make_run()
    edits = [Merges(((stays, (stays + 1,)),)) for stays in range(5)]
    candidates = [Candidate(edit.removed, "laco", edit=edit) for edit in edits]
    monkeypatch.setattr(laco, "laco_sets", lambda *_: candidates)
    row = stage.choices(run, [1], ["laco"]).iloc[0]
    by_hand = {}
    for edit in edits:
        by_hand[edit] = perplexity_by_hand(merged_by_hand(run, edit), "validation", edit.removed)
    best = min(by_hand, key=by_hand.get)
    assert Merges.read(row["merges"]) == best != edits[0]
    assert row["validation_perplexity"] == pytest.approx(by_hand[best], rel=1e-4)
