"""Loading: a checkpoint folder becomes a model and its tokenizer; where a model keeps its decoder layers."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.utils.output_capturing import maybe_install_capturing_hooks

from simdiff_utils import SimDiffError, require
from simdiff_utils.engine.headers import refuse_pointer
from simdiff_utils.engine.whole import check_folder, check_whole, told_in_a_sentence
from simdiff_utils.files import read_json, write_json

# What one run wanted, and somebody's training saved in a config: as a checkpoint is run here, and exported.
RUN_OPTIONS = {
    "return_dict": True,
    "use_cache": True,
    "output_hidden_states": False,
    "output_attentions": False,
}


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


def read_config(folder: str | Path) -> PretrainedConfig:
    """A checkpoint's config, without the options of one run that somebody's training saved in it.

    Raises:
        SimDiffError: transformers cannot read it.
    """
    folder = Path(folder)
    with told_in_a_sentence(f"transformers cannot read the config of {folder.name}"):
        config = AutoConfig.from_pretrained(folder)
    for part in (config, config.get_text_config()):
        part._attn_implementation = None  # which one is installed, this machine knows
        vars(part).update(RUN_OPTIONS)
    return config


def auto_class(config: PretrainedConfig) -> type[AutoModelForCausalLM] | type[AutoModelForImageTextToText]:
    """transformers' class for the architecture that a config names: where it has towers beside its language
    model, the one that keeps them."""
    wrapper = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(config.model_type)
    return AutoModelForImageTextToText if wrapper in (config.architectures or ()) else AutoModelForCausalLM


def load_model(folder: str | Path, dtype: str = "auto") -> PreTrainedModel:
    """Load a checkpoint for inference, weights in `dtype`, eval mode: on `pick_device()`, or spread by
    accelerate over the GPUs of the machine where it has several.

    Raises:
        SimDiffError: it cannot be loaded whole, see `check_folder` and `check_whole`.
    """
    if torch.cuda.device_count() > 1 and "LOCAL_RANK" not in os.environ:
        return load_folder(Path(folder), dtype=pick_dtype(dtype), device_map="auto")
    return load_folder(Path(folder), dtype=pick_dtype(dtype)).to(pick_device())


def load_folder(folder: Path, **options: object) -> PreTrainedModel:
    """A checkpoint in safetensors as transformers loads it with these options, whole.

    A quantization_config among them is one that turns the checkpoint's weights into plain ones.
    """
    check_folder(folder, dequantise="quantization_config" in options)
    with _complete_index(folder) as place:
        options |= dict(config=read_config(folder), use_safetensors=True)
        return load_whole(place, folder.name, auto_class(options["config"]), **options)


@contextmanager
def _complete_index(folder: Path) -> Iterator[Path]:
    """The folder; where its index lacks a part that only transformers asks for, links with all of it."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file() or not index.is_file() or "metadata" in read_json(index):
        yield folder
        return
    with tempfile.TemporaryDirectory() as links:
        for file in folder.iterdir():
            (Path(links) / file.name).symlink_to(file.resolve())
        (Path(links) / index.name).unlink()
        write_json(Path(links) / index.name, {"metadata": {}} | read_json(index))
        yield Path(links)


def load_whole(
    folder: Path, label: str, loader: type = AutoModelForCausalLM, **options: object
) -> PreTrainedModel:
    """What transformers loads with these options, in eval mode, if every weight comes from the checkpoint."""
    with told_in_a_sentence(f"transformers cannot load {label}"):
        options |= dict(output_loading_info=True, ignore_mismatched_sizes=True)  # `check_whole` names them
        model, info = loader.from_pretrained(folder, **options)
    check_whole(model, info, label)
    return model.eval()


def load_tokenizer(folder: str | Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The checkpoint's own tokenizer.

    Args:
        trust_remote_code: run the code that comes with it, if it does; nobody is asked on the terminal.

    Raises:
        SimDiffError: there is none, or it cannot be read.
    """
    folder = Path(folder)
    files = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")
    present = [folder / name for name in files if (folder / name).is_file()]
    require(present, f"{folder.name} has no tokenizer: copy the files of its model's tokenizer into it.")
    for file in present:
        refuse_pointer(file)
    with told_in_a_sentence(f"transformers cannot read the tokenizer of {folder.name}"):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)


def decoder_stack(model: PreTrainedModel) -> nn.Module:
    """The model without its head."""
    return model.base_model


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers, found by structure: the one list of modules in the language model that is as long
    as the config says.

    Raises:
        SimDiffError: there is no such list, or more than one.
    """
    n_layers = text_config(model).num_hidden_layers
    language_model = model.get_decoder()  # without the towers, which have layers too
    for modules in (language_model.children(), language_model.modules()):  # near ones first
        found = [m for m in modules if isinstance(m, nn.ModuleList) and len(m) == n_layers]
        if found:
            break
    if len(found) != 1:
        raise SimDiffError(
            f"{type(model).__name__} has {len(found)} lists of {n_layers} modules where its decoder "
            "layers should be; this architecture cannot be pruned by layers."
        )
    return found[0]


def tower_parameters(model: PreTrainedModel) -> set[nn.Parameter]:
    """The parameters of what stands beside the language model (a vision tower, its projector), which text
    never reaches."""
    return {*decoder_stack(model).parameters()} - {*model.get_decoder().parameters()}


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
    # the hooks by which transformers collects hidden states are put on once, on what stands there then
    maybe_install_capturing_hooks(decoder_stack(model))
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
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
    # one text alone is never padded: any id will do that has an embedding
    greedy = dict(do_sample=False, use_cache=True, return_dict_in_generate=False, pad_token_id=0)
    tokens = model.generate(**inputs, max_new_tokens=n_new_tokens, **greedy)
    return tokenizer.decode(tokens[0], skip_special_tokens=True)
