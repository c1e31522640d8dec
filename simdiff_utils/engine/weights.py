"""Weights on disk: where each tensor of a checkpoint lies, and one layer at a time brought into a model and
out."""

import copy
import json
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig, LoadStateDictInfo
from transformers.utils import logging

from simdiff_utils import SimDiffError
from simdiff_utils.engine.load import decoder_layers, pick_device


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a safetensors file: its dtype and shape as the header states them, and its bytes in the
    file."""

    file: Path
    dtype: str
    shape: list[int]
    start: int
    end: int

    @property
    def n_bytes(self) -> int:
        """Bytes in the file."""
        return self.end - self.start

    @property
    def n_parameters(self) -> int:
        """Product of the shape."""
        return prod(self.shape)


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Every tensor of a safetensors file by name, in the file's order; nothing but the header is read."""
    try:
        with file.open("rb") as opened:
            n_bytes = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(n_bytes))
        header.pop("__metadata__", None)
        ordered = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
        found = {
            name: StoredTensor(
                file,
                entry["dtype"],
                entry["shape"],
                *(8 + n_bytes + offset for offset in entry["data_offsets"]),
            )
            for name, entry in ordered
        }
    except (ValueError, KeyError, TypeError, MemoryError, OverflowError) as error:
        raise SimDiffError(
            f"{file.name} in {file.parent.name} is no safetensors file; fetch it again."
        ) from error
    if max((tensor.end for tensor in found.values()), default=0) > file.stat().st_size:
        raise SimDiffError(f"{file.name} in {file.parent.name} is cut short; fetch it again.")
    return found


class StoredWeights:
    """The tensors of a checkpoint folder, told apart by the decoder layer they belong to.

    Attributes:
        tensors: name -> where it lies, all files together.
        layers: for each layer, the names of its tensors.
        rest: the names of all others: embeddings, final norm, head.
    """

    def __init__(self, folder: Path, model: PreTrainedModel) -> None:
        """Read the headers.

        Args:
            model: of this checkpoint; its weights may be on the meta device.

        Raises:
            SimDiffError: a file is damaged, or the tensors' names do not tell the layers apart.
        """
        layers = decoder_layers(model)
        path = next(name for name, module in model.named_modules() if module is layers)
        self.tensors = {
            name: tensor for file in weight_files(folder) for name, tensor in read_header(file).items()
        }
        pattern = re.compile(rf"((?:.*?\.)?{re.escape(path.rpartition('.')[2])}\.)(\d+)(\..+)")
        found = {name: match for name in self.tensors if (match := pattern.fullmatch(name))}
        prefix = _decoder_prefix([match.groups() for match in found.values()], path, len(layers), folder)
        self._found = {name: match for name, match in found.items() if match[1] == prefix}
        self.layers = [[] for _ in layers]
        self.rest = [name for name in self.tensors if name not in self._found]
        for name, match in self._found.items():
            if int(match[2]) < len(layers):  # files may hold more, such as a multi-token prediction layer
                self.layers[int(match[2])].append(name)

    def rename(self, name: str, new_idx: dict[int, int]) -> str:
        """The tensor's name once its layer has a new index; names outside the layers stay."""
        match = self._found.get(name)
        return f"{match[1]}{new_idx[int(match[2])]}{match[3]}" if match else name


def _decoder_prefix(found: list[tuple[str, str, str]], path: str, n_layers: int, folder: Path) -> str:
    """What stands before a decoder layer's index. A vision tower has layers too; and a file may leave out or
    add the first parts of the model's own path to its list of layers."""
    indices: dict[str, set[int]] = {}
    for prefix, layer_idx, _ in found:
        indices.setdefault(prefix, set()).add(int(layer_idx))
    complete = [prefix for prefix, seen in indices.items() if seen >= set(range(n_layers))]
    own = [
        prefix
        for prefix in complete
        if f".{path}.".endswith(f".{prefix}") or f".{prefix}".endswith(f".{path}.")
    ]
    if len(own or complete) != 1:
        raise SimDiffError(
            f"the weights in {folder.name} do not tell {n_layers} decoder layers apart by names like "
            f"{path}.0; save them with this transformers."
        )
    return (own or complete)[0]


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that make up the checkpoint: the only one, else those of its index, else all."""
    single = folder / "model.safetensors"
    if single.is_file():  # which transformers prefers, too, should an index be left from before
        return [single]
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = sorted(
            {folder / name for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
        )
        missing = [file.name for file in files if not file.is_file() or file.parent != folder]
        if missing:
            raise SimDiffError(f"{folder.name} lacks {missing[0]}, which its index names; fetch it again.")
        return files
    return sorted(folder.glob("*.safetensors"))


def skeleton(config, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model of a config without memory for its weights (meta device); buffers are real."""
    given = {} if dtype is None else {"dtype": dtype}  # None would be written into the config
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), **given)
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
        config = AutoConfig.from_pretrained(folder)
        if getattr(config, "quantization_config", None):
            raise SimDiffError(
                f"{folder.name} is quantised and cannot be streamed; name an unquantised checkpoint, or "
                "raise memory_gib so that the whole model fits."
            )
        self.model = skeleton(config, dtype)
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
        self.model.tie_weights(
            missing_keys=loaded.missing_keys, recompute_mapping=False
        )  # as `from_pretrained` does
        layers = {id(p) for layer in decoder_layers(self.model) for p in layer.parameters()}
        missing = [name for name, p in self.model.named_parameters() if p.is_meta and id(p) not in layers]
        if missing:
            raise SimDiffError(
                f"{folder.name} holds no weight {missing[0]}; fetch or save the checkpoint again."
            )

    @contextmanager
    def layer(self, layer_idx: int) -> Iterator[nn.Module]:
        """The layer with its weights, for as long as a `with` block lasts; the next layer is read ahead
        meanwhile."""
        layer = decoder_layers(self.model)[layer_idx]
        empty = [
            (module, name, torch.nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False))
            for module in layer.modules()
            for name, p in module._parameters.items()
            if p is not None
        ]
        self._load(self.stored.layers[layer_idx])
        unfilled = [name for name, p in layer.named_parameters() if p.is_meta]
        if unfilled:
            raise SimDiffError(
                f"the checkpoint holds no {unfilled[0]} of layer {layer_idx}; fetch or save it again."
            )
        if layer_idx + 1 < len(self.stored.layers):
            self._read_ahead(self.stored.layers[layer_idx + 1])
        try:
            yield layer
        finally:
            for module, name, parameter in empty:
                module._parameters[name] = parameter

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
        for file in {self.stored.tensors[name].file for name in names}:
            spans = [(t.start, t.end) for name in names if (t := self.stored.tensors[name]).file == file]
            start, end = min(s for s, _ in spans), max(e for _, e in spans)
            with file.open("rb") as opened:
                os.posix_fadvise(opened.fileno(), start, end - start, os.POSIX_FADV_WILLNEED)
