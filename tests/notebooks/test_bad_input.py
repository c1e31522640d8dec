"""Bad input to a notebook, without a kernel: each is refused in one sentence before anything is made."""

import pytest

from simdiff_utils import SimDiffError
from simdiff_utils.capture import stage as capture
from simdiff_utils.comparison.tables import stored_rows
from simdiff_utils.criterion import stage as criterion
from simdiff_utils.pruning import stage as pruning
from simdiff_utils.run import Run
from simdiff_utils.settings import Settings


@pytest.mark.parametrize(
    ("given", "ask", "sentence"),
    [
        ({"seq_len": 65}, capture.statistics, "longer than the context of 64 tokens"),
        ({"model": "no/such/thing"}, capture.statistics, "neither a local folder"),
        ({"model": "shape:llama9"}, capture.statistics, "there is no shape 'llama9'"),
        ({"memory_gib": 0.01}, capture.statistics, "too little for tiny: streamed layer by layer it needs"),
        ({"text": "nothing.txt"}, capture.statistics, "there is no text 'nothing.txt'"),
        (
            {"n_remove_grid": [6]},
            lambda run: criterion.choices(run, run.grid),
            "n_remove must lie between 1 and 5",
        ),
        ({"n_remove": 7}, pruning.check_room, "n_remove must lie between 1 and 5"),
        ({"n_remove": 2, "export_to": "."}, pruning.check_room, "exists already"),
        ({"suite": "glue"}, None, "suite must be one of zero_shot, nlu; got 'glue'"),
        ({"criterion": "no_such_module:score", "n_remove": 2}, criterion.chosen, "no_such_module"),
        ({"pruned": "nowhere"}, pruning.pruned_checkpoint, "pruned = nowhere holds no pruning.json"),
        (
            {},
            lambda run: stored_rows(run.checkpoint.label),
            "not tiny: set measure = True to measure it here",
        ),
    ],
)
def test_bad_input_is_one_sentence(given, ask, sentence, tiny_model, tiny_text, tmp_path, monkeypatch):
    monkeypatch.setenv("SIMDIFF_RUNS", str(tmp_path))
    small = {
        "model": str(tiny_model),
        "text": str(tiny_text),
        "n_samples": 4,
        "seq_len": 16,
        "n_validation": 2,
    }
    with pytest.raises(SimDiffError) as refusal:
        ask(Run(Settings(**small | given)))
    said = str(refusal.value)
    assert sentence in said and said.endswith(".") and "\n" not in said
    assert not list(tmp_path.glob("*/prune-*")) and not list(tmp_path.glob("*/*/model"))


def test_a_checkpoint_cut_from_another_model_is_refused(
    tiny_model, tiny_text, make_tiny, tokenizer, tmp_path, monkeypatch
):
    monkeypatch.setenv("SIMDIFF_RUNS", str(tmp_path / "runs"))
    small = {
        "text": str(tiny_text),
        "n_samples": 4,
        "seq_len": 16,
        "n_validation": 2,
        "n_test": 2,
        "n_remove": 2,
    }
    pruned = pruning.pruned_checkpoint(Run(Settings(model=str(tiny_model), **small)))
    same = Run(Settings(model=str(tiny_model), pruned=str(pruned), **small))
    assert pruning.pruned_checkpoint(same) == pruned and len(pruning.removed_layers(pruned)) == 2
    make_tiny("llama", seed=1).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(SimDiffError, match="was cut from tiny, and model names other with other weights"):
        pruning.pruned_checkpoint(Run(Settings(model=str(tmp_path / "other"), pruned=str(pruned), **small)))
