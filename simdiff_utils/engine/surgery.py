"""Removing layers: what the config and the layers that stay must become, for a while in memory or for an
export.

No table of model types either. A config cut to the kept layers must build exactly these layers: the model
that it builds without memory for weights is the plan, and it also tells which attributes carry a layer's
index.
"""

import copy
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from simdiff_utils import SimDiffError, one_line, require
from simdiff_utils.engine.load import decoder_layers, layers_replaced, text_config
from simdiff_utils.engine.weights import skeleton

Renumbering = list[tuple[nn.Module, str, int]]  # module, attribute, its new value
Merge = tuple[int, tuple[int, ...]]  # a layer that stays, and the layers whose weights are folded into it


@contextmanager
def layers_removed(model: PreTrainedModel, removed: frozenset[int]) -> Iterator[PreTrainedModel]:
    """The same model without some of its layers, whole again afterwards; no weight is copied.

    Layer indices are renumbered for the KV cache and the config is cut, so that cached generation works
    inside.

    Args:
        model: the dense model in memory, changed in place and restored.
        removed: 0-based indices in the dense model.

    Raises:
        SimDiffError: as `plan_cut`.
    """
    layers = decoder_layers(model)
    kept = keep(removed, len(layers))
    renumbering = plan_cut(model, removed)[1] if removed else []
    with ExitStack() as restore:
        for module, name, new in renumbering:
            restore.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, new)
        configs = _layered_configs(model)
        restore.enter_context(layers_replaced(model, nn.ModuleList([layers[i] for i in kept])))
        for config in configs:
            restore.callback(vars(config).update, dict(vars(config)))
            _cut(config, kept)
        yield model


@contextmanager
def layers_merged(model: PreTrainedModel, merges: tuple[Merge, ...]) -> Iterator[None]:
    """The weights of some layers merged, one merge after another, for as long as a `with` block lasts (LaCo's
    rule, as released).

    The matrices of layer l become those of the last layer folded into it: the released code takes each
    difference from what the one before it made, so that all but the last cancel, and it leaves norms and
    biases as they are. (The printed formula, theta_l + sum over the folded layers of (theta_{l+k} - theta_l),
    makes weights that grow with their number.) A folded layer that took part in an earlier merge comes with
    its weights of then. No layer is taken out here.

    Args:
        model: the dense model in memory, changed in place and restored to the last bit.
        merges: original 0-based indices.

    Raises:
        SimDiffError: the layers are not built alike, or the weights are streamed from disk.
    """
    layers = decoder_layers(model)
    with ExitStack() as restore, torch.no_grad():
        for stays, folded in merges:
            mine = dict(layers[stays].named_parameters())
            others = [dict(layers[layer_idx].named_parameters()) for layer_idx in folded]
            if any(parameter.is_meta for parameter in mine.values()):
                raise SimDiffError(
                    "merging layers changes weights and needs the model in memory: raise memory_gib."
                )
            if any(_shapes(other) != _shapes(mine) for other in others):
                raise SimDiffError(
                    f"layers {sorted({stays, *folded})} of {type(model).__name__} are not built alike "
                    "and cannot be merged; use a criterion that only removes layers."
                )
            for name, parameter in mine.items():
                if parameter.dim() > 1 and not name.endswith("bias"):
                    restore.callback(parameter.data.copy_, parameter.detach().clone())
                    parameter.copy_(others[-1][name])
        yield


def _shapes(parameters: dict[str, nn.Parameter | None]) -> dict[str, torch.Size]:
    return {name: p.shape for name, p in parameters.items() if p is not None}


def check_removed(removed: frozenset[int], n_layers: int) -> None:
    """Refuse a set of layers to remove that names no layer of the model, or all of them."""
    require(
        removed <= set(range(n_layers)) and len(removed) < n_layers,
        f"cannot remove layers {sorted(removed)} of a model with layers 0 to {n_layers - 1}; "
        "name indices in that range and leave one.",
    )


def keep(removed: frozenset[int], n_layers: int) -> list[int]:
    """Indices that stay, in order; refuses a set that names no layers of the model, or all."""
    check_removed(removed, n_layers)
    return [layer_idx for layer_idx in range(n_layers) if layer_idx not in removed]


def plan_cut(model: PreTrainedModel, removed: frozenset[int]) -> tuple[PretrainedConfig, Renumbering]:
    """The config without the removed layers, and the attributes of the kept ones that must follow.

    Args:
        model: the dense model; its weights may be on the meta device.
        removed: 0-based indices in the dense model.

    Raises:
        SimDiffError: an index is no layer's, none would be left, or a kept layer would be built otherwise in
            its new place: the family ties what a layer is to where it stands.
    """
    family, layers = type(model).__name__, decoder_layers(model)
    kept = keep(removed, len(layers))
    refusal = f"{family} cannot lose layers {sorted(removed)}"
    config = copy.deepcopy(model.config)
    _cut(config.get_text_config(), kept)
    try:  # as a reload will read it, defaults that were computed from the number of layers included
        with tempfile.TemporaryDirectory() as folder:
            config.save_pretrained(folder)
            plan = skeleton(type(config).from_pretrained(folder))
        planned = decoder_layers(plan)
    except Exception as error:  # whatever a family's config checks
        raise SimDiffError(f"{refusal}: its config cannot state the others ({one_line(error)}).") from error
    if _shapes(_outside(model, layers)) != _shapes(_outside(plan, planned)):
        raise SimDiffError(f"{refusal}: weights outside the layers depend on their number.")
    renumbering = []
    for new_idx, old_idx in enumerate(kept):
        difference = _compare(layers[old_idx], planned[new_idx], old_idx, new_idx, renumbering)
        if difference:
            raise SimDiffError(
                f"{refusal}: layer {old_idx} would be another one as layer {new_idx} ({difference})."
            )
    return config, renumbering


def layer_kinds(config: PretrainedConfig) -> tuple[int, ...]:
    """A whole number a layer, the same for layers of which the config says the same."""
    text, said = config.get_text_config(), []
    for layer_idx in range(text.num_hidden_layers):
        alone = copy.deepcopy(text)
        _cut(alone, [layer_idx])
        said.append(alone.to_dict())
    return tuple(map(said.index, said))


def _outside(model: PreTrainedModel, layers: nn.ModuleList) -> dict[str, nn.Parameter]:
    """The parameters outside the decoder layers."""
    inside = {id(p) for p in layers.parameters()}
    return {name: p for name, p in model.named_parameters() if id(p) not in inside}


def _compare(
    layer: nn.Module, planned: nn.Module, old_idx: int, new_idx: int, renumbering: Renumbering
) -> str:
    """In what the layer differs from its plan, "" for nothing; attributes that carry its index are
    collected."""
    modules, plans = dict(layer.named_modules()), dict(planned.named_modules())
    if modules.keys() != plans.keys():
        return f"has {', '.join(sorted(modules.keys() ^ plans.keys()))}"
    for path, module in modules.items():
        plan = plans[path]
        if _shapes(module._parameters) != _shapes(plan._parameters):
            return f"the weights of {path}"
        for name in module._non_persistent_buffers_set:  # computed when the model is built, in no file
            mine, other = module._buffers[name], plan._buffers.get(name)
            if mine is not None and not torch.allclose(mine.cpu().float(), other.float(), rtol=1e-2):
                return f"{path}.{name}"
        for name, value in _plain_attributes(module).items():
            new = vars(plan).get(name)
            if type(value) is int and (value, new) == (old_idx, new_idx):
                renumbering.append((module, name, new_idx))
            elif value != new:
                return f"{path}.{name} = {value} and {new}".lstrip(".")
    return ""


def _plain_attributes(module: nn.Module) -> dict[str, int | float | str | None]:
    """What a module was told about itself when it was built."""
    plain = (int, float, str, type(None))
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, plain) and name != "training" and not name.startswith("_")
    }


def _layered_configs(model: PreTrainedModel) -> list[PretrainedConfig]:
    """Every config object of the model that states its number of layers (the base model may hold its own)."""
    configs = [text_config(model), *(getattr(module, "config", None) for module in model.modules())]
    distinct = {id(config): config for config in configs if isinstance(config, PretrainedConfig)}
    n_layers = text_config(model).num_hidden_layers
    return [config for config in distinct.values() if getattr(config, "num_hidden_layers", None) == n_layers]


def _cut(config: PretrainedConfig, kept: list[int]) -> None:
    """Set the number of layers, and all that a config says layer by layer; `plan_cut` checks what comes of
    it."""
    n_layers = config.num_hidden_layers
    for name, value in list(vars(config).items()):
        if isinstance(value, (list, tuple)) and value and "token" not in name:
            indices = set(value) if all(type(item) is int for item in value) else {-1}
            if len(value) == n_layers and indices != set(range(n_layers)):  # an entry for each layer
                setattr(config, name, type(value)(value[i] for i in kept))
            elif ("layer" in name or "idx" in name) and indices <= set(range(n_layers)):  # a list of indices
                setattr(config, name, type(value)(new for new, old in enumerate(kept) if old in value))
        elif type(value) is int and "dense" in name and ("first" in name or "layers" in name):
            setattr(config, name, sum(old < value for old in kept))  # dense layers before the experts begin
    config.num_hidden_layers = len(kept)
