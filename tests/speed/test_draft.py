"""The pruned model as a draft: the dense model's text, every passed token counted."""

import copy

import pytest
import torch

from simdiff_utils.speed.draft import measure_draft
from simdiff_utils.speed.timing import without_layers
from tests.helpers import build_by_hand


@pytest.fixture
def prompts():
    return torch.randint(3, 97, (3, 12), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_the_text_is_the_dense_models_whatever_the_draft(make_tiny, prompts, name):
    dense = make_tiny(name)
    removed = frozenset({3, 4, 5})
    config = copy.deepcopy(dense.generation_config)
    with without_layers(dense, removed) as shallow:
        drafts = {"by hand": build_by_hand(dense, removed), "on its weights": shallow}
        table = measure_draft(dense, drafts, prompts, 16)
    assert table["same_text"].all() and len(table) == 3 * 3
    assert dense.generation_config == config and not dense._forward_pre_hooks
    alone = table[table["draft"] == ""]
    assert (alone[["drafted", "accepted"]] == 0).all(axis=None) and alone["acceptance"].isna().all()
    by_draft = table[table["draft"] != ""].set_index(["prompt", "draft"])
    assert (by_draft["accepted"] <= by_draft["drafted"]).all() and (by_draft["drafted"] > 0).all()
    counts = by_draft[["drafted", "accepted"]].unstack()
    for column in ("drafted", "accepted"):
        assert (counts[column, "by hand"] == counts[column, "on its weights"]).all()


def test_a_draft_that_is_the_dense_model_is_always_right_and_its_tokens_are_counted(llama, prompts):
    table = measure_draft(llama, {"itself": copy.deepcopy(llama)}, prompts, 18, n_drafted=5)
    found = table[table["draft"] == "itself"]
    # five drafted and one of the dense model's own in each of three passes
    assert (
        (found["drafted"] == 15).all()
        and (found["accepted"] == 15).all()
        and (found["acceptance"] == 1).all()
    )
    assert (table["tokens_per_s"] * table["seconds"]).tolist() == pytest.approx([18] * 6)
