"""transformers 4 reads our exports of its checkpoints as transformers 5 does."""

import json
import subprocess

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from simdiff_utils.pruning.export import export_pruned, export_recovered
from tests.helpers import TINY, logits_of
from tests.pruning.test_export import FACTS

pytestmark = pytest.mark.long
REQUIREMENTS = ("transformers==4.57.6", "huggingface-hub==0.36.0", "tokenizers==0.22.1")
SIZES = TINY | dict(max_position_embeddings=4096, pad_token_id=0)
FAMILIES = {  # keys of version 4, with values that are not the defaults
    "llama": dict(
        rope_theta=5e5,
        rope_scaling=dict(
            rope_type="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=64,
        ),
    ),
    "qwen2": dict(rope_theta=1e6),
    "mistral": dict(rope_theta=1e6, sliding_window=None),
    "gemma3_text": dict(rope_theta=2e6, rope_local_base_freq=5e3, sliding_window=8, sliding_window_pattern=3),
    "smollm3": dict(rope_theta=2e6, no_rope_layer_interval=4),
    "gpt_neox": dict(rotary_emb_base=5000, rotary_pct=0.5),
}
IDS = [[5 + (7 * i * i + 3 * i) % 90 for i in range(40)]]

MAKE = """
import json, sys, torch
from transformers import AutoConfig, AutoModelForCausalLM
root, families = sys.argv[1], json.loads(sys.argv[2])
for name, sizes in families.items():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **sizes))
    for parameter in model.parameters():
        parameter.data = parameter.data + 0.2 * torch.randn_like(parameter)
    model.save_pretrained(f"{root}/{name}")
"""
READ = """
import json, sys, torch, transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
root, names, ids = sys.argv[1], json.loads(sys.argv[2]), torch.tensor(json.loads(sys.argv[3]))
for name in names:
    model, report = AutoModelForCausalLM.from_pretrained(f"{root}/{name}", output_loading_info=True)
    assert not any(report.values()), (name, report)
    with torch.no_grad():
        logits = model.eval()(input_ids=ids, use_cache=False).logits
    save_file({"logits": logits.float().contiguous()}, f"{root}/{name}.logits")
print(transformers.__version__)
"""


@pytest.fixture(scope="module")
def read_by_4(environment, tmp_path_factory):
    """Folder of version-4 checkpoints, cut and healed here, and the logits that version 4 gives."""
    python = environment("transformers-4", *REQUIREMENTS, shares_torch=True) / "python"
    root = tmp_path_factory.mktemp("four")

    def run(*arguments) -> str:
        done = subprocess.run([python, "-c", *map(str, arguments)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    run(MAKE, root, json.dumps({name: SIZES | changes for name, changes in FAMILIES.items()}))
    for name in FAMILIES:
        export_pruned(root / name, frozenset({1, 4}), root / f"{name}-cut", FACTS)
        model = AutoModelForCausalLM.from_pretrained(root / f"{name}-cut").eval()
        for parameter in model.parameters():
            parameter.data *= 1.05
        tokens = torch.tensor(IDS)
        export_recovered(
            model, root / f"{name}-cut", root / f"{name}-healed", {"recovery": "by hand"}, tokens
        )
    names = [f"{name}-{made}" for name in FAMILIES for made in ("cut", "healed")]
    assert run(READ, root, json.dumps(names), json.dumps(IDS)).split()[-1] == "4.57.6"
    return root


@pytest.mark.parametrize("made", ["cut", "healed"])
@pytest.mark.parametrize("name", FAMILIES)
def test_both_versions_give_the_same_logits(name, made, read_by_4):
    folder = read_by_4 / f"{name}-{made}"
    expected = logits_of(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), torch.tensor(IDS)
    )
    found = load_file(f"{folder}.logits")["logits"]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    source, written = (json.loads((path / "config.json").read_text()) for path in (read_by_4 / name, folder))
    assert source.keys() <= written.keys()  # under the names that version 4 gave them
