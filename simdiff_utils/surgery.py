"""Removing layers: in memory for as long as a `with` block lasts, and for good in an exported checkpoint."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from simdiff_utils.models import decoder_layers, decoder_stack, text_config
from simdiff_utils.settings import SimDiffError


@contextmanager
def layers_removed(model: PreTrainedModel, removed: frozenset[int]) -> Iterator[PreTrainedModel]:
    """The same model without some of its layers, whole again afterwards; no weight is copied.

    Layer indices are renumbered for the KV cache, and everything the config states per layer is cut with the
    layers, so that cached generation works inside the block and `save_pretrained` writes a consistent checkpoint.

    Args:
        model: the dense model, changed in place and restored.
        removed: 0-based indices in the dense model.

    Raises:
        SimDiffError: an index is no layer's, or no layer would be left.
    """
    layers = decoder_layers(model)
    n_layers = len(layers)
    if not removed <= set(range(n_layers)) or len(removed) == n_layers:
        raise SimDiffError(f"cannot remove layers {sorted(removed)} of a model with layers 0 to {n_layers - 1}; "
                           "name indices in that range and leave one.")
    kept = [i for i in range(n_layers) if i not in removed]
    with ExitStack() as restore:
        configs = _layered_configs(model, n_layers)
        restore.callback(_replace_layers(model, layers, kept))
        restore.callback(_renumber(layers, kept))
        for config in configs:
            restore.callback(_cut_config(config, kept))
        yield model


def _replace_layers(model: PreTrainedModel, layers: nn.ModuleList, kept: list[int]):
    parent, name = next((module, name) for module in decoder_stack(model).modules()
                        for name, child in module.named_children() if child is layers)
    setattr(parent, name, nn.ModuleList([layers[i] for i in kept]))
    return lambda: setattr(parent, name, layers)


def _renumber(layers: nn.ModuleList, kept: list[int]):
    """Give every module that carries a `layer_idx` its new one: the KV cache is addressed by it."""
    before = [(module, module.layer_idx) for i in kept for module in layers[i].modules()
              if isinstance(getattr(module, "layer_idx", None), int)]
    new_idx = {old: new for new, old in enumerate(kept)}
    for module, old in before:
        module.layer_idx = new_idx.get(old, old)

    def undo() -> None:
        for module, old in before:
            module.layer_idx = old
    return undo


def _layered_configs(model: PreTrainedModel, n_layers: int) -> list[PretrainedConfig]:
    """Every config object of the model that states this number of layers (the base model may hold its own)."""
    configs = [text_config(model), *(getattr(module, "config", None) for module in model.modules())]
    distinct = {id(config): config for config in configs if isinstance(config, PretrainedConfig)}
    return [config for config in distinct.values() if getattr(config, "num_hidden_layers", None) == n_layers]


def _cut_config(config: PretrainedConfig, kept: list[int]):
    """Set the number of layers and cut every list with one entry per layer (`layer_types` and the like)."""
    n_layers = config.num_hidden_layers
    per_layer = {name: value for name, value in vars(config).items()
                 if isinstance(value, (list, tuple)) and len(value) == n_layers and "token" not in name}
    for name, value in per_layer.items():
        setattr(config, name, type(value)(value[i] for i in kept))
    config.num_hidden_layers = len(kept)

    def undo() -> None:
        config.num_hidden_layers = n_layers
        for name, value in per_layer.items():
            setattr(config, name, value)
    return undo


def export_pruned(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, removed: frozenset[int],
                  folder: Path) -> None:
    """Write the model without `removed` as safetensors that plain `transformers` loads, tokenizer included.

    Args:
        model: the dense model; whole again afterwards. The empty set exports it as it is.
        removed: 0-based indices in the dense model.
        folder: where to; the caller makes it appear whole (`files.write_whole`).
    """
    with layers_removed(model, removed):
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def verify_reload(model: PreTrainedModel, removed: frozenset[int], folder: Path, tokens: torch.Tensor) -> float:
    """Largest difference between the logits of the exported checkpoint and of the pruned model in memory.

    Args:
        tokens: ids [1, seq_len] to run both on.

    Raises:
        SimDiffError: the checkpoint does not give the same logits.
    """
    reloaded = type(model).from_pretrained(folder, dtype=model.dtype).to(model.device).eval()
    with torch.inference_mode():
        with layers_removed(model, removed):
            expected = model(input_ids=tokens.to(model.device), use_cache=False).logits
        difference = (reloaded(input_ids=tokens.to(model.device), use_cache=False).logits - expected).abs().max().item()
    if not difference <= 1e-4 * expected.abs().max().item():
        raise SimDiffError(f"the checkpoint in {folder.name} gives other logits than the model in memory (largest "
                           f"difference {difference:.2g}); please report the model's name.")
    return difference
