"""Models: from a name that a user gives to a checkpoint folder, a model, its tokenizer and its decoder layers."""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import errors as hub_errors
from huggingface_hub import snapshot_download
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from simdiff_utils import assets
from simdiff_utils.files import hash_file, write_whole
from simdiff_utils.settings import SimDiffError

# The paper's models: hub id -> model_type and the sizes its config states.
_QWEN = dict(model_type="qwen2", vocab_size=151936, tie_word_embeddings=True)
_LLAMA2 = dict(model_type="llama", vocab_size=32000)
PAPER_MODELS = {
    "Qwen/Qwen2.5-0.5B": _QWEN | dict(num_hidden_layers=24, hidden_size=896, intermediate_size=4864,
                                      num_attention_heads=14, num_key_value_heads=2),
    "Qwen/Qwen2.5-1.5B": _QWEN | dict(num_hidden_layers=28, hidden_size=1536, intermediate_size=8960,
                                      num_attention_heads=12, num_key_value_heads=2),
    "Qwen/Qwen2.5-3B": _QWEN | dict(num_hidden_layers=36, hidden_size=2048, intermediate_size=11008,
                                    num_attention_heads=16, num_key_value_heads=2),
    "meta-llama/Llama-2-7b-hf": _LLAMA2 | dict(num_hidden_layers=32, hidden_size=4096, intermediate_size=11008,
                                               num_attention_heads=32, num_key_value_heads=32),
    "mistralai/Mistral-7B-v0.3": dict(model_type="mistral", vocab_size=32768, num_hidden_layers=32, hidden_size=4096,
                                      intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8),
    "meta-llama/Llama-3.1-8B": dict(model_type="llama", vocab_size=128256, num_hidden_layers=32, hidden_size=4096,
                                    intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8),
    "meta-llama/Llama-2-13b-hf": _LLAMA2 | dict(num_hidden_layers=40, hidden_size=5120, intermediate_size=13824,
                                                num_attention_heads=40, num_key_value_heads=40),
}
_SECOND_COPIES = ["consolidated*", "original/*"]  # of the same weights, in the vendors' own formats
_CHECKPOINT_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


@dataclass(frozen=True)
class Checkpoint:
    """A folder that plain `transformers` loads, with what to call it.

    Attributes:
        folder: config, safetensors and tokenizer files.
        label: the name for tables.
        sha256: of config and weights, so that results of other weights are never taken for these.
    """

    folder: Path
    label: str
    sha256: str


def resolve_checkpoint(model: str) -> Checkpoint:
    """Find the checkpoint that a user's name means.

    Args:
        model: `embedded:NAME` (see `assets.ASSETS`), a local Hugging Face folder, a local `.gguf` file, or a hub id.

    Raises:
        SimDiffError: it cannot be found or reached, is no decoder-only model, or has no safetensors.
    """
    folder = checkpoint_folder(model)
    _refuse_unsuitable(folder, model)
    label = model
    if model.startswith("embedded:"):
        label = assets.ASSETS[model.removeprefix("embedded:")].label
    elif Path(model).exists():
        label = Path(model).resolve().name
    return Checkpoint(folder, label, _hash_checkpoint(folder))


def checkpoint_folder(model: str) -> Path:
    """Folder of the checkpoint named; embedded and GGUF models are converted once, into the user's cache."""
    if model.startswith("embedded:"):
        name = model.removeprefix("embedded:")
        models = [n for n, asset in assets.ASSETS.items() if asset.filename.endswith(".gguf")]
        if name not in models:
            raise SimDiffError(f"there is no embedded model {name!r}; the embedded ones are {', '.join(models)}.")
        target = assets.cache_dir() / "checkpoints" / name
        return target if target.exists() else _convert_gguf(assets.fetch(name), target)
    path = Path(model).expanduser()
    if model and path.is_dir():
        return path
    if path.suffix == ".gguf" and path.is_file():
        target = assets.cache_dir() / "checkpoints" / f"gguf-{_hash_files([path])[:16]}"
        return target if target.exists() else _convert_gguf(path, target)
    if path.suffix == ".gguf":
        raise SimDiffError(f"there is no file {model}; check the path.")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", model) or ".." in model:
        raise SimDiffError(f"{model!r} is neither a local folder, a .gguf file, an embedded model nor a hub id; "
                           "check the path, or write the hub id as organisation/name.")
    return _download(model)


def _download(hub_id: str) -> Path:
    try:
        return Path(snapshot_download(hub_id, allow_patterns=_CHECKPOINT_FILES, ignore_patterns=_SECOND_COPIES))
    except hub_errors.GatedRepoError as error:
        raise SimDiffError(f"{hub_id} is gated: accept the licence on its page, then run `hf auth login`.") from error
    except (hub_errors.RepositoryNotFoundError, hub_errors.HFValidationError) as error:
        raise SimDiffError(f"the hub has no model {hub_id}; check the id (a private one needs `hf auth login`)."
                           ) from error
    except Exception as error:  # a dozen kinds, of the hub's client and of what is below it; all end the same way
        raise SimDiffError(f"{hub_id} cannot be reached on the hub and is not in its cache; offline, name a local "
                           "folder, a .gguf file or embedded:smollm2-135m-instruct.") from error


def _convert_gguf(gguf: Path, target: Path) -> Path:
    """Dequantise a GGUF file into a float32 checkpoint folder that appears whole or not at all."""
    try:
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    except Exception as error:  # whatever a damaged file makes the reader stumble over
        raise SimDiffError(f"{gguf.name} cannot be read as a GGUF model by transformers: {error}") from error
    # Loaded from GGUF, the model is marked as quantised and refuses to be saved, though its weights are float32.
    model.hf_quantizer = None
    del model.config.quantization_config
    with write_whole(target, replace=False) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    return target


def _refuse_unsuitable(folder: Path, model: str) -> None:
    if not (folder / "config.json").is_file():
        raise SimDiffError(f"{model} holds no config.json, so it is no Hugging Face model folder.")
    try:
        config = AutoConfig.from_pretrained(folder)
    except (ValueError, KeyError, OSError) as error:
        raise SimDiffError(f"transformers cannot read the config of {model}: {str(error).splitlines()[0]}") from error
    names = config.architectures or []
    if config.is_encoder_decoder or not set(names) & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()):
        raise SimDiffError(f"{model} is no decoder-only language model (its architecture is "
                           f"{', '.join(names) or config.model_type}); name a causal language model.")
    if not any(folder.glob("*.safetensors")):
        raise SimDiffError(f"{model} has no .safetensors weights, and pickled ones are not read; "
                           "convert it with `save_pretrained` on a machine that trusts it.")


def _hash_checkpoint(folder: Path) -> str:
    return _hash_files([folder / "config.json", *sorted(folder.glob("*.safetensors"))])


def _hash_files(paths: list[Path]) -> str:
    digests = [hash_file(path) for path in paths]
    return hashlib.sha256(" ".join(digests).encode()).hexdigest()


def pick_device() -> torch.device:
    """The first GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pick_dtype(dtype: str) -> torch.dtype:
    """`auto` is bfloat16 where the hardware multiplies it (a GPU; AMX or AVX512-bf16), else float32."""
    if dtype != "auto":
        return getattr(torch, dtype)
    cpu = torch.cpu.get_capabilities()
    fast = torch.cuda.is_available() or cpu.get("amx_bf16") or cpu.get("avx512_bf16")
    return torch.bfloat16 if fast else torch.float32


def load_model(folder: Path, dtype: str = "auto") -> PreTrainedModel:
    """Load a checkpoint for inference: weights in `dtype` on `pick_device()`, eval mode."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=pick_dtype(dtype), use_safetensors=True)
    return model.to(pick_device()).eval()


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
    found = [m for m in decoder_stack(model).children() if isinstance(m, nn.ModuleList) and len(m) == n_layers]
    found = found or [m for m in decoder_stack(model).modules() if isinstance(m, nn.ModuleList) and len(m) == n_layers]
    if len(found) != 1:
        raise SimDiffError(f"{type(model).__name__} has {len(found)} lists of {n_layers} modules where its decoder "
                           "layers should be; this architecture cannot be pruned by layers.")
    return found[0]


def text_config(model: PreTrainedModel) -> PretrainedConfig:
    """The config that holds the decoder's sizes."""
    return model.config.get_text_config()


def count_parameters(hub_id: str) -> int:
    """Parameters of one of `PAPER_MODELS`, counted on its real architecture without memory (meta device)."""
    config = AutoConfig.for_model(**PAPER_MODELS[hub_id])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return sum(p.numel() for p in model.parameters())  # a tied matrix counts once


@torch.inference_mode()
def generate_text(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str,
                  n_new_tokens: int = 40) -> str:
    """Greedy continuation with the KV cache, prompt included."""
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    tokens = model.generate(**inputs, max_new_tokens=n_new_tokens, do_sample=False,
                            pad_token_id=pad_token_id)
    return tokenizer.decode(tokens[0], skip_special_tokens=True)
