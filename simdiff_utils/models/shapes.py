"""Shapes: the real architecture of the paper's models, full size or fewer layers, with random weights.

For memory and speed where the weights cannot be had. What such a model says about perplexity is worthless,
and every result carries the words "random weights" in the model's name.
"""

import re
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from simdiff_utils import SimDiffError
from simdiff_utils.assets import cache_dir
from simdiff_utils.engine.load import decoder_layers, pick_device
from simdiff_utils.engine.weights import skeleton
from simdiff_utils.files import check_disk, write_json, write_whole


def _sizes(n_layers: int, width: int, inner: int, n_heads: int, n_kv_heads: int, **more: object) -> dict:
    return more | dict(
        num_hidden_layers=n_layers,
        hidden_size=width,
        intermediate_size=inner,
        num_attention_heads=n_heads,
        num_key_value_heads=n_kv_heads,
    )


_QWEN = dict(model_type="qwen2", vocab_size=151936, tie_word_embeddings=True)
_LLAMA2 = dict(model_type="llama", vocab_size=32000, max_position_embeddings=4096)
_LLAMA3 = dict(model_type="llama", vocab_size=128256)
_MISTRAL = dict(model_type="mistral", vocab_size=32768)
# The paper's models: hub id -> what its config states (layers, widths, heads, key-value heads).
PAPER_MODELS = {
    "Qwen/Qwen2.5-0.5B": _sizes(24, 896, 4864, 14, 2, **_QWEN),
    "Qwen/Qwen2.5-1.5B": _sizes(28, 1536, 8960, 12, 2, **_QWEN),
    "Qwen/Qwen2.5-3B": _sizes(36, 2048, 11008, 16, 2, **_QWEN),
    "meta-llama/Llama-2-7b-hf": _sizes(32, 4096, 11008, 32, 32, **_LLAMA2),
    "mistralai/Mistral-7B-v0.3": _sizes(32, 4096, 14336, 32, 8, **_MISTRAL),
    "meta-llama/Llama-3.1-8B": _sizes(32, 4096, 14336, 32, 8, **_LLAMA3),
    "meta-llama/Llama-2-13b-hf": _sizes(40, 5120, 13824, 40, 40, **_LLAMA2),
}
SHAPES = {
    "qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B",
    "qwen2.5-1.5b": "Qwen/Qwen2.5-1.5B",
    "qwen2.5-3b": "Qwen/Qwen2.5-3B",
    "llama2-7b": "meta-llama/Llama-2-7b-hf",
    "mistral-7b-v0.3": "mistralai/Mistral-7B-v0.3",
    "llama3.1-8b": "meta-llama/Llama-3.1-8B",
    "llama2-13b": "meta-llama/Llama-2-13b-hf",
}


def shape_folder(shape: str) -> Path:
    """Checkpoint folder of a shape, made once in the user's cache: bfloat16, a tokenizer of bytes.

    Args:
        shape: a name of `SHAPES`; `NAME:N` has N layers instead of all.

    Raises:
        SimDiffError: there is no such shape, or the disk cannot hold it.
    """
    name, n_layers = _parse_shape(shape)
    target = cache_dir() / "checkpoints" / f"shape-{name}-{n_layers}"
    if not target.exists():
        model = skeleton(paper_config(SHAPES[name], n_layers), torch.bfloat16)
        check_disk(target, sum(2 * p.numel() for p in model.parameters()), f"the shape {shape}")
        with write_whole(target, replace=False) as partial:
            _write_random(model, partial)
    return target


def _parse_shape(shape: str) -> tuple[str, int]:
    """A name of `SHAPES` and a number of layers."""
    found = re.fullmatch(r"([^:]+)(?::(\d{1,3}))?", shape)
    if not found or found[1] not in SHAPES:
        raise SimDiffError(
            f"there is no shape {shape!r}; the shapes are {', '.join(SHAPES)}, "
            "each also with fewer layers, as in shape:llama2-13b:8."
        )
    most = PAPER_MODELS[SHAPES[found[1]]]["num_hidden_layers"]
    n_layers = int(found[2] or most)
    if not 1 <= n_layers <= most:
        raise SimDiffError(f"the shape {found[1]} has 1 to {most} layers, got {n_layers}.")
    return found[1], n_layers


def shape_size(shape: str) -> tuple[int, int, int]:
    """(parameters, decoder layers, parameters outside the layers) of a shape; nothing is made."""
    name, n_layers = _parse_shape(shape)
    model = skeleton(paper_config(SHAPES[name], n_layers))
    inside = sum(p.numel() for p in decoder_layers(model).parameters())
    total = sum(p.numel() for p in model.parameters())  # a tied matrix counts once
    return total, n_layers, total - inside


def paper_config(hub_id: str, n_layers: int = 0) -> PretrainedConfig:
    """Config of one of `PAPER_MODELS`, with all its layers (0) or another number of them."""
    sizes = PAPER_MODELS[hub_id]
    return AutoConfig.for_model(**sizes | {"num_hidden_layers": n_layers or sizes["num_hidden_layers"]})


def random_model(shape: str, dtype: torch.dtype) -> PreTrainedModel:
    """A shape with random weights made where they are used (`pick_device`); nothing is written."""
    if shape not in SHAPES:
        raise SimDiffError(f"there is no shape {shape!r}; the shapes are {', '.join(SHAPES)}.")
    with pick_device():
        return AutoModelForCausalLM.from_config(paper_config(SHAPES[shape]), dtype=dtype).eval()


def _write_random(model: PreTrainedModel, folder: Path) -> None:
    """A shard for each layer and one for the rest; the model as a whole is never in memory."""
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    _byte_tokenizer().save_pretrained(folder)
    layers = {id(layer) for layer in decoder_layers(model)}
    prefixes = [f"{name}." for name, module in model.named_modules() if id(module) in layers]
    parts = {prefix: {} for prefix in ("", *prefixes)}
    for name, p in model.named_parameters():  # a tied one comes once
        prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), "")
        parts[prefix][name] = p
    generator = torch.Generator().manual_seed(0)
    weight_map = {}
    for number, parameters in enumerate(tqdm(parts.values(), "random weights", unit="shard"), start=1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        made = {name: _random(name, p, generator) for name, p in parameters.items()}
        save_file(made, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(parameters, file)
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})


def _random(name: str, like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Matrices normal with the usual standard deviation of 0.02, norms one, biases zero."""
    if like.dim() > 1:
        return torch.empty(like.shape, dtype=like.dtype).normal_(0, 0.02, generator=generator)
    return torch.full(like.shape, 0.0 if name.endswith("bias") else 1.0, dtype=like.dtype)


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    """Each byte of the text is a token, so that its ids fit every vocabulary."""
    alphabet = enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()), start=1)
    vocabulary = {"<eos>": 0} | {character: i for i, character in alphabet}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")
