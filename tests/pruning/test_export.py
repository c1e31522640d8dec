"""Exports, reloaded by plain transformers in a fresh process, against models built by hand; many families and
sets."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from simdiff_utils import SimDiffError
from simdiff_utils.engine import stored as stored_weights
from simdiff_utils.engine import surgery
from simdiff_utils.engine.decoder import Decoder, open_decoder, stream_decoder
from simdiff_utils.engine.load import decoder_layers, load_model
from simdiff_utils.files import read_json, write_whole
from simdiff_utils.models.checkpoints import checkpoint_folder, resolve_checkpoint
from simdiff_utils.pruning import export
from simdiff_utils.pruning.export import export_pruned, export_recovered, refuse_existing, verify_export
from tests.helpers import FAMILIES, N_LAYERS, SETS, build_by_hand, logits_of

FACTS = {
    "model": "tiny",
    "source": "org/tiny",
    "hub_id": "org/tiny",
    "criterion": "masd",
    "alpha": 0.25,
    "calibration": "4 samples of 16 tokens",
    "text": "words",
    "machine": "a machine",
    "scores": [0.1] * 6,
    "measured": {"perplexity, pruned": 12.5},
}
TOLERANCE = 1e-4

# What a user does, without a line of ours: load, run, generate with and without the cache.
CHILD = """
import json, sys, torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
root, jobs = sys.argv[1], json.loads(sys.argv[2])
blocks, found = torch.tensor(json.loads(sys.argv[3])), {}
for job in jobs:
    model, report = AutoModelForCausalLM.from_pretrained(f"{root}/{job}", output_loading_info=True)
    with torch.inference_mode():
        logits = model.eval()(input_ids=blocks, use_cache=False).logits
        ways = [model.generate(blocks[:2], attention_mask=torch.ones_like(blocks[:2]), max_new_tokens=12,
                               eos_token_id=None, do_sample=False, pad_token_id=0, use_cache=cache).tolist()
                for cache in (True, False)]
    save_file({"logits": logits.contiguous()}, f"{root}/{job}.logits")
    found[job] = {"report": {k: sorted(map(str, v)) for k, v in report.items()}, "ways": ways,
                  "n_layers": model.config.get_text_config().num_hidden_layers,
                  "tied": model.get_output_embeddings().weight is model.get_input_embeddings().weight,
                  "words": AutoTokenizer.from_pretrained(f"{root}/{job}")("w5 w7")["input_ids"]}
print(json.dumps(found))
"""


# their matrices are tied, renamed or merged when they are loaded
HEALED = ("llama-tied", "falcon", "mixtral", "gpt-oss")


def heal(model) -> None:
    """Change every layer's weights, as a recovery does."""
    with torch.no_grad():
        for parameter in decoder_layers(model).parameters():
            parameter.mul_(1.1)


def name_of(removed) -> str:
    return "-".join(map(str, sorted(removed)))


@pytest.fixture(scope="module")
def blocks() -> torch.Tensor:
    return torch.randint(3, 97, (3, 20), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def dense(make_tiny, tokenizer, tmp_path_factory) -> Path:
    """Folder with a checkpoint of every family."""
    root = tmp_path_factory.mktemp("dense")
    for name in FAMILIES:
        make_tiny(name).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root


@pytest.fixture(scope="module")
def exported(dense, blocks, tmp_path_factory) -> tuple[Path, dict]:
    """Every family without every set, exported here, and what one fresh process says of each."""
    root = tmp_path_factory.mktemp("pruned")
    for name in FAMILIES:
        for removed in SETS:
            export_pruned(dense / name, removed, root / f"{name}_{name_of(removed)}", FACTS)
    for name in HEALED:
        pruned = root / f"{name}_{name_of(SETS[0])}"
        model = AutoModelForCausalLM.from_pretrained(pruned).eval()
        heal(model)
        export_recovered(model, pruned, root / f"{name}_healed", {"recovery": "by hand"}, blocks[:1])
    jobs = sorted(path.name for path in root.iterdir())
    done = subprocess.run(
        [sys.executable, "-c", CHILD, root, json.dumps(jobs), json.dumps(blocks.tolist())],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return root, json.loads(done.stdout.splitlines()[-1])


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("removed", SETS, ids=name_of)
def test_a_fresh_process_reloads_the_pruned_model(make_tiny, family, removed, exported, blocks):
    root, found = exported
    said, model = found[f"{family}_{name_of(removed)}"], make_tiny(family)
    assert not any(said["report"].values()), said["report"]  # nothing missing, unexpected or of another shape
    assert said["n_layers"] == N_LAYERS - len(removed)
    assert said["ways"][0] == said["ways"][1], "cached and uncached generation differ"
    assert said["tied"] == (model.get_output_embeddings().weight is model.get_input_embeddings().weight)
    logits = load_file(root / f"{family}_{name_of(removed)}.logits")["logits"]
    expected = logits_of(build_by_hand(model, removed), blocks)
    torch.testing.assert_close(logits, expected, rtol=TOLERANCE, atol=TOLERANCE)
    with surgery.layers_removed(model, removed):
        torch.testing.assert_close(logits, logits_of(model, blocks), rtol=TOLERANCE, atol=TOLERANCE)
    for other in {
        removed - {i} | {i + step}
        for i in removed
        for step in (-1, 1)
        if 0 <= i + step < N_LAYERS and i + step not in removed
    }:
        with surgery.layers_removed(model, other):  # a neighbour removed instead would be seen
            assert (logits_of(model, blocks) - logits).abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize("name", HEALED)
def test_a_fresh_process_reloads_the_healed_model(name, exported, blocks):
    root, found = exported
    assert not any(found[f"{name}_healed"]["report"].values()), found[f"{name}_healed"]["report"]
    model = AutoModelForCausalLM.from_pretrained(root / f"{name}_{name_of(SETS[0])}").eval()
    heal(model)
    logits = load_file(root / f"{name}_healed.logits")["logits"]
    torch.testing.assert_close(logits, logits_of(model, blocks), rtol=TOLERANCE, atol=TOLERANCE)


def test_kept_tensors_are_equal_byte_for_byte(family, dense, exported):
    original = stored(dense / family)
    for removed in SETS:
        kept = [i for i in range(N_LAYERS) if i not in removed]
        copies = stored(exported[0] / f"{family}_{name_of(removed)}")
        expected = {}
        for name, tensor in original.items():
            parts = name.split(".")
            at = next((i + 1 for i, part in enumerate(parts) if part in ("layers", "h")), None)
            if at is None:
                expected[name] = tensor
            elif int(parts[at]) in kept:
                expected[".".join([*parts[:at], str(kept.index(int(parts[at]))), *parts[at + 1 :]])] = tensor
        assert copies.keys() == expected.keys()
        assert all(
            torch.equal(copies[name], tensor) and copies[name].dtype == tensor.dtype
            for name, tensor in expected.items()
        )


def test_a_tied_matrix_is_stored_once_even_if_the_original_has_it_twice(
    make_tiny, dense, tokenizer, tmp_path
):
    folder = tmp_path / "twice"
    make_tiny("llama-tied").save_pretrained(folder)
    tensors = stored(folder)
    save_file(
        tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()},
        folder / "model.safetensors",
    )
    export_pruned(folder, frozenset({1}), tmp_path / "pruned", FACTS)
    assert "lm_head.weight" not in stored(tmp_path / "pruned")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    assert reloaded.lm_head.weight is reloaded.model.embed_tokens.weight


def test_a_head_that_only_the_config_ties_is_kept(make_tiny, blocks, tmp_path):
    """The file holds another head: transformers does not tie it, in memory, and so do we, streamed and
    exported."""
    make_tiny("llama-tied").save_pretrained(tmp_path / "dense")
    tensors = stored(tmp_path / "dense")
    head = tensors["model.embed_tokens.weight"].flip(0).contiguous()
    save_file(tensors | {"lm_head.weight": head}, tmp_path / "dense" / "model.safetensors", {"format": "pt"})
    expected = logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval(), blocks)
    decoder = stream_decoder(tmp_path / "dense", "float32")
    assert torch.equal(next(decoder.logits(states) for _, _, states in decoder.run(blocks, 9)), expected)
    export_pruned(tmp_path / "dense", frozenset({1}), tmp_path / "pruned", FACTS)
    assert torch.equal(stored(tmp_path / "pruned")["lm_head.weight"], head)


def test_the_layers_of_another_tower_are_left_alone(dense, tmp_path):
    """As in a vision-language checkpoint, whose vision tower has `layers` too."""
    shutil.copytree(dense / "llama", tmp_path / "dense")
    tower = {f"vision_tower.encoder.layers.{i}.fc.weight": torch.full((2, 2), float(i)) for i in range(9)}
    save_file(stored(dense / "llama") | tower, tmp_path / "dense" / "model.safetensors", {"format": "pt"})
    export_pruned(tmp_path / "dense", frozenset({0, 3}), tmp_path / "pruned", FACTS)
    copies = stored(tmp_path / "pruned")
    assert all(torch.equal(copies[name], tensor) for name, tensor in tower.items())
    assert sum("model.layers" in name for name in copies) == 4 * 9


@pytest.mark.parametrize("prefix", ["", "model."])
def test_files_may_shorten_or_lengthen_the_path_to_the_layers(prefix, dense, make_tiny, tmp_path):
    shutil.copytree(dense / "llama", tmp_path / "dense")
    renamed = {name.replace("model.", prefix, 1): tensor for name, tensor in stored(dense / "llama").items()}
    save_file(renamed, tmp_path / "dense" / "model.safetensors", {"format": "pt"})
    found = stored_weights.StoredWeights(tmp_path / "dense", make_tiny("llama"))
    assert [len(names) for names in found.layers] == [9] * N_LAYERS
    assert (
        found.rename(f"{prefix}layers.4.mlp.up_proj.weight", {4: 2}) == f"{prefix}layers.2.mlp.up_proj.weight"
    )


def test_dtype_survives_and_the_single_file_wins_over_an_old_index(make_tiny, tokenizer, tmp_path):
    make_tiny("llama").bfloat16().save_pretrained(tmp_path / "dense")
    (tmp_path / "dense" / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "gone.safetensors"}}'
    )
    export_pruned(tmp_path / "dense", frozenset({1}), tmp_path / "pruned", FACTS)
    assert read_json(tmp_path / "pruned" / "config.json")["dtype"] == "bfloat16"
    assert yaml.safe_load((tmp_path / "pruned" / "mergekit.yaml").read_text())["dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "pruned").dtype == torch.bfloat16
    decoder = stream_decoder(tmp_path / "dense", "bfloat16")
    tokens = torch.tensor([[5, 6, 7, 8]])
    assert (
        verify_export(decoder, frozenset({1}), stream_decoder(tmp_path / "pruned", "bfloat16"), tokens) == 0
    )


# ---- mutants: each must be seen ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "mixtral"])
def test_an_export_that_is_off_by_one_layer_fails(name, make_tiny, dense, blocks, tmp_path, monkeypatch):
    pick = export._pick_tensors

    def pick_others(stored, kept, left_out):
        return pick(stored, sorted({i for i in range(N_LAYERS) if i == 0 or i - 1 in kept}), left_out)

    monkeypatch.setattr(export, "_pick_tensors", pick_others)
    export_pruned(dense / name, frozenset({2, 3}), tmp_path / "mutant", FACTS)
    with pytest.raises(SimDiffError, match="gives other logits"):
        verify_export(
            Decoder(make_tiny(name)),
            frozenset({2, 3}),
            open_decoder(tmp_path / "mutant", "float32"),
            blocks[:1],
        )
    logits = logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "mutant"), blocks)
    expected = logits_of(build_by_hand(make_tiny(name), {2, 3}), blocks)
    assert (logits - expected).abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_an_export_that_does_not_renumber_fails(name, make_tiny, dense, blocks, tmp_path, monkeypatch):
    monkeypatch.setattr(stored_weights.StoredWeights, "rename", lambda self, name, new_idx: name)
    export_pruned(dense / name, frozenset({2, 3}), tmp_path / "mutant", FACTS)
    monkeypatch.undo()
    with pytest.raises(SimDiffError):
        verify_export(
            Decoder(make_tiny(name)),
            frozenset({2, 3}),
            stream_decoder(tmp_path / "mutant", "float32"),
            blocks[:1],
        )
    _, report = AutoModelForCausalLM.from_pretrained(tmp_path / "mutant", output_loading_info=True)
    assert any(report.values())


# ---- what lies beside the weights ----------------------------------------------------------------


def test_tokenizer_and_generation_config_are_the_same_files(dense, exported):
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (exported[0] / "llama_0" / name).read_bytes() == (dense / "llama" / name).read_bytes()
    assert exported[1]["llama_0"]["words"] == [5, 7]


def test_the_companions_say_what_was_cut(dense, tmp_path):
    (dense / "llama" / "chat_template.jinja").write_text("{{ messages }}")
    export_pruned(dense / "llama", frozenset({1, 4}), tmp_path / "pruned", FACTS)
    pruning = read_json(tmp_path / "pruned" / "pruning.json")
    assert (pruning["removed"], pruning["kept"], pruning["n_layers"]) == ([1, 4], [0, 2, 3, 5], 6)
    assert (pruning["criterion"], pruning["alpha"], pruning["scores"]) == ("masd", 0.25, [0.1] * 6)
    cut = yaml.safe_load((tmp_path / "pruned" / "mergekit.yaml").read_text())
    assert [s["sources"][0]["layer_range"] for s in cut["slices"]] == [[0, 1], [2, 4], [5, 6]]
    assert cut["merge_method"] == "passthrough" and cut["slices"][0]["sources"][0]["model"] == "org/tiny"
    assert "--prune-layers 1,4 " in (tmp_path / "pruned" / "llama_quantize.txt").read_text()
    card = (tmp_path / "pruned" / "README.md").read_text()
    for words in (
        "without 2 of 6 layers",
        "layers 1, 4 taken out",
        "| perplexity, pruned | 12.5 |",
        "org/tiny",
    ):
        assert words in card
    assert yaml.safe_load(card.split("---")[1])["base_model"] == "org/tiny"
    assert (tmp_path / "pruned" / "chat_template.jinja").read_text() == "{{ messages }}"
    assert (tmp_path / "pruned" / "generation_config.json").exists()


def test_terms_are_passed_on_and_the_hub_reads_the_card(dense, tmp_path):
    source, folder = tmp_path / "dense", tmp_path / "pruned"
    shutil.copytree(dense / "llama", source)
    head = "license: other\nlicense_name: mine\nlanguage: [en, de]\ndatasets: [org/text]\nlibrary_name: else"
    (source / "README.md").write_text(f"---\n{head}\n---\nWords.")
    (source / "LICENSE").write_text("All of it.")
    checkpoint = resolve_checkpoint(str(source))
    export_pruned(source, frozenset({1}), folder, FACTS | {"card": checkpoint.card})
    data = ModelCard.load(folder / "README.md").data
    assert (data.license, data.license_name, data.language) == ("other", "mine", ["en", "de"])
    assert (data.datasets, data.base_model, data.library_name) == (["org/text"], "org/tiny", "transformers")
    assert (folder / "LICENSE").read_text() == "All of it."
    (source / "README.md").write_text("---\nlicense: [\n---\n")
    assert resolve_checkpoint(str(source)).card == {}


def test_everybody_may_read_what_is_written(dense, tmp_path):
    export_pruned(dense / "llama", frozenset({1}), tmp_path / "pruned", FACTS)
    model, tokens = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned"), torch.tensor([[5, 6, 7]])
    with write_whole(tmp_path / "healed") as partial:
        export_recovered(model, tmp_path / "pruned", partial, {"recovery": "none"}, tokens)
    (tmp_path / "plain").touch()
    usual = (tmp_path / "plain").stat().st_mode
    files = [file for name in ("pruned", "healed") for file in (tmp_path / name).iterdir()]
    assert {file.stat().st_mode for file in files} == {usual}


@pytest.mark.parametrize(
    ("removed", "kept"), [({0, 1, 2}, True), ({3, 4, 5}, True), ({4}, False), ({2, 5}, False)]
)
def test_llama_cpp_is_given_a_line_only_where_the_pattern_of_layers_repeats(removed, kept, dense, tmp_path):
    """Of two sliding layers and one of full attention, which llama.cpp finds by their places."""
    export_pruned(dense / "gemma3", frozenset(removed), tmp_path / "pruned", FACTS)
    said = (tmp_path / "pruned" / "llama_quantize.txt").read_text()
    card = " ".join((tmp_path / "pruned" / "README.md").read_text().split())
    assert ("--prune-layers" in said) == kept and ("would run another model" in said) == (not kept)
    assert ("llama.cpp would run another model" in card) == (not kept)
    assert read_json(tmp_path / "pruned" / "pruning.json")["keeps_pattern"] == kept


def test_a_config_keeps_the_keys_of_its_source(dense, tmp_path):
    """As transformers 4 wrote it, whose keys transformers 5 reads and renames."""
    shutil.copytree(dense / "llama", tmp_path / "four")
    config = read_json(tmp_path / "four" / "config.json")
    del config["rope_parameters"], config["dtype"]
    config |= {"rope_theta": 5e5, "torch_dtype": "float32", "transformers_version": "4.40.0", "mine": [1, 2]}
    (tmp_path / "four" / "config.json").write_text(json.dumps(config))
    export_pruned(tmp_path / "four", frozenset({1}), tmp_path / "pruned", FACTS)
    assert read_json(tmp_path / "pruned" / "config.json") == config | {"num_hidden_layers": 5}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned").bfloat16()
    tokens = torch.tensor([[5, 6, 7]])
    export_recovered(model, tmp_path / "pruned", tmp_path / "healed", {"recovery": "none"}, tokens)
    healed = read_json(tmp_path / "healed" / "config.json")
    assert healed == config | {"num_hidden_layers": 5, "torch_dtype": "bfloat16"}


def test_a_recovered_model_carries_the_history(dense, make_tiny, tmp_path):
    export_pruned(dense / "llama", frozenset({1}), tmp_path / "pruned", FACTS)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    facts = {"recovery": "LoRA, 2 steps"}
    export_recovered(model, tmp_path / "pruned", tmp_path / "healed", facts, torch.tensor([[5, 6, 7]]))
    assert read_json(tmp_path / "healed" / "pruning.json")["removed"] == [1]
    assert "| recovery | LoRA, 2 steps |" in (tmp_path / "healed" / "README.md").read_text()
    assert not (tmp_path / "healed" / "mergekit.yaml").exists()
    assert AutoTokenizer.from_pretrained(tmp_path / "healed")("w9")["input_ids"] == [9]
    assert len(decoder_layers(AutoModelForCausalLM.from_pretrained(tmp_path / "healed"))) == 5


def test_a_checkpoint_that_is_pruned_again_keeps_the_history(dense, tmp_path):
    """In indices of the first model for whoever cuts that, and in indices of what each cut was made from."""
    first, second, healed, third = (tmp_path / name for name in ("first", "second", "healed", "third"))
    export_pruned(dense / "llama", frozenset({1, 4}), first, FACTS)
    assert resolve_checkpoint(str(first)).label == "tiny without 2 of 6 layers"
    export_pruned(first, frozenset({1}), second, FACTS | {"model": "else", "source": "first", "hub_id": None})
    facts = read_json(second / "pruning.json")
    assert (facts["model"], facts["source"], facts["hub_id"]) == ("tiny", "org/tiny", "org/tiny")
    assert (facts["removed"], facts["n_layers"]) == ([1], 4)
    assert (facts["removed_of_first"], facts["n_layers_of_first"]) == ([1, 2, 4], 6)
    (turn,) = facts["earlier"]
    assert (turn["removed"], turn["n_layers"]) == ([1, 4], 6)
    cut = yaml.safe_load((second / "mergekit.yaml").read_text())
    ranges = [source["layer_range"] for piece in cut["slices"] for source in piece["sources"]]
    assert ranges == [[0, 1], [3, 4], [5, 6]]
    assert "--prune-layers 1,2,4 " in (second / "llama_quantize.txt").read_text()
    card = " ".join((second / "README.md").read_text().split())
    assert "tiny without 3 of 6 layers" in card and "Earlier cut: layers 1, 4 of 6, by masd." in card
    assert "their weights unchanged. " in card

    model = AutoModelForCausalLM.from_pretrained(second)
    export_recovered(model, second, healed, {"recovery": "LoRA, 2 steps"}, torch.tensor([[5, 6, 7]]))
    assert resolve_checkpoint(str(healed)).label == "tiny without 3 of 6 layers, recovered"
    export_pruned(healed, frozenset({0}), third, FACTS | {"source": "healed"})
    facts = read_json(third / "pruning.json")
    assert facts["removed_of_first"] == [0, 1, 2, 4] and "recovery" not in facts
    assert [turn.get("recovery") for turn in facts["earlier"]] == [None, {"recovery": "LoRA, 2 steps"}]
    said = (third / "llama_quantize.txt").read_text()
    assert 'from "healed" (3 layers)' in said and "--prune-layers 0 " in said
    assert "their weights as an earlier recovery left them" in " ".join(
        (third / "README.md").read_text().split()
    )


def test_a_layer_of_multi_token_prediction_is_neither_copied_nor_promised(dense, tmp_path):
    shutil.copytree(dense / "llama", tmp_path / "mtp")
    state = stored(tmp_path / "mtp") | {"model.layers.6.eh_proj.weight": torch.ones(32, 64)}
    save_file(state, tmp_path / "mtp" / "model.safetensors", {"format": "pt"})
    config = read_json(tmp_path / "mtp" / "config.json") | {"num_nextn_predict_layers": 1}
    (tmp_path / "mtp" / "config.json").write_text(json.dumps(config))
    export_pruned(tmp_path / "mtp", frozenset({2}), tmp_path / "pruned", FACTS)
    assert read_json(tmp_path / "pruned" / "config.json")["num_nextn_predict_layers"] == 0
    assert not [name for name in stored(tmp_path / "pruned") if "eh_proj" in name]


def test_what_one_run_wanted_back_is_not_exported(dense, tmp_path):
    shutil.copytree(dense / "llama", tmp_path / "dense")
    (tmp_path / "dense" / "generation_config.json").write_text(
        '{"return_dict_in_generate": true, "top_k": 5}'
    )
    export_pruned(tmp_path / "dense", frozenset({2}), tmp_path / "pruned", FACTS)
    assert read_json(tmp_path / "pruned" / "generation_config.json") == {"top_k": 5}


def test_a_large_export_is_sharded(dense, blocks, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "_SHARD_BYTES", 40_000)
    export_pruned(dense / "llama", frozenset({0}), tmp_path / "pruned", FACTS)
    files = sorted(tmp_path.glob("pruned/*.safetensors"))
    assert len(files) > 2 and max(file.stat().st_size for file in files) < 45_000
    monkeypatch.undo()
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned").eval()
    expected = build_by_hand(AutoModelForCausalLM.from_pretrained(dense / "llama").eval(), {0})
    assert torch.equal(logits_of(reloaded, blocks), logits_of(expected, blocks))
    # a sharded source, pruned again
    export_pruned(tmp_path / "pruned", frozenset({0}), tmp_path / "again", FACTS)
    assert len(list(tmp_path.glob("again/*.safetensors"))) == 1
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    expected = build_by_hand(AutoModelForCausalLM.from_pretrained(dense / "llama").eval(), {0, 1})
    assert torch.equal(logits_of(again, blocks), logits_of(expected, blocks))


# ---- whole or not at all -------------------------------------------------------------------------


def test_an_interrupted_export_leaves_nothing(dense, tmp_path, monkeypatch):
    def interrupted(shard, file):
        file.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "_copy_tensors", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_pruned(dense / "llama", frozenset({1}), tmp_path / "pruned", FACTS)
    assert not list(tmp_path.iterdir())


def test_an_existing_target_is_refused_unless_it_may_go(dense, tmp_path):
    target = tmp_path / "mine"
    target.mkdir()
    (target / "thesis.txt").write_text("years of work")
    with pytest.raises(SimDiffError, match="mine exists already"):
        export_pruned(dense / "llama", frozenset({1}), target, FACTS)
    assert (target / "thesis.txt").read_text() == "years of work"
    refuse_existing(target, overwrite=True)
    refuse_existing(tmp_path / "new", overwrite=False)


def test_a_disk_too_small_is_refused_before_anything_is_written(dense, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(SimDiffError, match=r"takes 0\.\d GB and 0\.0 GB are free"):
        export_pruned(dense / "llama", frozenset({1}), tmp_path / "pruned", FACTS)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("removed", [{6}, {-1}, set(range(6))])
def test_sets_that_cannot_be_removed_are_refused(dense, tmp_path, removed):
    with pytest.raises(SimDiffError, match="layers 0 to 5"):
        export_pruned(dense / "llama", frozenset(removed), tmp_path / "pruned", FACTS)
    assert not list(tmp_path.iterdir())


def test_a_damaged_file_is_refused(dense, tmp_path):
    for content, words in (
        (b"another kind of file", "is no safetensors file"),
        ((dense / "llama" / "model.safetensors").read_bytes()[:-7], "is cut short"),
    ):
        folder = tmp_path / words.replace(" ", "-")
        folder.mkdir()
        (folder / "config.json").write_bytes((dense / "llama" / "config.json").read_bytes())
        (folder / "model.safetensors").write_bytes(content)
        with pytest.raises(SimDiffError, match=words):
            export_pruned(folder, frozenset({1}), tmp_path / "pruned", FACTS)
    assert not (tmp_path / "pruned").exists()


def test_verification_refuses_another_checkpoint_and_what_is_not_finite(make_tiny, dense, blocks, tmp_path):
    export_pruned(dense / "llama", frozenset({1}), tmp_path / "pruned", FACTS)
    decoder = Decoder(make_tiny("llama"))
    for reloaded in (
        open_decoder(tmp_path / "pruned", "float32"),
        stream_decoder(tmp_path / "pruned", "float32"),
    ):
        assert verify_export(decoder, frozenset({1}), reloaded, blocks[:1]) <= 1e-5
        with pytest.raises(SimDiffError, match="gives other logits"):
            verify_export(decoder, frozenset({2}), reloaded, blocks[:1])
    reloaded = open_decoder(tmp_path / "pruned", "float32")
    with torch.no_grad():
        reloaded.model.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(SimDiffError):
        verify_export(decoder, frozenset({1}), reloaded, blocks[:1])


# ---- the real models -----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, removed", [("smollm2-135m-instruct", {3, 10, 11, 28}), ("gemma-3-270m", {2, 8, 9})]
)
def test_the_embedded_models_are_pruned_rightly(name, removed, tmp_path):
    folder = checkpoint_folder(f"embedded:{name}")
    export_pruned(folder, frozenset(removed), tmp_path / "pruned", FACTS)
    decoder = Decoder(load_model(folder, "float32"))
    tokens = torch.tensor([[2, 818, 5279, 529, 7001, 563]])
    reloaded = open_decoder(tmp_path / "pruned", "float32")
    assert verify_export(decoder, frozenset(removed), reloaded, tokens) < 1e-3
    model = reloaded.model
    assert model.lm_head.weight is model.get_input_embeddings().weight
    ways = [
        model.generate(
            tokens.to(model.device), max_new_tokens=12, do_sample=False, use_cache=use_cache
        ).tolist()
        for use_cache in (True, False)
    ]
    assert ways[0] == ways[1]
