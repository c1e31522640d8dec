"""Which sets are exported, and what `pruning.json` says of them."""

import json

import pytest

from simdiff_utils import SimDiffError
from simdiff_utils.criterion import stage
from simdiff_utils.pruning.stage import pruned_checkpoint

GRID = [1, 2, 4]
NAMES = ["cosine", "masd", "relative", "portfolio"]


def test_laco_is_not_exported(make_run):
    run = make_run(criterion="laco")
    for refused in (stage.removed, pruned_checkpoint):
        with pytest.raises(SimDiffError) as error:
            refused(run)
        assert str(error.value) == (
            "laco changes the weights of layers that stay, and only unchanged ones are "
            "exported; notebook 06 measures it: choose another criterion."
        )
    assert not list(run.folder.glob("prune-*"))


@pytest.mark.parametrize("criterion", ["sleb", "random"])
def test_a_peers_set_is_exported_without_scores_of_layers(make_run, criterion):
    run = make_run(criterion=criterion)
    row = stage.choices(run, [2], [criterion]).iloc[0]
    facts = json.loads((pruned_checkpoint(run) / "pruning.json").read_text())
    assert facts["removed"] == row["removed"] and facts["criterion"] == criterion
    assert facts["scores"] == [] and facts["alpha"] is None


def test_a_cut_that_is_asked_to_keep_the_pattern_is_one_that_llama_cpp_can_make(
    make_run, make_tiny, tokenizer, tmp_path
):
    """Two layers with sliding attention, one with full, and again."""
    make_tiny("gemma3").save_pretrained(tmp_path / "gemma")
    tokenizer.save_pretrained(tmp_path / "gemma")
    said = {}
    for keep_pattern in (False, True):
        for k in (1, 2, 3):
            run = make_run(
                model=str(tmp_path / "gemma"), keep_pattern=keep_pattern, n_remove=k, criterion="portfolio"
            )
            folder = pruned_checkpoint(run)
            facts = json.loads((folder / "pruning.json").read_text())
            line = "--prune-layers" in (folder / "llama_quantize.txt").read_text()
            assert line == facts["keeps_pattern"]
            kept = [i % 3 == 2 for i in range(6) if i not in facts["removed"]]
            assert facts["keeps_pattern"] == (kept == [i % 3 == 2 for i in range(6 - k)])
            said[keep_pattern, k] = facts["keeps_pattern"]
    assert [said[True, k] for k in (1, 2, 3)] == [True] * 3
