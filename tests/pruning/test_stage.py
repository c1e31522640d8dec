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
