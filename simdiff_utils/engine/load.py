"""Loading: a checkpoint folder becomes a model and its tokenizer; where a model keeps its decoder layers."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from simdiff_utils import SimDiffError


def pick_device() -> torch.device:
    """The first GPU where there is one (of several processes of a launcher, each takes its own), else the
    CPU."""
    return torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu")


def pick_dtype(dtype: str) -> torch.dtype:
    """`auto` is bfloat16 where the hardware multiplies it (a GPU; AMX or AVX512-bf16), else float32."""
    if dtype != "auto":
        return getattr(torch, dtype)
    cpu = torch.cpu.get_capabilities()
    fast = torch.cuda.is_available() or cpu.get("amx_bf16") or cpu.get("avx512_bf16")
    return torch.bfloat16 if fast else torch.float32


def load_model(folder: Path, dtype: str = "auto") -> PreTrainedModel:
    """Load a checkpoint for inference, weights in `dtype`, eval mode: on `pick_device()`, or spread by
    accelerate over the GPUs of the machine where it has several."""
    options = {"dtype": pick_dtype(dtype), "use_safetensors": True}
    if torch.cuda.device_count() > 1 and "LOCAL_RANK" not in os.environ:
        return AutoModelForCausalLM.from_pretrained(folder, device_map="auto", **options).eval()
    return AutoModelForCausalLM.from_pretrained(folder, **options).to(pick_device()).eval()


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The checkpoint's own tokenizer."""
    return AutoTokenizer.from_pretrained(folder)


def decoder_stack(model: PreTrainedModel) -> nn.Module:
    """The model without its head."""
    return model.base_model


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers, found by structure: the one list of modules as long as the config says.

    Raises:
        SimDiffError: there is no such list, or more than one.
    """
    n_layers = text_config(model).num_hidden_layers
    for modules in (decoder_stack(model).children(), decoder_stack(model).modules()):  # near ones first
        found = [m for m in modules if isinstance(m, nn.ModuleList) and len(m) == n_layers]
        if found:
            break
    if len(found) != 1:
        raise SimDiffError(
            f"{type(model).__name__} has {len(found)} lists of {n_layers} modules where its decoder "
            "layers should be; this architecture cannot be pruned by layers."
        )
    return found[0]


def input_device(model: PreTrainedModel) -> torch.device:
    """Where the model takes its input: where its embeddings are, or where accelerate brings them to."""
    hook = getattr(model.get_input_embeddings(), "_hf_hook", None)
    return torch.device(getattr(hook, "execution_device", None) or model.device)


def layers_path(model: PreTrainedModel) -> tuple[nn.Module, str]:
    """The module that holds the decoder layers, and under which name."""
    layers = decoder_layers(model)
    return next(
        (module, name)
        for module in decoder_stack(model).modules()
        for name, child in module.named_children()
        if child is layers
    )


@contextmanager
def layers_replaced(model: PreTrainedModel, others: nn.ModuleList) -> Iterator[None]:
    """Let other modules stand where the decoder layers are, for as long as a `with` block lasts."""
    parent, name = layers_path(model)
    layers = getattr(parent, name)
    setattr(parent, name, others)
    try:
        yield
    finally:
        setattr(parent, name, layers)


def text_config(model: PreTrainedModel) -> PretrainedConfig:
    """The config that holds the decoder's sizes."""
    return model.config.get_text_config()


@torch.inference_mode()
def generate_text(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, n_new_tokens: int = 40
) -> str:
    """Greedy continuation with the KV cache, prompt included."""
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    tokens = model.generate(**inputs, max_new_tokens=n_new_tokens, do_sample=False, pad_token_id=pad_token_id)
    return tokenizer.decode(tokens[0], skip_special_tokens=True)
