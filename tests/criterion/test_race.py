"""Losses computed once, the cost counted by hand, races against evaluating everything, searches against brute
force."""

from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from simdiff_utils import SimDiffError
from simdiff_utils.criterion import race as race_module
from simdiff_utils.criterion.laco import Merges
from simdiff_utils.criterion.race import Cost, Evaluator
from simdiff_utils.criterion.search import leave_one_out
from simdiff_utils.engine.decoder import Decoder
from simdiff_utils.engine.perplexity import block_losses
from tests.helpers import N_LAYERS, SETS, VOCAB_SIZE, merge_by_hand

DENSE = frozenset()
NAMES = [frozenset({i}) for i in range(12)]  # of sets whose losses are made up


def layer_runs(sets, n_layers):
    """Distinct (layers left out below, layer) pairs: what a tree of shared prefixes has to compute, once
    each."""
    return len(
        {
            (tuple(sorted(i for i in removed if i < layer_idx)), layer_idx)
            for removed in sets
            for layer_idx in range(n_layers)
            if layer_idx not in removed
        }
    )


@pytest.fixture
def made_up(monkeypatch):
    """Function: {set: losses per block} -> an evaluator that finds those, and `cells`, each (set, block)
    computed."""

    def make(table):
        cells = []

        def look_up(_decoder, blocks, sets, *_args, **_kwargs):
            which = blocks[:, 0].numpy()
            cells.extend((removed, int(block)) for removed in sets for block in which)
            return np.array([table[removed][which] for removed in sets])

        monkeypatch.setattr(race_module, "block_losses", look_up)
        n_blocks = len(next(iter(table.values())))
        numbered = torch.arange(n_blocks)[:, None].expand(-1, 2)  # each block's first token is its number
        return Evaluator(SimpleNamespace(n_layers=len(NAMES)), numbered), cells

    return make


def realistic(rng, n_sets=12, n_blocks=32, noise=None):
    """Some blocks are harder for all; sets lie up to 0.5 nats apart, five of them close; the rest differs by
    block."""
    effects = np.concatenate([[0.0, 0.01, 0.02, 0.04, 0.08], rng.uniform(0.1, 0.5, n_sets - 5)])
    noise = rng.normal(0, 0.1, (n_sets, n_blocks)) if noise is None else noise
    losses = 3 + rng.normal(0, 0.4, n_blocks) + rng.permutation(effects)[:, None] + noise
    return dict(zip(NAMES[:n_sets], losses, strict=True))


def best_of(table, sets=None):
    return min(sets or table, key=lambda removed: table[removed].mean())


# ---- losses and cost


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "falcon"])
def test_losses_are_those_of_each_set_alone_and_the_cost_that_of_the_tree(make_tiny, blocks, name):
    decoder, sets = Decoder(make_tiny(name)), [DENSE, *SETS]
    alone = np.array([block_losses(decoder, blocks, (removed,), batch_size=1)[0] for removed in sets])
    evaluator = Evaluator(decoder, blocks)
    found = evaluator.losses(sets)
    assert found.shape == (5, 5) and found.dtype == np.float64
    np.testing.assert_allclose(found, alone, rtol=1e-5)
    assert evaluator.cost == Cost(layer_runs(sets, N_LAYERS) * 5 * 20, len(sets) * 5 * 19, len(sets))
    for which in ([4, 0, 2], [1], np.array([3, 4])):
        np.testing.assert_allclose(
            Evaluator(decoder, blocks).losses(sets[::-1], which), alone[::-1, which], rtol=1e-5
        )
        np.testing.assert_array_equal(evaluator.losses(sets, which), found[:, which])


def test_the_same_set_twice_in_one_call_is_computed_once(llama, blocks, computed):
    evaluator = Evaluator(Decoder(llama), blocks)
    first, second, third = evaluator.losses([SETS[2], DENSE, SETS[2]])
    np.testing.assert_array_equal(first, third)
    assert abs(first - second).max() > 1e-3
    assert computed == [({SETS[2], DENSE}, 5)]


@pytest.mark.parametrize("n_layers", [2, 5, 9])
def test_leaving_one_layer_out_costs_little_more_than_half(make_tiny, blocks, n_layers):
    evaluator = Evaluator(Decoder(make_tiny("llama", num_hidden_layers=n_layers)), blocks)
    leave_one_out(evaluator)
    plain, shared = n_layers * (n_layers - 1), (n_layers - 1) * (n_layers + 2) // 2
    singles = [{i} for i in range(n_layers)]
    assert shared == layer_runs(singles, n_layers)
    assert plain == sum(layer_runs([removed], n_layers) for removed in singles)
    assert evaluator.cost == Cost(shared * blocks.numel(), n_layers * 5 * 19, n_layers)


def test_leave_one_out_is_each_layers_own_loss(llama, blocks):
    decoder = Decoder(llama)
    found = leave_one_out(Evaluator(decoder, blocks))
    for layer_idx in range(N_LAYERS):
        np.testing.assert_allclose(
            found[layer_idx], block_losses(decoder, blocks, (frozenset({layer_idx}),))[0], rtol=1e-5
        )


def test_nothing_is_computed_twice(llama, blocks, computed):
    evaluator = Evaluator(Decoder(llama), blocks)
    evaluator.losses(SETS[:2], [1, 3])
    evaluator.losses(SETS[:2], [3, 1])
    evaluator.losses(SETS[:1], [1])
    evaluator.losses(SETS, [0, 1, 3])  # new: block 0 for two sets, all three for the others
    evaluator.losses(SETS)
    assert computed == [(set(SETS[:2]), 2), (set(SETS[:2]), 1), (set(SETS[2:]), 3), (set(SETS), 2)]
    spent = Cost(**vars(evaluator.cost))
    evaluator.losses(SETS[::-1], [4, 2])
    evaluator.race({"all": SETS})
    assert evaluator.cost == spent and len(computed) == 4


def test_a_second_evaluator_on_the_folder_computes_nothing(llama, blocks, computed, tmp_path):
    decoder, sets = Decoder(llama), [DENSE, *SETS]
    expected = Evaluator(decoder, blocks, folder=tmp_path).losses(sets)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "dense.json",
        "without-0-2-5.json",
        "without-0.json",
        "without-2-3-4.json",
        "without-5.json",
    ]
    again = Evaluator(decoder, blocks, folder=tmp_path)
    np.testing.assert_array_equal(again.losses(sets), expected)
    assert again.cost == Cost(0, 0) and len(computed) == 1


def test_of_losses_partly_in_the_folder_the_rest_is_computed(llama, blocks, computed, tmp_path):
    decoder = Decoder(llama)
    known = Evaluator(decoder, blocks, folder=tmp_path).losses(SETS[:2], [4, 1])
    again = Evaluator(decoder, blocks, folder=tmp_path)
    found = again.losses(SETS[:2])
    assert computed[1:] == [(set(SETS[:2]), 3)]
    assert again.cost == Cost(layer_runs(SETS[:2], N_LAYERS) * 3 * 20, 2 * 3 * 19)
    np.testing.assert_array_equal(found[:, [4, 1]], known)
    np.testing.assert_allclose(found, block_losses(decoder, blocks, tuple(SETS[:2])), rtol=1e-5)
    third = Evaluator(decoder, blocks, folder=tmp_path)
    np.testing.assert_array_equal(third.losses(SETS[:2]), found)  # the file has grown
    assert third.cost == Cost(0, 0)


def test_sets_that_name_no_layers_are_refused(llama, blocks):
    with pytest.raises(SimDiffError, match="layers 0 to 5"):
        Evaluator(Decoder(llama), blocks).losses([frozenset({6})])


# ---- merged weights

EDIT, FOLDED = Merges(((3, (4,)), (1, (2, 3)))), frozenset({2, 3, 4})


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "falcon"])
def test_losses_of_merged_weights_are_those_of_a_model_made_by_hand(make_tiny, blocks, name):
    model = make_tiny(name)
    plain = Evaluator(Decoder(model), blocks)
    dense = plain.losses([DENSE, FOLDED])
    merged = plain.edited(EDIT)
    found = merged.losses([FOLDED, DENSE, frozenset({0, 2, 3, 4})])
    by_hand = Decoder(merge_by_hand(model, EDIT.merges))
    expected = block_losses(by_hand, blocks, (FOLDED, DENSE, frozenset({0, 2, 3, 4})))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert abs(found[0] - dense[1]).max() > 1e-3, "not those of plain removal"
    assert merged.cost.layer_tokens == layer_runs([FOLDED, DENSE, {0, 2, 3, 4}], N_LAYERS) * 5 * 20
    assert plain.cost.layer_tokens == layer_runs([DENSE, FOLDED], N_LAYERS) * 5 * 20
    np.testing.assert_array_equal(
        Evaluator(Decoder(model), blocks).losses([DENSE, FOLDED]), dense
    )  # whole again


def test_merged_losses_lie_in_a_folder_of_their_own(llama, blocks, computed, tmp_path):
    evaluator = Evaluator(Decoder(llama), blocks, folder=tmp_path)
    (plain,) = evaluator.losses([FOLDED])
    edits = [EDIT, Merges(((1, (4, 3, 2)),)), Merges(((0, (2,)), (1, (3, 4))))]
    found = {edit: evaluator.edited(edit).losses([FOLDED])[0] for edit in edits}
    assert all(abs(one - other).max() > 1e-3 for one, other in combinations([plain, *found.values()], 2))
    assert len(list(tmp_path.glob("merged-*/without-2-3-4.json"))) == 3 and len(computed) == 4
    again = Evaluator(Decoder(llama), blocks, folder=tmp_path)
    for edit, losses in found.items():
        as_in_json = Merges.read([[stays, list(folded)] for stays, folded in edit.merges])
        assert as_in_json == edit and edit.removed == FOLDED
        np.testing.assert_array_equal(again.edited(as_in_json).losses([FOLDED])[0], losses)
    np.testing.assert_array_equal(again.losses([FOLDED])[0], plain)
    assert len(computed) == 4


def test_an_edit_takes_the_place_of_another_and_none_gives_the_plain_model(llama, blocks, computed, tmp_path):
    plain = Evaluator(Decoder(llama), blocks, folder=tmp_path)
    edited, other = plain.edited(EDIT), Merges(((0, (1,)),))
    assert Merges.read([]) is None and plain.edited(None) is plain and edited.edited(EDIT) is edited
    assert (edited.n_layers, edited.n_blocks) == (N_LAYERS, 5)
    np.testing.assert_array_equal(edited.edited(other).losses([FOLDED]), plain.edited(other).losses([FOLDED]))
    np.testing.assert_array_equal(edited.edited(None).losses([FOLDED]), plain.losses([FOLDED]))
    assert len(computed) == 2 and sorted(path.name for path in tmp_path.iterdir()) == [
        other.key,
        "without-2-3-4.json",
    ]


def test_merged_sets_may_race(llama, blocks):
    evaluator = Evaluator(Decoder(llama), blocks).edited(EDIT)
    sets = [FOLDED, frozenset({0, 2, 3, 4}), frozenset({2, 3, 4, 5})]
    expected = block_losses(Decoder(merge_by_hand(llama, EDIT.merges)), blocks, tuple(sets)).mean(1).argmin()
    assert evaluator.race({0: sets}).winners[0] == sets[expected]


def test_weights_are_whole_again_where_losses_fail(llama, blocks, monkeypatch):
    def fail(*_args, **_kwargs):
        raise KeyboardInterrupt

    weights = {name: tensor.clone() for name, tensor in llama.state_dict().items()}
    evaluator = Evaluator(Decoder(llama), blocks).edited(EDIT)
    monkeypatch.setattr(race_module, "block_losses", fail)
    with pytest.raises(KeyboardInterrupt):
        evaluator.losses([FOLDED])
    assert all(torch.equal(tensor, weights[name]) for name, tensor in llama.state_dict().items())


# ---- races


@pytest.mark.parametrize("exact", [True, False])
def test_races_find_each_groups_winner(made_up, exact):
    table = realistic(np.random.default_rng(3))
    groups = {"all": NAMES, 2: NAMES[:7], "overlapping": NAMES[5:], ("one", 1): NAMES[8:9]}
    evaluator, cells = made_up(table)
    found = evaluator.race(groups, exact=exact)
    assert found.winners == {name: best_of(table, sets) for name, sets in groups.items()}
    assert len(cells) == len(set(cells))  # a set in several groups is evaluated for all of them
    assert (len(cells) == 12 * 32) == exact
    n_computed = len(cells)
    winners = list(found.winners.values())
    np.testing.assert_array_equal(evaluator.losses(winners), [table[removed] for removed in winners])
    assert len(cells) == n_computed  # the winners' losses were complete


def test_a_race_of_a_model_is_the_argmin_of_full_means(llama):
    blocks = torch.randint(3, VOCAB_SIZE, (16, 12), generator=torch.Generator().manual_seed(2))
    pairs = [frozenset(pair) for pair in combinations(range(N_LAYERS), 2)]
    groups = {1: [frozenset({i}) for i in range(N_LAYERS)], 2: pairs}
    decoder = Decoder(llama)
    for exact in (True, False):
        found = Evaluator(decoder, blocks, batch_size=8).race(groups, exact=exact).winners
        for name, sets in groups.items():
            assert (
                found[name] == sets[block_losses(decoder, blocks, tuple(sets), batch_size=8).mean(1).argmin()]
            )


def test_iterators_and_repeated_sets_may_race(made_up):
    table = realistic(np.random.default_rng(4))
    evaluator, _ = made_up(table)
    found = evaluator.race({0: iter([*NAMES, *NAMES])}).winners
    assert found == {0: best_of(table)}


def test_a_set_alone_wins_and_is_evaluated_in_full(made_up):
    table = realistic(np.random.default_rng(5))
    evaluator, cells = made_up(table)
    found = evaluator.race({"alone": NAMES[3:4]})
    assert found.winners == {"alone": NAMES[3]} and found.log.empty
    assert sorted(cells) == [(NAMES[3], block) for block in range(32)]


def test_what_is_left_of_all_groups_is_finished_in_one_pass(llama, blocks, computed):
    Evaluator(Decoder(llama), blocks).race({n: [removed] for n, removed in enumerate(SETS)})
    assert computed == [(set(SETS), 5)]


@pytest.mark.parametrize("seed", range(5))
def test_the_log_tells_the_race(made_up, seed):
    table = realistic(np.random.default_rng(seed))
    evaluator, cells = made_up(table)
    found = evaluator.race({"all": NAMES, "half": NAMES[:6]}, seed=seed)
    for name, log in found.log.groupby("group"):
        running = {tuple(removed) for removed in map(sorted, NAMES[:6] if name == "half" else NAMES)}
        for _, row in log.groupby("n_blocks", sort=True):
            assert {tuple(removed) for removed in row["removed"]} == running  # those dropped do not come back
            assert row.loc[row["loss"].idxmin(), "kept"]  # the leader stays
            running = {tuple(removed) for removed in row.loc[row["kept"], "removed"]}
        assert tuple(sorted(found.winners[name])) in running
        assert list(log["n_blocks"].unique()) == [4, 8, 16, 32][: log["n_blocks"].nunique()]
    slices = found.log.groupby(found.log["removed"].map(frozenset))["n_blocks"].max()
    n_evaluated = {removed: sum(cell == removed for cell, _ in cells) for removed in NAMES}
    for removed, n_blocks in slices.items():  # as many as the log says, and the winners in full
        assert n_evaluated[removed] == (32 if removed in found.winners.values() else n_blocks)


def test_the_loss_in_the_log_is_the_mean_so_far(made_up):
    table = realistic(np.random.default_rng(6))
    log = made_up(table)[0].race({"all": NAMES}, exact=True).log
    assert list(log["n_blocks"].unique()) == [32] and log["kept"].sum() == 1
    np.testing.assert_allclose(log["loss"], [table[removed].mean() for removed in NAMES])


def test_sets_without_a_difference_stay_and_the_first_wins(made_up):
    same = np.random.default_rng(7).normal(3, 1, 32)
    evaluator, _ = made_up({NAMES[0]: same + 1, NAMES[1]: same, NAMES[2]: same.copy()})
    found = evaluator.race({"tied": NAMES[:3]})
    assert found.winners == {"tied": NAMES[1]}
    assert found.log.groupby(found.log["removed"].map(tuple))["kept"].all().to_dict() == {
        (0,): False,
        (1,): True,
        (2,): True,
    }


@pytest.mark.parametrize("n_blocks", [1, 2, 3, 4, 5])
def test_few_blocks(made_up, n_blocks):
    table = realistic(np.random.default_rng(8), n_blocks=n_blocks)
    assert made_up(table)[0].race({0: NAMES}, confidence=0.999).winners == {0: best_of(table)}


def test_a_race_gives_the_same_again(made_up):
    table = realistic(np.random.default_rng(9))
    one, other = (made_up(table)[0].race({0: NAMES}, seed=4).log for _ in range(2))
    assert one.equals(other)


@pytest.mark.parametrize("confidence", [0, 1, -0.5, 99])
def test_confidence_outside_0_and_1_is_refused(made_up, confidence):
    evaluator, cells = made_up(realistic(np.random.default_rng(0)))
    with pytest.raises(
        SimDiffError, match=rf"confidence must lie between 0 and 1, got {confidence}; exact=True"
    ):
        evaluator.race({0: NAMES}, confidence=confidence)
    assert not cells


def replay(made_up, confidence, heavy, n_replays=200):
    """Share of races that find the winner over all blocks, and of the losses that they compute for it.

    Of 1,000 races at 0.9, 99.0 % find it (heavy tails: 99.7 %); at 0.99, 99.9 % (100 %): Bonferroni is
    cautious.
    """
    right, share = 0, []
    for seed in range(n_replays):
        rng = np.random.default_rng([seed, 11])
        noise = 0.1 / np.sqrt(3) * rng.standard_t(3, (12, 32)) if heavy else None  # sd 0.1 too
        table = realistic(rng, noise=noise)
        evaluator, cells = made_up(table)
        right += evaluator.race({0: NAMES}, confidence=confidence, seed=seed).winners[0] == best_of(table)
        share.append(len(cells) / (12 * 32))
    return right / n_replays, np.mean(share)


@pytest.mark.parametrize("heavy", [False, True])
@pytest.mark.parametrize("confidence", [0.9, 0.99])
def test_races_keep_their_promise_and_save_work(made_up, confidence, heavy):
    right, share = replay(made_up, confidence, heavy)
    assert right >= confidence
    assert share < 0.7


def test_a_group_without_candidates_is_refused(made_up):
    evaluator, cells = made_up({NAMES[0]: np.zeros(8)})
    with pytest.raises(SimDiffError, match="no candidate set in group 'b'"):
        evaluator.race({"a": [NAMES[0]], "b": []})
    assert not cells
