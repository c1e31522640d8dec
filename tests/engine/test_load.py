"""Models: dtype, where the decoder layers are, and text from one."""

import pytest
import torch
from torch import nn

from simdiff_utils import SimDiffError
from simdiff_utils.engine.load import decoder_layers, decoder_stack, generate_text, layers_path, pick_dtype


@pytest.mark.parametrize(
    "cuda, cpu, expected",
    [
        (False, {"avx2": True, "amx_bf16": False, "avx512_bf16": False}, torch.float32),
        (False, {}, torch.float32),
        (False, {"amx_bf16": True}, torch.bfloat16),
        (False, {"avx512_bf16": True}, torch.bfloat16),
        (True, {}, torch.bfloat16),
    ],
)
def test_auto_is_bfloat16_only_where_the_hardware_has_it(monkeypatch, cuda, cpu, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: cpu)
    assert pick_dtype("auto") == expected
    assert [pick_dtype(name) for name in ("float32", "bfloat16", "float16")] == [
        torch.float32,
        torch.bfloat16,
        torch.float16,
    ]


def test_decoder_layers_are_found_in_every_family(tiny):
    layers = decoder_layers(tiny)
    assert len(layers) == 6 == len({id(layer) for layer in layers})
    assert len({type(layer) for layer in layers}) == 1
    n_whole = sum(p.numel() for p in tiny.parameters())
    assert n_whole / 2 < sum(p.numel() for layer in layers for p in layer.parameters()) < n_whole
    assert getattr(*layers_path(tiny)) is layers and layers in list(decoder_stack(tiny).modules())
    assert tiny.get_output_embeddings() not in list(decoder_stack(tiny).modules())


def test_a_model_of_two_or_no_such_lists_is_refused(llama):
    llama.model.twin = nn.ModuleList(nn.Identity() for _ in range(6))
    with pytest.raises(SimDiffError, match="LlamaForCausalLM has 2 lists of 6 modules"):
        decoder_layers(llama)
    del llama.model.twin
    llama.model.other = nn.ModuleList(nn.Identity() for _ in range(5))  # of another length: no doubt
    assert decoder_layers(llama) is llama.model.layers
    llama.model.layers = nn.ModuleList(llama.model.layers[:4])
    with pytest.raises(SimDiffError, match="LlamaForCausalLM has 0 lists of 6 modules"):
        decoder_layers(llama)


def test_greedy_text_equals_the_likeliest_word_each_time(llama, tokenizer):
    llama.generation_config.eos_token_id = None
    ids = [5, 6, 7]
    for _ in range(8):
        ids.append(llama(torch.tensor([ids])).logits[0, -1].argmax().item())
    words = generate_text(llama, tokenizer, "w5 w6 w7", n_new_tokens=8)
    assert words == tokenizer.decode(ids, skip_special_tokens=True) and words.startswith("w5 w6 w7")
