"""What the hub and PEFT make of what we write: cards, `pruning.json` by its schema, adapters by a hub id."""

import json
import os
import shutil
import subprocess
import sys

import jsonschema
import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

from simdiff_utils.files import read_json, repository_root
from simdiff_utils.pruning.stage import pruned_checkpoint
from simdiff_utils.recovery import stage
from simdiff_utils.run import Run
from simdiff_utils.settings import Settings

SMALL = dict(
    seq_len=16, n_samples=8, n_validation=4, n_test=4, max_steps=4, max_length=16, learning_rate=1e-2
)

# A user who has the pruned model in a folder and the adapter on the hub.
CHILD = """
import sys, torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM
pruned, target = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(pruned), "someone/adapter")
torch.save(model.merge_and_unload()(input_ids=torch.arange(3, 19)[None]).logits, target)
try:
    AutoPeftModelForCausalLM.from_pretrained("someone/adapter")
except Exception as error:
    print("refused:", error)
"""


@pytest.fixture(scope="module")
def made(tiny_model, tiny_text, tmp_path_factory):
    """A run on a tiny model whose card states terms, and one on its healed and cut checkpoint."""
    folder = tmp_path_factory.mktemp("hub")
    dense = folder / "dense"
    shutil.copytree(tiny_model, dense)
    (dense / "README.md").write_text("---\nlicense: mit\nlanguage: en\n---\n")
    os.environ["SIMDIFF_RUNS"] = str(folder / "runs")
    run = Run(
        Settings(
            model=str(dense), text=str(tiny_text), n_remove=2, criterion="masd", repair="linear", **SMALL
        )
    )
    healed = stage.healed_checkpoint(run)
    again = run.settings.replace(model=str(healed), n_remove=1)
    yield run, Run(again)
    del os.environ["SIMDIFF_RUNS"]


def test_every_card_is_read_by_the_hubs_library_and_shows_its_own_perplexity(made):
    run, again = made
    repaired = run.replace(training="none")
    shown = {
        pruned_checkpoint(run): ["dense", "pruned"],
        stage.healed_checkpoint(repaired): ["dense", "pruned", "linear"],
        stage.healed_checkpoint(run): ["dense", "pruned", "linear + lora"],
        pruned_checkpoint(again): ["dense", "pruned"],
    }
    for folder, rows in shown.items():
        card = ModelCard.load(folder / "README.md")
        assert (card.data.license, card.data.language) == ("mit", "en")
        assert card.data.library_name == "transformers"
        for row in rows:
            assert f"| perplexity, {row} (60 test tokens in windows of 16, float32) | " in card.content
        assert str(run.folder) not in card.content
    table = stage.compare_rungs(run, [("linear", "none"), ("linear", "lora")]).set_index("rung")["perplexity"]
    for name in ("linear", "linear + lora"):
        (row,) = [line for line in card_of(run, name).splitlines() if f"perplexity, {name} (" in line]
        assert float(row.split("|")[2]) == pytest.approx(table[name], abs=0.006)


def card_of(run, name):
    training = "lora" if "lora" in name else "none"
    return (stage.healed_checkpoint(run.replace(training=training)) / "README.md").read_text()


def test_pruning_json_is_what_its_schema_says(made):
    schema = read_json(repository_root() / "docs" / "pruning.schema.json")
    jsonschema.Draft202012Validator.check_schema(schema)
    run, again = made
    cut, healed, cut_again = (
        read_json(folder / "pruning.json")
        for folder in (pruned_checkpoint(run), stage.healed_checkpoint(run), pruned_checkpoint(again))
    )
    for facts in (cut, healed, cut_again):
        jsonschema.validate(facts, schema)
    assert "recovery" in healed and cut_again["earlier"][0]["recovery"] == healed["recovery"]
    for wrong in ({"removed": [-1]}, {"alpha": 2}, {"more": 1}, {"calibration_sha256": "0"}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(cut | wrong, schema)


def test_peft_opens_an_adapter_of_the_hub_on_the_pruned_model_and_on_no_other(made, tmp_path):
    run, _ = made
    adapter = stage.train(run) / "adapter"
    config = read_json(adapter / "adapter_config.json")
    assert config["base_model_name_or_path"].endswith("without 2 of 6 layers")
    card = ModelCard.load(adapter / "README.md")
    data = card.data.to_dict()
    assert (data["library_name"], data["license"], data["base_model_relation"]) == ("peft", "mit", "adapter")
    for file in (adapter / "README.md", adapter / "adapter_config.json"):
        assert str(run.folder) not in file.read_text()
    hub = tmp_path / "hub" / "models--someone--adapter"  # as it lies after a download
    shutil.copytree(adapter, hub / "snapshots" / "0")
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text("0")
    start = stage.repaired_checkpoint(run)
    child = [sys.executable, "-c", CHILD, start, tmp_path / "logits"]
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(child, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "refused:" in done.stdout  # its base cannot be had by a name, so that nothing wrong is loaded
    healed = AutoModelForCausalLM.from_pretrained(stage.healed_checkpoint(run))
    with torch.inference_mode():
        expected = healed(input_ids=torch.arange(3, 19)[None]).logits
    torch.testing.assert_close(torch.load(tmp_path / "logits", weights_only=True), expected)
    before = AutoModelForCausalLM.from_pretrained(start)(input_ids=torch.arange(3, 19)[None]).logits
    assert (before - expected).abs().max() > 1e-3
    assert json.dumps(config["target_modules"]).count("proj") > 0
