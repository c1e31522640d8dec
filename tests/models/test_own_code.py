"""Models with code of their own: trusted, they are pruned like any family's."""

import json
import subprocess
import sys

import pytest
import torch

from simdiff_utils import SimDiffError
from simdiff_utils.engine.load import load_tokenizer
from simdiff_utils.files import repository_root
from simdiff_utils.models.checkpoints import copy_companions, resolve_checkpoint
from simdiff_utils.models.own_code import needs_own_code
from simdiff_utils.pruning.stage import pruned_checkpoint, removed_layers
from simdiff_utils.recovery.stage import recovered_checkpoint
from simdiff_utils.run import Run
from simdiff_utils.settings import Settings
from simdiff_utils.speed.memory import measure_peak_memory
from simdiff_utils.speed.timing import Protocol
from tests.helpers import build_by_hand, logits_of
from workflow.plan import plan_runs

CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP


class MineConfig(LlamaConfig):
    model_type = "mine-{name}"


class MineMLP(LlamaMLP):
    def forward(self, x):
        return 0.3 * super().forward(x)


class MineForCausalLM(LlamaForCausalLM):
    config_class = MineConfig

    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp.__class__ = MineMLP
"""
AUTO_MAP = {"AutoConfig": "modeling_mine.MineConfig", "AutoModelForCausalLM": "modeling_mine.MineForCausalLM"}


def write_model(folder, llama, tokenizer, name, **changes):
    """A llama whose MLPs count for less, which only its own code knows."""
    llama.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": f"mine-{name}",
        "architectures": ["MineForCausalLM"],
        "auto_map": AUTO_MAP,
    } | changes
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_mine.py").write_text(CODE.replace("{name}", name))
    return folder


@pytest.fixture
def trusted(tmp_path, llama, tokenizer, tiny_text, monkeypatch, request):
    """Settings of a run on such a model, in a run folder and an environment of the test's own."""
    monkeypatch.setenv("SIMDIFF_TRUSTED_CODE", "")
    monkeypatch.setenv("SIMDIFF_RUNS", str(tmp_path / "runs"))
    folder = write_model(tmp_path / "mine", llama, tokenizer, request.node.name.replace("_", "-"))
    return dict(
        model=str(folder),
        trust_remote_code=True,
        text=str(tiny_text),
        n_samples=4,
        seq_len=16,
        n_validation=2,
        n_test=2,
        n_remove=2,
        n_remove_grid=[2],
        max_steps=2,
        max_length=16,
        prompt="w1 w2",
    )


def test_a_trusted_model_is_pruned_healed_and_opens_in_plain_transformers(trusted, tmp_path, llama, blocks):
    run = Run(Settings(**trusted, training="lora"))
    assert type(run.model).__name__ == "MineForCausalLM"
    exported = pruned_checkpoint(run)
    removed = removed_layers(exported)
    assert len(removed) == 2 and (exported / "modeling_mine.py").exists()
    torch.save(blocks, tmp_path / "blocks.pt")
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM as A; "
        "m = A.from_pretrained(sys.argv[1], trust_remote_code=True).eval(); "
        "torch.save(m(torch.load(sys.argv[2]), use_cache=False).logits.detach(), sys.argv[3]); "
        "print(type(m).__name__)"
    )
    found = {}
    for name, folder in (("exported", exported), ("healed", recovered_checkpoint(run))):
        assert json.loads((folder / "config.json").read_text())["auto_map"] == AUTO_MAP
        said = subprocess.run(
            [sys.executable, "-c", code, folder, tmp_path / "blocks.pt", tmp_path / "logits.pt"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert said.stdout.strip() == "MineForCausalLM", said.stderr
        found[name] = torch.load(tmp_path / "logits.pt")
    expected, without = (logits_of(build_by_hand(model, removed), blocks) for model in (run.model, llama))
    assert torch.allclose(found["exported"], expected, atol=1e-5)
    assert not torch.allclose(found["exported"], without, atol=1e-2), "the code was not run"
    assert not torch.allclose(found["healed"], expected, atol=1e-5)


def test_fresh_processes_trust_what_their_parent_trusts(trusted):
    run = Run(Settings(**trusted))
    memory = measure_peak_memory(
        pruned_checkpoint(run), torch.float32, Protocol(prompt_len=4, n_new_tokens=2, batch_size=1)
    )
    assert memory["peak"] > 0 and memory["kv_cache"] > 0


def test_code_is_part_of_what_a_model_is(trusted, tmp_path):
    before = resolve_checkpoint(trusted["model"], True).sha256
    path = tmp_path / "mine" / "modeling_mine.py"
    path.write_text(path.read_text().replace("0.3", "0.2"))
    assert resolve_checkpoint(trusted["model"], True).sha256 != before


def test_code_of_another_repository_is_refused(tmp_path, llama, tokenizer):
    folder = write_model(
        tmp_path,
        llama,
        tokenizer,
        "elsewhere",
        auto_map=AUTO_MAP | {"AutoConfig": "other/place--code.Config"},
    )
    with pytest.raises(
        SimDiffError, match="names other/place--code.Config, which is code of another repository"
    ):
        resolve_checkpoint(str(folder), True)
    write_model(folder, llama, tokenizer, "partial", auto_map={"AutoConfig": "modeling_mine.MineConfig"})
    with pytest.raises(
        SimDiffError, match="comes with code for AutoConfig, and with none for a causal language model"
    ):
        resolve_checkpoint(str(folder), True)


def test_a_known_family_never_runs_what_lies_beside_it(tmp_path, llama, tokenizer):
    folder = write_model(
        tmp_path, llama, tokenizer, "unused", model_type="llama", architectures=["LlamaForCausalLM"]
    )
    (folder / "modeling_mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert not needs_own_code(folder) and resolve_checkpoint(str(folder), True).folder == folder
    assert not (tmp_path / "ran").exists()


def test_a_grid_trusts_model_by_model():
    notebooks = repository_root() / "notebooks"
    with pytest.raises(
        SimDiffError,
        match=r"turned on model by model, as in trust_remote_code: \{one/a: true, two/b: false\}",
    ):
        plan_runs({"model": ["one/a", "two/b"], "trust_remote_code": True}, notebooks)
    runs = plan_runs(
        {"model": ["one/a", "two/b"], "trust_remote_code": {"one/a": True, "two/b": False}}, notebooks
    )
    assert {run.settings["model"]: run.settings["trust_remote_code"] for run in runs.values()} == {
        "one/a": True,
        "two/b": False,
    }


def test_a_tokenizer_with_code_of_its_own_is_asked_about_like_a_model(tmp_path, llama, tokenizer):
    llama.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    own = {"auto_map": {"AutoTokenizer": [None, "tokenization_x.X"]}, "tokenizer_class": "X"}
    path.write_text(json.dumps(json.loads(path.read_text()) | own))
    code = (
        "from transformers import PreTrainedTokenizerFast\n\n\nclass X(PreTrainedTokenizerFast):\n    pass\n"
    )
    (tmp_path / "tokenization_x.py").write_text(code)
    with pytest.raises(SimDiffError, match="then set trust_remote_code = True"):
        resolve_checkpoint(str(tmp_path))
    with pytest.raises(SimDiffError, match="cannot read the tokenizer"):
        load_tokenizer(tmp_path)
    folder = resolve_checkpoint(str(tmp_path), trust_remote_code=True).folder
    loaded = load_tokenizer(folder, trust_remote_code=True)
    assert type(loaded).__name__ == "X" and loaded("w9")["input_ids"] == [9]
    (tmp_path / "copy").mkdir()
    copy_companions(folder, tmp_path / "copy")
    assert (tmp_path / "copy" / "tokenization_x.py").exists()
