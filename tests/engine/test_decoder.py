"""The engine against the model's own forward and against models built by hand; streamed against in memory."""

import json
import shutil
from unittest.mock import Mock

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from simdiff_utils import SimDiffError
from simdiff_utils.engine import budget as memory
from simdiff_utils.engine.decoder import Decoder, open_decoder, stream_decoder
from simdiff_utils.engine.load import decoder_layers
from tests.helpers import FAMILIES, N_LAYERS, SETS, TINY, build_by_hand, logits_of


def run(decoder, blocks, sets=(frozenset(),), batch_size=2, **more):
    """{set: its logits on all blocks}."""
    found = {removed: [] for removed in sets}
    for removed, _, states in decoder.run(blocks, batch_size, tuple(sets), **more):
        found[removed].append(decoder.logits(states))
    return {removed: torch.cat(logits) for removed, logits in found.items()}


@pytest.fixture(scope="module")
def saved(make_tiny, tmp_path_factory):
    """Function: family -> its checkpoint folder."""
    root = tmp_path_factory.mktemp("checkpoints")

    def save(name):
        if not (root / name).exists():
            make_tiny(name).save_pretrained(root / name)
        return root / name

    return save


def test_the_engine_is_the_models_own_forward(tiny, blocks):
    found = run(Decoder(tiny), blocks)[frozenset()]
    expected = torch.cat([logits_of(tiny, batch) for batch in blocks.split(2)])
    assert torch.equal(found, expected)


def test_any_set_of_layers_is_the_model_built_by_hand(tiny, blocks):
    found = run(Decoder(tiny), blocks, SETS)
    for removed in SETS:
        expected = torch.cat([logits_of(build_by_hand(tiny, removed), batch) for batch in blocks.split(2)])
        torch.testing.assert_close(found[removed], expected, rtol=1e-5, atol=1e-5)
        assert (found[removed] - logits_of(tiny, blocks)).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["llama", "falcon", "gpt2"])
def test_the_model_is_left_as_it_was(make_tiny, blocks, name):
    tiny = make_tiny(name)
    before, layers = logits_of(tiny, blocks), [id(layer) for layer in decoder_layers(tiny)]
    decoder = Decoder(tiny)
    run(decoder, blocks, SETS)

    def interrupted(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(decoder, blocks, observe=interrupted)
    assert [id(layer) for layer in decoder_layers(tiny)] == layers
    assert torch.equal(logits_of(tiny, blocks), before)
    assert {name for name, _ in tiny.named_modules() if "stub" in name} == set()


def test_logits_have_a_gradient_unless_the_caller_wants_none(llama):
    decoder, states = Decoder(llama), torch.randn(1, 3, 32)
    assert decoder.logits(states).requires_grad
    with torch.no_grad():
        assert not decoder.logits(states).requires_grad
    with torch.inference_mode():
        assert decoder.logits(states).is_inference()


def test_observers_see_every_layer_run_in_order(llama, blocks):
    seen = []
    run(
        Decoder(llama), blocks, batch_size=5, observe=lambda i, before, after: seen.append((i, before, after))
    )
    assert [i for i, *_ in seen] == list(range(N_LAYERS))
    assert all(torch.equal(seen[i][2], seen[i + 1][1]) for i in range(N_LAYERS - 1))
    assert torch.equal(seen[0][1], llama.model.embed_tokens(blocks))


@pytest.mark.parametrize("batch_size", [1, 3, 5, 99])
def test_batches_of_unequal_size(llama, blocks, batch_size):
    found = run(Decoder(llama), blocks, SETS[:2], batch_size)
    for removed in SETS[:2]:
        expected = logits_of(build_by_hand(llama, removed), blocks)
        torch.testing.assert_close(found[removed], expected, rtol=1e-5, atol=1e-5)


subsets = st.frozensets(st.integers(0, N_LAYERS - 1), max_size=N_LAYERS - 1)


@settings(
    derandomize=True,
    deadline=None,
    max_examples=20,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(sets=st.lists(subsets, min_size=1, max_size=6, unique=True))
def test_what_sets_have_in_common_is_computed_once(make_tiny, sets):
    model, blocks = make_tiny("llama"), torch.arange(10, 22).view(2, 6)
    runs = []
    found = run(Decoder(model), blocks, sets, observe=lambda i, *_: runs.append(i))
    for removed in sets:
        assert torch.equal(found[removed], run(Decoder(model), blocks, [removed])[removed])
    # a path is what a set has left out so far and the layer it goes through next
    paths = {
        (frozenset(j for j in removed if j < i), i)
        for removed in sets
        for i in range(N_LAYERS)
        if i not in removed
    }
    assert len(runs) == len(paths)


# ---- streamed ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_streamed_equals_in_memory_in_every_family(family, saved, blocks, dtype):
    sets = (frozenset(), *SETS)
    in_memory = open_decoder(saved(family), dtype)
    assert not in_memory.streamed
    expected = run(in_memory, blocks, sets)
    streamed = stream_decoder(saved(family), dtype)
    found = run(streamed, blocks, sets)
    assert all(torch.equal(found[removed], expected[removed]) for removed in sets)
    layers = {id(p) for layer in decoder_layers(streamed.model) for p in layer.parameters()}
    assert all(p.is_meta == (id(p) in layers) for p in streamed.model.parameters()), "layers come and go"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_states_on_disk_are_those_in_memory(saved, blocks, dtype):
    sets = (frozenset(), *SETS)
    expected, found = (run(stream_decoder(saved("gemma3"), dtype, room), blocks, sets) for room in (1e9, 0))
    assert all(torch.equal(found[removed], expected[removed]) for removed in sets)


def test_every_layer_is_read_once_a_pass_for_all_blocks_and_sets(saved, blocks, monkeypatch):
    decoder = stream_decoder(saved("llama"), "float32")
    read, original = [], decoder._weights._load
    monkeypatch.setattr(decoder._weights, "_load", lambda names: read.append(names) or original(names))
    run(decoder, blocks, SETS, batch_size=1)
    assert len(read) == N_LAYERS
    read.clear()
    run(decoder, blocks, [frozenset({0, 2, 5})])
    assert len(read) == N_LAYERS - 3, "a layer that no set keeps is not read"


def test_states_on_disk_go_when_the_pass_ends(saved, blocks, monkeypatch, tmp_path):
    monkeypatch.setenv("SIMDIFF_CACHE", str(tmp_path))
    seen = []
    decoder = stream_decoder(saved("llama"), "float32", 0)
    run(decoder, blocks, observe=lambda *_: seen.append(len(list(tmp_path.glob("states-*/*")))))
    assert max(seen) == 3  # batches of 2, 2 and 1 blocks
    assert not list(tmp_path.glob("states-*"))

    def interrupted(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(decoder, blocks, observe=interrupted)
    assert not list(tmp_path.glob("states-*"))
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(SimDiffError, match="GB are free"):
        run(decoder, blocks)


def test_a_checkpoint_without_some_weight_is_refused(make_tiny, tmp_path):
    make_tiny("llama").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for name, words in (
        ("model.norm.weight", "holds no model.norm.weight of LlamaForCausalLM"),
        ("model.layers.2.mlp.up_proj.weight", "mlp.up_proj"),
    ):
        save_file(
            {n: t for n, t in tensors.items() if n != name}, tmp_path / "model.safetensors", {"format": "pt"}
        )
        with pytest.raises(SimDiffError, match=words):
            run(stream_decoder(tmp_path, "float32"), torch.ones(1, 4, dtype=torch.long))


# ---- the budget ----------------------------------------------------------------------------------

LAYER_BYTES = 4 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32)


@pytest.fixture
def bare(monkeypatch):
    """As if this process and the libraries took nothing: the budget is about the model alone."""
    monkeypatch.setattr(memory.psutil, "Process", lambda: Mock(memory_info=lambda: Mock(rss=0)))
    monkeypatch.setattr(memory, "_workspace", lambda config, n_tokens: 0)
    monkeypatch.setattr(memory.torch.cuda, "is_available", lambda: False)


def test_the_budget_decides(bare, saved, blocks):
    folder, rest = saved("llama"), 4 * (2 * 97 * 32 + 32)
    whole = rest + N_LAYERS * LAYER_BYTES
    streamed = rest + 2 * LAYER_BYTES

    def plan(n_bytes):
        return memory.plan_states_room(folder, torch.float32, n_bytes / 2**30, 16)

    assert plan(whole) is None
    assert plan(whole - 1) == pytest.approx(whole - 1 - streamed)
    assert plan(streamed * 1.0001) == pytest.approx(streamed * 0.0001)
    with pytest.raises(SimDiffError, match=r"too little .* needs 0\.1 GiB \(memory_gib\)"):
        plan(streamed * 0.999)
    assert open_decoder(folder, "float32", streamed * 1.0001 / 2**30, 16).streamed
    assert not open_decoder(folder, "float32").streamed  # no budget named: there is room


def test_a_container_may_allow_less_than_the_machine_has(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    machine = memory.free_memory()
    limits = {"memory.max": "5000", "memory.current": "2000"}
    monkeypatch.setattr(
        memory.Path, "read_text", lambda path: limits[path.name] if path.name in limits else "max"
    )
    assert memory.free_memory() == 3000 < machine
    limits["memory.max"] = "max"
    assert memory.free_memory() > 3000


def test_quantised_checkpoints_are_not_streamed(saved, tmp_path):
    folder = shutil.copytree(saved("llama"), tmp_path / "quantised")
    config = json.loads((folder / "config.json").read_text())
    config |= {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(SimDiffError, match="quantised"):
        stream_decoder(folder, "float32")


# ---- several devices, as accelerate spreads them -------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "falcon"])
def test_layers_under_accelerates_hooks(name, make_tiny, blocks, tmp_path):
    """Weights that a hook brings to the device of each layer as it is called, as `device_map="auto"`
    arranges."""
    expected = run(Decoder(make_tiny(name)), blocks, SETS)
    for spread in (
        lambda model: cpu_offload(model, execution_device=torch.device("cpu")),
        lambda model: disk_offload(model, str(tmp_path / "off"), execution_device=torch.device("cpu")),
    ):
        model = make_tiny(name)
        spread(model)
        assert next(decoder_layers(model)[0].parameters()).is_meta
        found = run(Decoder(model), blocks, SETS)
        assert all(torch.equal(found[removed], expected[removed]) for removed in SETS)


# ---- refused by structure ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family, changes, words",
    [
        (
            "gemma3n_text",
            dict(
                num_kv_shared_layers=2,
                vocab_size_per_layer_input=97,
                hidden_size_per_layer_input=8,
                layer_types=["sliding_attention", "full_attention"] * 3,
                activation_sparsity_pattern=[0.0] * 6,
            ),
            "keys and values of earlier ones",
        ),
        (
            "gemma4_text",
            dict(
                num_kv_shared_layers=2,
                global_head_dim=8,
                hidden_size_per_layer_input=0,
                layer_types=["sliding_attention", "full_attention"] * 3,
            ),
            "keys and values of earlier ones",
        ),
        (
            "gemma4_text",
            dict(
                num_kv_shared_layers=0,
                global_head_dim=8,
                hidden_size_per_layer_input=8,
                vocab_size_per_layer_input=97,
                layer_types=["sliding_attention", "full_attention"] * 3,
            ),
            "reads more of the text",
        ),
        ("rwkv", dict(attention_hidden_size=32), "hand on more than hidden states"),
        ("xlm-roberta-xl", {}, "in its layer 0 tokens depend on later ones, as in an encoder"),
    ],
)
def test_entangled_layers_are_refused_naming_family_and_cause(family, changes, words, tmp_path):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **TINY | changes)).eval()
    model.save_pretrained(tmp_path)
    with pytest.raises(SimDiffError, match=words) as error:
        open_decoder(tmp_path, "float32")
    assert type(model).__name__ in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(("read", "words"), [(False, None), (True, "is given more of the one before")])
def test_what_layers_return_beside_their_states_is_nobodys(llama, blocks, read, words):
    """A forward that takes a pair apart; read: and gives its second part to the next layer."""
    expected = logits_of(llama, blocks)
    for layer in llama.model.layers:
        alone = layer.forward
        layer.forward = lambda hidden, *args, alone=alone, beside=None, **kwargs: (
            alone(hidden, *args, **kwargs),
            1,
        )

    def forward(input_ids, **kwargs):
        hidden, beside = llama.model.embed_tokens(input_ids), None
        positions = torch.arange(input_ids.shape[1])[None]
        rotary = llama.model.rotary_emb(hidden, positions)
        for layer in llama.model.layers:
            given = {"beside": beside} if read else {}
            hidden, beside = layer(hidden, position_embeddings=rotary, **given)
        return (llama.model.norm(hidden),)

    llama.model.forward = forward
    if words:
        with pytest.raises(SimDiffError, match=words):
            Decoder(llama)
        return
    states = next(Decoder(llama).run(blocks, 5))[2]
    torch.testing.assert_close(llama.lm_head(llama.model.norm(states)), expected)


def test_a_layer_that_does_not_run_is_named(llama):
    llama.model.layers[4].self_attn.o_proj.weight.data = torch.ones(32, 7)
    with pytest.raises(SimDiffError, match="its layer 4 does not run"):
        Decoder(llama)


def test_shared_weights_are_refused(make_tiny):
    model = make_tiny("llama")
    decoder_layers(model)[4].mlp = decoder_layers(model)[1].mlp
    with pytest.raises(
        SimDiffError, match="LlamaForCausalLM cannot be pruned by layers: its layers share weights"
    ):
        Decoder(model)


def test_all_families_are_the_ones_asked_for():
    asked = {
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "gemma2",
        "gemma3",
        "phi3",
        "olmo2",
        "granite",
        "cohere2",
        "smollm3",
        "stablelm",
        "starcoder2",
        "gpt2",
        "gpt-neox",
        "opt",
        "falcon",
        "mixtral",
        "qwen3-moe",
        "gpt-oss",
    }
    assert asked <= set(FAMILIES)
