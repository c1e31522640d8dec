"""Repair without training, against float64 oracles that know each family's modules by name and use no
engine."""

import copy
import functools

import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn.functional import layer_norm
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from simdiff_utils import SimDiffError
from simdiff_utils.engine.decoder import Decoder, stream_decoder
from simdiff_utils.engine.load import decoder_layers
from simdiff_utils.recovery.linear import STRENGTHS
from simdiff_utils.recovery.repair import REPAIRS, find_cuts, repair
from simdiff_utils.recovery.writers import Writer, find_writers
from tests.helpers import VOCAB_SIZE, build_by_hand, logits_of

# What writes to the residual stream, last to first, as the families' own code has it.
LLAMA = ["mlp.down_proj", "self_attn.o_proj"]
GEMMA = ["post_feedforward_layernorm", "post_attention_layernorm"]
EXPERTS = ["mlp.experts", "self_attn.o_proj"]
WRITERS = {
    "llama": LLAMA,
    "llama-tied": LLAMA,
    "qwen2": LLAMA,
    "mistral": LLAMA,
    "phi3": LLAMA,
    "qwen3": LLAMA,
    "granite": LLAMA,
    "cohere2": LLAMA,
    "smollm3": LLAMA,
    "stablelm": LLAMA,
    "gemma2": GEMMA,
    "gemma3": GEMMA,
    "olmo2": GEMMA,
    "gpt2": ["mlp.c_proj", "attn.c_proj"],
    "starcoder2": ["mlp.c_proj", "self_attn.o_proj"],
    "gpt-neo": ["mlp.c_proj", "attn.attention.out_proj"],
    "gpt-neox": ["mlp.dense_4h_to_h", "attention.dense"],
    "falcon": ["mlp.dense_4h_to_h", "self_attention.dense"],
    "opt": ["fc2", "self_attn.out_proj"],
    "mixtral": EXPERTS,
    "qwen3-moe": EXPERTS,
    "gpt-oss": EXPERTS,
}
SOME = ["llama", "llama-tied", "qwen2", "gemma3", "olmo2", "gpt2", "gpt-neox", "falcon", "granite", "opt"]
CUTS = [{3}, {2, 4}, {1, 2, 5}]  # the last: a run, and a layer whose state the final norm has not seen


@pytest.fixture
def text() -> torch.Tensor:
    """More tokens than any family's widest features: [24, 20]."""
    return torch.randint(3, VOCAB_SIZE, (24, 20), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def states_of(model, blocks, name=None):
    """What every layer leaves, float64 [tokens, d] each; with a name, what this module of each layer
    reads."""
    caught = []
    modules = [layer.get_submodule(name or "") for layer in decoder_layers(model)]
    hooks = [
        module.register_forward_hook(lambda _module, args, output: caught.append(args[0] if name else output))
        for module in modules
    ]
    model(input_ids=blocks, use_cache=False)
    for hook in hooks:
        hook.remove()
    return [(found[0] if isinstance(found, tuple) else found).double().flatten(0, -2) for found in caught]


def error_of(model, place, target, blocks):
    """Mean over tokens of |t - h|^2 / |t|^2 after a layer."""
    distance = target - states_of(model, blocks)[place]
    return (distance.square().sum(-1) / target.square().sum(-1)).mean().item()


def weights_of(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def changed_of(model, before):
    return {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}


def without(make_tiny, name, removed, **changes):
    """The dense model, and another without some layers."""
    dense = make_tiny(name, **changes)
    return dense, build_by_hand(dense, removed)


# ---- the linear form -----------------------------------------------------------------------------


def ridge_by_hand(x, error, strength):
    """D [f, d] of least |e - x D|^2 + strength * mean square of a feature * |D|^2, by orthogonal least
    squares."""
    ridge = strength * x.square().sum(0).mean()
    rows = torch.cat([x, ridge.sqrt() * torch.eye(x.shape[1], dtype=x.dtype)])
    return torch.linalg.lstsq(rows, torch.cat([error, torch.zeros(x.shape[1], error.shape[1])])).solution


@pytest.mark.parametrize("removed", CUTS, ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_weights_are_the_oracles_front_to_back_with_dense_targets(make_tiny, text, name, removed):
    dense, pruned = without(make_tiny, name, removed)
    expected = copy.deepcopy(pruned)
    # batches of 5 straddle the held-out part
    table = repair(Decoder(dense), pruned, frozenset(removed), text, 5, "linear")
    kept = [i for i in range(6) if i not in removed]
    assert list(zip(table["first"], table["last"], strict=True)) == find_cuts(frozenset(removed))
    targets, n_fit = states_of(dense, text), 18 * 20
    for row in table.itertuples():
        place = kept.index(row.first - 1)
        t, h = targets[row.last], states_of(expected, text)[place]
        x = states_of(expected, text, WRITERS[name][0])[place]
        x = torch.cat([x, torch.ones_like(x[:, :1])], 1) if name == "gpt2" else x  # its bias is fitted, too
        size = t.norm(dim=1, keepdim=True)
        x, e = x / size, (t - h) / size
        held_out = [
            (e[n_fit:] - x[n_fit:] @ ridge_by_hand(x[:n_fit], e[:n_fit], s)).square().sum() for s in STRENGTHS
        ]
        assert row.strength == STRENGTHS[torch.stack(held_out).argmin()]
        change = ridge_by_hand(x, e, row.strength)
        writer = decoder_layers(expected)[place].get_submodule(WRITERS[name][0])
        with torch.no_grad():
            if name == "gpt2":
                writer.weight += change[:-1]
                writer.bias += change[-1]
            else:
                writer.weight += change.T
        assert (row.layer_idx, row.target, row.note) == (row.first - 1, WRITERS[name][0], "")
        assert row.error_before == pytest.approx(e.square().sum(1).mean().item(), rel=1e-4)
        assert row.error_after == pytest.approx((e - x @ change).square().sum(1).mean().item(), rel=1e-4)
    for (key, found), wanted in zip(pruned.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4, msg=key)


@pytest.mark.parametrize("name", SOME)
def test_what_the_form_can_express_is_healed_exactly(make_tiny, text, name):
    dense, _ = without(make_tiny, name, {3})
    with torch.no_grad():
        for module in (decoder_layers(dense)[3].get_submodule(path) for path in WRITERS[name]):
            for parameter in module.parameters():  # the layer is the identity; Gemma's norms: 1 + w
                parameter.fill_(-1.0 if name == "gemma3" else 0.0)
    pruned = build_by_hand(dense, {3})
    assert torch.allclose(logits_of(pruned, text), logits_of(dense, text), atol=1e-4)
    with torch.no_grad():
        for parameter in decoder_layers(pruned)[2].get_submodule(WRITERS[name][0]).parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    before, weights = (logits_of(pruned, text) - logits_of(dense, text)).abs().max(), weights_of(dense)
    row = repair(Decoder(dense), pruned, frozenset({3}), text, 4, "linear").iloc[0]
    assert row["error_after"] < 1e-6 < row["error_before"]
    assert (logits_of(pruned, text) - logits_of(dense, text)).abs().max() < before / 100
    if name != "opt":  # of whose ReLU features some are never on
        for key, parameter in decoder_layers(pruned)[2].named_parameters():
            torch.testing.assert_close(
                parameter, decoder_layers(dense)[2].get_parameter(key), rtol=0.01, atol=0.01
            )
    assert not changed_of(dense, weights), "the dense model is only run"


def test_a_norm_that_writes_last_gets_a_scale_per_channel(make_tiny, text):
    dense, pruned = without(make_tiny, "gemma3", {3})
    t, h = states_of(dense, text)[3], states_of(pruned, text)[2]
    norm = copy.deepcopy(decoder_layers(pruned)[2].post_feedforward_layernorm)
    given = states_of(pruned, text, "post_feedforward_layernorm")[2]
    x = given * (given.square().mean(1, keepdim=True) + norm.eps).rsqrt() / t.norm(dim=1, keepdim=True)
    e = (t - h) / t.norm(dim=1, keepdim=True)
    row = repair(Decoder(dense), pruned, frozenset({3}), text, 4, "linear").iloc[0]
    squares = x.square().sum(0)
    expected = norm.weight.double() + (x * e).sum(0) / (squares + row["strength"] * squares.mean())
    torch.testing.assert_close(
        decoder_layers(pruned)[2].post_feedforward_layernorm.weight.double(), expected, rtol=1e-4, atol=1e-5
    )
    assert row["error_after"] < row["error_before"]


def test_a_norm_with_a_bias_too(make_tiny, text):
    dense, pruned = without(make_tiny, "opt", {3}, do_layer_norm_before=False, word_embed_proj_dim=32)
    t, norm = states_of(dense, text)[3], copy.deepcopy(decoder_layers(pruned)[2].final_layer_norm).double()
    given = states_of(pruned, text, "final_layer_norm")[2]
    size = t.norm(dim=1, keepdim=True)
    x, e = layer_norm(given, (32,)) / size, (t - norm(given)) / size
    row = repair(Decoder(dense), pruned, frozenset({3}), text, 4, "linear").iloc[0]
    squares = x.square().sum(0)
    expected = norm.weight + (x * e).sum(0) / (squares + row["strength"] * squares.mean())
    found = decoder_layers(pruned)[2].final_layer_norm
    torch.testing.assert_close(found.weight.double(), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(found.bias.double(), norm.bias)


def test_what_cannot_be_made_better_is_left_in_words(make_tiny, text):
    dense, _ = without(make_tiny, "llama", {3})
    with torch.no_grad():
        for path in LLAMA:
            decoder_layers(dense)[3].get_submodule(path).weight.zero_()  # nothing is lost without this layer
    pruned = build_by_hand(dense, {3})
    before = weights_of(pruned)
    row = repair(Decoder(dense), pruned, frozenset({3}), text, 4, "linear").iloc[0]
    assert not changed_of(pruned, before)
    assert row["note"].startswith("Left as it is") and row["error_before"] == row["error_after"] == 0
    assert row["target"] == "" and row["layer_idx"] is pd.NA


def divergence_of(model, dense, blocks):
    """KL divergence of a model's next-token distributions from the dense model's, summed over tokens, in
    nats."""
    found, wanted = (logits_of(each, blocks).double().log_softmax(-1) for each in (model, dense))
    return (wanted.exp() * (wanted - found)).sum().item()


def test_before_the_head_a_fit_stays_where_predictions_come_nearer_too(make_tiny, text):
    outcomes = set()
    for seed in range(6):
        dense, generator = make_tiny("olmo2"), torch.Generator().manual_seed(seed)
        with torch.no_grad():
            dense.get_output_embeddings().weight *= 10  # a head that is sure of itself
            for parameter in decoder_layers(dense)[5].parameters():
                parameter += 0.5 * parameter.std() * torch.randn(parameter.shape, generator=generator)
        pruned = build_by_hand(dense, {5})
        before, fitted = weights_of(pruned), copy.deepcopy(pruned)
        row = repair(Decoder(dense), pruned, frozenset({5}), text, 5, "linear").iloc[0]
        norm = decoder_layers(fitted)[4].post_feedforward_layernorm
        t, h = states_of(dense, text)[5], states_of(fitted, text)[4]
        given, size = states_of(fitted, text, "post_feedforward_layernorm")[4], t.norm(dim=1, keepdim=True)
        x, e = (
            given * (given.square().mean(1, keepdim=True) + norm.variance_epsilon).rsqrt() / size,
            (t - h) / size,
        )
        squares, products, n_fit = x.square(), x * e, 18 * 20

        def change(rows, strength, squares=squares, products=products):
            total = squares[rows].sum(0)
            return products[rows].sum(0) / (total + strength * total.mean())

        fit, rest, held_out = slice(n_fit), slice(n_fit, None), text[18:]
        strength = min(STRENGTHS, key=lambda s: (e[rest] - x[rest] * change(fit, s)).square().sum().item())
        with torch.no_grad():
            norm.weight += change(slice(None), strength)
        fallen = divergence_of(build_by_hand(dense, {5}), dense, held_out) - divergence_of(
            fitted, dense, held_out
        )
        if abs(fallen) < 1e-3:
            continue  # too near to tell
        outcomes.add(fallen > 0)
        if fallen > 0:
            assert row["note"] == "" and row["strength"] == strength
            torch.testing.assert_close(
                decoder_layers(pruned)[4].post_feedforward_layernorm.weight, norm.weight, rtol=1e-4, atol=1e-4
            )
        else:
            assert "what the head makes of them" in row["note"] and row["target"] == ""
            assert row["error_after"] == row["error_before"] and not changed_of(pruned, before)
    assert outcomes == {True, False}


# ---- the magnitude form --------------------------------------------------------------------------


@pytest.mark.parametrize("removed", CUTS, ids=str)
@pytest.mark.parametrize("name", [*(name for name in SOME if name != "olmo2"), "cohere2", "gpt-neo"])
def test_scaling_what_writes_later_is_scaling_the_stream_at_the_cut(make_tiny, text, name, removed):
    dense, pruned = without(make_tiny, name, removed)
    unscaled, kept = copy.deepcopy(pruned), [i for i in range(6) if i not in removed]
    table = repair(Decoder(dense), pruned, frozenset(removed), text, 4, "magnitude")
    targets, scaled = states_of(dense, text), []
    for row in table[table["last"] < 5].itertuples():
        place = kept.index(row.first - 1)
        t, h = targets[row.last], states_of(unscaled, text)[place]
        s = (t.norm(dim=1) / h.norm(dim=1)).mean().item()
        assert row.strength == pytest.approx(s, rel=1e-3)
        assert (row.layer_idx, row.note) == (kept[place + 1], "")
        for found, states in ((row.error_before, h), (row.error_after, s * h)):
            assert found == pytest.approx(
                ((t - states).square().sum(1) / t.square().sum(1)).mean().item(), rel=1e-2
            )
        scaled.append(place)

        def times(_layer, _args, output, s=s):
            return (s * output[0], *output[1:]) if isinstance(output, tuple) else s * output

        decoder_layers(unscaled)[place].register_forward_hook(times)  # stays: later cuts are behind it
    plain = logits_of(build_by_hand(dense, removed), text)
    found, wanted = logits_of(pruned, text), logits_of(unscaled, text)
    assert (found - wanted).norm() < 2e-3 * wanted.norm()
    assert (wanted - plain).norm() > 2e-2 * plain.norm()  # otherwise the line above proves nothing
    if 5 in removed:
        assert "no layer stands after" in table.iloc[-1]["note"]


@pytest.mark.parametrize(
    "name, changes",
    [
        ("mixtral", {}),
        ("gpt-oss", {}),
        ("olmo2", {}),
        ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 32}),
    ],
    ids=["mixtral", "gpt-oss", "olmo2", "opt"],
)
def test_layers_that_cannot_be_scaled_are_left_in_words(make_tiny, text, name, changes):
    dense, pruned = without(make_tiny, name, {3}, **changes)
    before = weights_of(pruned)
    table = repair(Decoder(dense), pruned, frozenset({3}), text, 4, "magnitude")
    assert "what a later layer writes" in table.iloc[0]["note"]
    assert not changed_of(pruned, before)


def test_a_model_without_a_final_norm_is_left_in_words(make_tiny, text):
    dense, _ = without(make_tiny, "llama", {3})
    dense.model.norm = nn.Identity()
    pruned = copy.deepcopy(dense)
    del pruned.model.layers[3]
    pruned.config.num_hidden_layers = 5
    assert (
        "what a later layer writes"
        in repair(Decoder(dense), pruned, frozenset({3}), text, 4, "magnitude").iloc[0]["note"]
    )


# ---- both ----------------------------------------------------------------------------------------


def test_writers_are_found_in_every_family(tiny, family, blocks):
    found = {}

    def look(layer_idx, layer, through):
        found[layer_idx] = [
            [writer.name for writer in find_writers(layer, through, hold)] for hold in (True, False)
        ]

    for dtype in (torch.float32, torch.bfloat16):
        for _ in Decoder(tiny.to(dtype)).run(blocks, 2, revise=look):
            pass
        for layer_idx, (written, unread) in found.items():
            expected = LLAMA if family == "qwen3-moe" and layer_idx in (1, 4) else WRITERS[family]
            assert written == expected
            parallel = family in ("gpt-neox", "falcon", "cohere2")
            assert unread == (expected if parallel else expected[:1])


@torch.no_grad()
@pytest.mark.parametrize(
    "module",
    [nn.Linear(8, 8), nn.Linear(8, 8, bias=False), Conv1D(8, 8), nn.LayerNorm(8), nn.RMSNorm(8)],
    ids=str,
)
def test_what_any_writer_gives_is_scaled(module):
    for parameter in module.parameters():
        parameter += 3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    before = module(x)
    Writer("", module, 1.0).scale(0.5)
    torch.testing.assert_close(module(x), before / 2)


@pytest.mark.parametrize("form", REPAIRS)
@pytest.mark.parametrize("name", [*SOME, "mixtral", "gpt-oss"])
def test_only_what_the_table_names_is_changed(make_tiny, text, name, form):
    dense, pruned = without(make_tiny, name, {2})
    before, config = weights_of(pruned), pruned.config.to_dict()
    tied = pruned.get_input_embeddings().weight is pruned.get_output_embeddings().weight
    row = repair(Decoder(dense), pruned, frozenset({2}), text, 4, form).iloc[0]
    changed, after = changed_of(pruned, before), dict(pruned.named_parameters())
    assert {n: (p.shape, p.dtype) for n, p in after.items()} == {
        n: (p.shape, p.dtype) for n, p in before.items()
    }
    assert pruned.config.to_dict() == config
    assert all(p.requires_grad and p.is_leaf and not p.is_inference() for p in after.values()), (
        "can be trained"
    )
    assert tied == (pruned.get_input_embeddings().weight is pruned.get_output_embeddings().weight)
    places = {id(p): i for i, layer in enumerate(decoder_layers(pruned)) for p in layer.parameters()}
    if row["note"]:
        assert not changed
        assert (name in ("mixtral", "gpt-oss") or (name, form) == ("olmo2", "magnitude")) and row[
            "target"
        ] == ""
    elif form == "linear":
        expected = decoder_layers(pruned)[1].get_submodule(WRITERS[name][0]).named_parameters()
        wanted = {f".{WRITERS[name][0]}.{key}" for key, _ in expected}
        assert {places[id(after[key])] for key in changed} == {1}
        assert {key[key.index(".1.") + 2 :] for key in changed} == wanted
        assert (row["layer_idx"], row["target"]) == (1, WRITERS[name][0])
    else:
        assert {places.get(id(after[key])) for key in changed} == {2, 3, 4}, (
            "embedding, head and earlier layers stay"
        )
        assert row["layer_idx"] == 3  # in the dense model


@pytest.mark.parametrize("form", REPAIRS)
def test_a_cut_at_layer_0_is_left_in_words_and_others_are_healed(make_tiny, text, form):
    dense, pruned = without(make_tiny, "llama", {0, 1, 4})
    table = repair(Decoder(dense), pruned, frozenset({0, 1, 4}), text, 4, form)
    assert table[["first", "last"]].values.tolist() == [[0, 1], [4, 4]]
    assert table["note"].tolist() == ["Left as it is: no layer stands before the cut.", ""]
    assert table["layer_idx"].isna().tolist() == [True, False]
    dense, pruned = without(make_tiny, "llama", {0})
    before = weights_of(pruned)
    table = repair(Decoder(dense), pruned, frozenset({0}), text, 4, form)
    assert len(table) == 1 and table.iloc[0]["note"] and not changed_of(pruned, before)


def test_the_error_on_the_calibration_text_never_grows(make_tiny, family, text):
    removed = CUTS[-1]
    dense, pruned = without(make_tiny, family, removed)
    table = repair(Decoder(dense), pruned, frozenset(removed), text, 4, "linear")
    healed = table[table["target"] != ""]
    assert (healed["error_after"] < healed["error_before"]).all() and (healed["note"] == "").all()
    kept, targets = [i for i in range(6) if i not in removed], states_of(dense, text)
    for row in healed.itertuples():
        assert row.error_after == pytest.approx(
            error_of(pruned, kept.index(row.first - 1), targets[row.last], text), rel=1e-3
        )
    if family != "olmo2" and WRITERS[family] != EXPERTS:  # what scales OLMo2's channels helps nowhere else
        told = table[table["last"] < 5] if WRITERS[family] == GEMMA else table  # before the head: see above
        assert (told["note"] == "").all()


@pytest.mark.parametrize("form", REPAIRS)
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_bfloat16_model_is_healed_like_a_float32_one(make_tiny, text, name, form):
    dense, pruned = without(make_tiny, name, {2, 4})
    rounded = copy.deepcopy(pruned).to(torch.bfloat16)
    before = weights_of(rounded)
    found = repair(Decoder(dense), rounded, frozenset({2, 4}), text, 4, form)
    expected = repair(Decoder(dense), pruned, frozenset({2, 4}), text, 4, form)
    assert {p.dtype for p in rounded.parameters()} == {torch.bfloat16}
    assert found["error_after"].to_numpy() == pytest.approx(expected["error_after"].to_numpy(), rel=0.1)
    for key in changed_of(rounded, before):
        torch.testing.assert_close(
            rounded.get_parameter(key).float(), pruned.get_parameter(key), rtol=0.2, atol=0.05
        )


@pytest.mark.parametrize("form", REPAIRS)
def test_streamed_batched_and_saved_the_result_is_the_same(make_tiny, text, tmp_path, form):
    dense, pruned = without(make_tiny, "llama", {2, 4})
    dense.save_pretrained(tmp_path / "dense")
    other, whole = copy.deepcopy(pruned), copy.deepcopy(pruned)
    table = repair(Decoder(dense), pruned, frozenset({2, 4}), text, 4, form)
    streamed = stream_decoder(tmp_path / "dense", "float32")
    assert repair(streamed, other, frozenset({2, 4}), text, 4, form).equals(table)
    assert not changed_of(other, weights_of(pruned))
    repair(Decoder(dense), whole, frozenset({2, 4}), text, 99, form)
    torch.testing.assert_close(logits_of(whole, text), logits_of(pruned, text), rtol=1e-3, atol=1e-3)
    pruned.save_pretrained(tmp_path / "healed")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "healed").eval()
    assert torch.equal(logits_of(loaded, text), logits_of(pruned, text))


def test_layers_behind_the_last_cut_are_not_run(make_tiny, text):
    dense, pruned = without(make_tiny, "llama", {2})
    runs = []

    def note(_layer, args, _output, of_dense, i):
        if args[0].shape[1] == text.shape[1]:  # not the short trial that opens a model
            runs.append((of_dense, i))

    for model in (dense, pruned):
        for i, layer in enumerate(decoder_layers(model)):
            layer.register_forward_hook(functools.partial(note, of_dense=model is dense, i=i))
    repair(Decoder(dense), pruned, frozenset({2}), text, 24, "linear")
    assert {i for of_dense, i in runs if of_dense} == {0, 1, 2}
    assert {i for of_dense, i in runs if not of_dense} == {0, 1}


def test_bad_input_is_refused_in_words(make_tiny, text):
    dense, pruned = without(make_tiny, "llama", {2})
    decoder, before = Decoder(dense), weights_of(pruned)
    for sentence, removed, model, blocks, form in [
        ("one of magnitude, linear; got 'cubic'", {2}, pruned, text, "cubic"),
        ("no layer was removed", set(), dense, text, "linear"),
        ("cannot remove layers", {9}, pruned, text, "linear"),
        ("it has 5 layers of width 32, where 4 of width 32", {2, 3}, pruned, text, "linear"),
        ("width 16", {2}, make_tiny("llama", num_hidden_layers=5, hidden_size=16), text, "linear"),
        ("two blocks", {2}, pruned, text[:1], "linear"),
        ("two blocks", {2}, pruned, text[0], "magnitude"),
    ]:
        with pytest.raises(SimDiffError, match=sentence):
            repair(decoder, model, frozenset(removed), blocks, 4, form)
    assert not changed_of(pruned, before)
    with torch.no_grad():
        decoder_layers(dense)[1].mlp.down_proj.weight[0, 0] = float("nan")
    for form in REPAIRS:
        with pytest.raises(SimDiffError, match="not finite in torch.float32"):
            repair(Decoder(dense), pruned, frozenset({2}), text, 4, form)


def test_a_revised_layer_is_run_with_its_new_weights(llama, blocks):
    seen = []

    def revise(layer_idx, layer, through):
        first = [after.clone() for _, after in through()]
        assert all(torch.equal(a, b) for a, (_, b) in zip(first, through(), strict=True)), "as often as asked"
        seen.append((layer_idx, len(first)))
        if layer_idx == 2:
            layer.mlp.down_proj.weight.mul_(2)
            assert not torch.equal(next(through())[1], first[0])

    states = torch.cat([states for _, _, states in Decoder(llama).run(blocks, 2, revise=revise)])
    assert seen == [(i, 3) for i in range(6)]
    assert torch.equal(states, torch.cat([states for _, _, states in Decoder(llama).run(blocks, 2)]))
