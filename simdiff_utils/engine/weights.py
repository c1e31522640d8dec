"""Weights that are not in memory: a model without any, and one whose layers are read one at a time."""

import copy
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig, LoadStateDictInfo
from transformers.utils import logging

from simdiff_utils.engine.load import auto_class, decoder_layers, pick_device, read_config
from simdiff_utils.engine.stored import StoredWeights
from simdiff_utils.engine.whole import check_folder, check_whole


def skeleton(config: PretrainedConfig, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model of a config without memory for its weights (meta device); buffers are real."""
    given = {} if dtype is None else {"dtype": dtype}  # None would be written into the config
    with init_empty_weights(include_buffers=False):
        model = auto_class(config).from_config(copy.deepcopy(config), **given)
    model.tie_weights()  # which the context, giving every name a tensor of its own, has undone
    return model.eval()


class StreamedWeights:
    """A model on disk: everything but the layers is in memory, the layers come and go one by one.

    transformers' own loader fills a layer, so that whatever it renames, merges or casts for a family is done
    here too.

    Attributes:
        model: on the meta device but for embeddings, final norm and head.
        stored: where the tensors lie.
    """

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        check_folder(folder)
        self._label = folder.name
        self.model = skeleton(read_config(folder), dtype)
        self.stored = StoredWeights(folder, self.model)
        device = pick_device()
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = buffer if buffer is None else buffer.to(device)
        self._config = LoadStateDictConfig(
            dtype=dtype,
            dtype_plan=self.model._get_dtype_plan(dtype),
            device_map={"": device},
            weight_mapping=get_model_conversion_mapping(self.model),
        )
        loaded = self._load(self.stored.rest)
        # as `from_pretrained` does: a matrix that the file lacks is the one it is tied to
        self.model.tie_weights(missing_keys=loaded.missing_keys, recompute_mapping=False)
        layers = {id(p) for layer in decoder_layers(self.model) for p in layer.parameters()}
        missing = [name for name, p in self.model.named_parameters() if p.is_meta and id(p) not in layers]
        self._check(loaded, missing)

    @contextmanager
    def layer(self, layer_idx: int) -> Iterator[nn.Module]:
        """The layer with its weights, for as long as a `with` block lasts; the next layer is read ahead
        meanwhile."""
        layer = decoder_layers(self.model)[layer_idx]
        empty = []  # what stands there again afterwards
        for module in layer.modules():
            for name, p in module._parameters.items():
                if p is not None:
                    without = nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False)
                    empty.append((module, name, without))
        loaded = self._load(self.stored.layers[layer_idx])
        self._check(
            loaded, [f"{name} of layer {layer_idx}" for name, p in layer.named_parameters() if p.is_meta]
        )
        if layer_idx + 1 < len(self.stored.layers):
            self._read_ahead(self.stored.layers[layer_idx + 1])
        try:
            yield layer
        finally:
            for module, name, parameter in empty:
                module._parameters[name] = parameter

    def _check(self, loaded: LoadStateDictInfo, missing: list[str]) -> None:
        """As whole as what is loaded at once: what is missing here is known, the rest transformers tells."""
        loaded.missing_keys = set()  # all that was not asked for this time: thousands of names for each layer
        self.model._adjust_missing_and_unexpected_keys(loaded)  # the family's own ignore lists
        check_whole(self.model, loaded.to_dict() | {"missing_keys": missing}, self._label)

    def _load(self, names: list[str]) -> LoadStateDictInfo:
        files = {self.stored.tensors[name].file for name in names}
        shown = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()  # a bar for every layer says nothing
        try:
            with ExitStack() as stack:
                opened = {file: stack.enter_context(safe_open(file, framework="pt")) for file in files}
                state = {name: opened[self.stored.tensors[name].file].get_slice(name) for name in names}
                return convert_and_load_state_dict_in_model(self.model, state, self._config)[0]
        finally:
            if shown:
                logging.enable_progress_bar()

    def _read_ahead(self, names: list[str]) -> None:
        """Ask the system to read the bytes into its cache while this process computes; not all systems
        can."""
        if not hasattr(os, "posix_fadvise"):
            return
        tensors = [self.stored.tensors[name] for name in names]
        for file in {tensor.file for tensor in tensors}:
            start = min(tensor.start for tensor in tensors if tensor.file == file)
            end = max(tensor.end for tensor in tensors if tensor.file == file)
            with file.open("rb") as opened:
                os.posix_fadvise(opened.fileno(), start, end - start, os.POSIX_FADV_WILLNEED)
