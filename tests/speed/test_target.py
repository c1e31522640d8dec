"""Targets: sizes held to the exported files, perplexity to all numbers of layers; what is out of reach."""

import json

import numpy as np
import pytest
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from simdiff_utils import SimDiffError
from simdiff_utils.criterion import stage as criterion
from simdiff_utils.engine.perplexity import perplexity, perplexity_interval
from simdiff_utils.pruning.stage import pruned_checkpoint
from simdiff_utils.speed.target import gains, resolve

N_LAYERS = 6


def test_the_sizes_are_those_of_the_checkpoint_that_is_written(make_run):
    run = make_run()
    table = gains(run).set_index("n_remove")
    assert list(table.index) == list(range(N_LAYERS))
    resolved, sentence = resolve(make_run(target=f"params <= {table.loc[3, 'params'] + 1}"))
    assert resolved.settings.n_remove == 3 and resolved.settings.target == ""
    assert sentence.startswith("target params <= ") and "3 of 6 layers go" in sentence
    folder = pruned_checkpoint(resolved)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.num_hidden_layers == 3
    assert sum(p.numel() for p in model.parameters()) == table.loc[3, "params"]
    with safe_open(folder / "model.safetensors", "pt") as file:
        n_bytes = sum(file.get_tensor(name).nbytes for name in file.keys())
    assert n_bytes / 2**30 == pytest.approx(table.loc[3, "gib"])


def test_the_smallest_number_is_taken_and_x_means_times_the_dense_model(make_run):
    table = gains(make_run()).set_index("n_remove")
    shares = table["params"] / table.loc[0, "params"]
    for n_remove in (1, 4):
        for target in (
            f"params <= {table.loc[n_remove, 'params']}",
            f"params <= {shares[n_remove] + 1e-9:.9f}x",
        ):
            assert resolve(make_run(target=target))[0].settings.n_remove == n_remove
        gib = table.loc[n_remove, "gib"] * (1 + 1e-6)
        assert resolve(make_run(target=f"gib <= {gib:.12f}"))[0].settings.n_remove == n_remove


def test_the_speedup_is_the_bounds_and_is_kept(make_run):
    table = gains(make_run()).set_index("n_remove")
    assert (np.diff(table["decode_speedup"]) > 0).all() and table.loc[0, "decode_speedup"] == 1
    wanted = (table.loc[2, "decode_speedup"] + table.loc[3, "decode_speedup"]) / 2
    run = make_run(target=f"decode_speedup >= {wanted:.4f}")
    assert resolve(run)[0].settings.n_remove == 3
    (kept,) = run.folder.glob("target-*/result.json")
    assert json.loads(kept.read_text())["n_remove"] == 3
    assert resolve(run)[1] == resolve(run)[1]


@pytest.mark.parametrize("relative", [True, False])
def test_within_a_perplexity_the_largest_number_is_taken_and_the_test_split_asked(make_run, relative):
    run = make_run(criterion="cosine")
    split = {name: criterion.evaluator(run, name) for name in ("validation", "test")}
    ends = {}
    for n_remove in range(1, N_LAYERS):
        removed = frozenset(criterion.choices(run, [n_remove], ["cosine"]).iloc[0]["removed"])
        losses, dense = split["validation"].losses([removed, frozenset()])
        ends[n_remove] = perplexity_interval(losses, dense if relative else None)[1], removed
    bound = float(np.median([end for end, _ in ends.values()]))
    asked = f"perplexity <= {bound:.6f}{'x' * relative}"
    resolved, sentence = resolve(make_run(criterion="cosine", target=asked))
    found = resolved.settings.n_remove
    assert ends[found][0] <= bound + 1e-6
    assert found == N_LAYERS - 1 or ends[found + 1][0] > bound - 1e-6, "one more would have done"
    losses, dense = split["test"].losses([ends[found][1], frozenset()])
    expected = perplexity(losses - dense if relative else losses)
    assert f"{expected:.4g} (95 % interval" in sentence and "on the test split" in sentence


@pytest.mark.parametrize(
    "target, words",
    [
        ("params <= 10", "without 5 of 6 layers params is"),
        ("gib <= 1e0", ""),  # any cut does
        ("decode_speedup >= 50", "without 5 of 6 layers decode_speedup is"),
        ("perplexity <= 0.5x", "without one layer perplexity is times dense"),
        ("perplexity <= 1", "without one layer perplexity is"),
    ],
)
def test_out_of_reach_is_a_sentence_with_the_nearest_that_there_is(make_run, target, words):
    run = make_run(target=target)
    if not words:
        assert resolve(run)[0].settings.n_remove == 1
        return
    with pytest.raises(SimDiffError) as error:
        resolve(run)
    assert words in str(error.value) and "the nearest that there is" in str(error.value)
    assert not list(run.folder.glob("target-*"))


def test_without_a_target_nothing_happens(make_run):
    run = make_run()
    assert resolve(run) == (run, "")
