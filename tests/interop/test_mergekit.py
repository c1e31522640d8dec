"""mergekit makes of our mergekit.yaml the tensors of our export, in the families that the file promises."""

import os
import subprocess

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from simdiff_utils.pruning.export import export_pruned
from tests.families import OTHERS
from tests.helpers import FAMILIES
from tests.pruning.test_export import FACTS

pytestmark = pytest.mark.interop
PROMISED = {name: OTHERS[name] | {"model_type": name} for name in ("gemma", "phi", "glm4")} | {
    name: FAMILIES[name] for name in "llama mistral gpt2 phi3 olmo2 granite stablelm starcoder2".split()
}


@pytest.mark.parametrize("name", PROMISED)
def test_the_tensors_are_those_of_the_export(name, environment, tokenizer, tmp_path):
    mergekit = environment("mergekit", "mergekit==0.1.5", "torch==2.13.0") / "mergekit-yaml"
    dense, ours, theirs = (tmp_path / part for part in ("dense", "ours", "theirs"))
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**PROMISED[name])).save_pretrained(dense)
    tokenizer.save_pretrained(dense)
    export_pruned(dense, frozenset({1, 4}), ours, FACTS | {"source": str(dense)})
    done = subprocess.run(
        [mergekit, ours / "mergekit.yaml", theirs, "--allow-crimes"],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    expected, found = (
        {key: tensor for file in folder.glob("*.safetensors") for key, tensor in load_file(file).items()}
        for folder in (ours, theirs)
    )
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    assert AutoConfig.from_pretrained(theirs).num_hidden_layers == 4
