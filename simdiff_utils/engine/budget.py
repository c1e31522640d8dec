"""A memory budget: whether a model fits in memory, is streamed from disk, or cannot be run at all."""

from dataclasses import dataclass
from math import ceil
from pathlib import Path

import psutil
import torch
from transformers import AutoConfig

from simdiff_utils import SimDiffError
from simdiff_utils.engine.weights import StoredWeights, skeleton

_GIB = 2**30


@dataclass(frozen=True)
class MemoryPlan:
    """How a checkpoint is run under a budget.

    Attributes:
        streamed: layer by layer from disk; else the whole model is in memory.
        states_room: bytes that hidden states may take while streaming; what is more is kept on disk.
        needed: bytes estimated for the way chosen, this process included (on a GPU: of the GPU's memory).
    """

    streamed: bool
    states_room: float
    needed: int


def plan_memory(folder: Path, dtype: torch.dtype, memory_gib: float, n_tokens: int) -> MemoryPlan:
    """Decide from the sizes alone; no weight is read.

    Args:
        folder: checkpoint in safetensors.
        dtype: of the weights in memory.
        memory_gib: the budget; 0: what is free now (on a GPU: its free memory, that of all where there are
            several).
        n_tokens: tokens of one forward pass.

    Raises:
        SimDiffError: the budget is too small even for streaming; the sentence says what would do.
    """
    on_gpu = torch.cuda.is_available()
    used = 0 if on_gpu else psutil.Process().memory_info().rss
    budget = memory_gib * _GIB or used + _free_memory(on_gpu)
    model = skeleton(AutoConfig.from_pretrained(folder), dtype)
    stored = StoredWeights(folder, model)
    work = _workspace(model.config.get_text_config(), n_tokens)

    def n_bytes(names: list[str]) -> int:
        read = sum(stored.tensors[name].n_bytes for name in names)
        cast = sum(stored.tensors[name].n_parameters for name in names) * dtype.itemsize
        return (
            cast if read == cast else read + cast
        )  # in another dtype, a copy is made while the file is open

    whole = used + n_bytes(list(stored.tensors)) + work
    if whole <= budget:
        return MemoryPlan(False, float("inf"), whole)
    layer = max(map(n_bytes, stored.layers))
    streamed = (
        used + n_bytes(stored.rest) + 2 * layer + work
    )  # twice: experts are merged into one tensor in a copy
    if streamed > budget:
        raise SimDiffError(
            f"{budget / _GIB:.1f} GiB of memory are too little for {folder.name}: streamed layer by "
            f"layer it needs {ceil(streamed / _GIB * 10) / 10} GiB (memory_gib), "
            "less with a smaller batch_size or seq_len."
        )
    room = psutil.virtual_memory().available / 2 if on_gpu else budget - streamed
    return MemoryPlan(True, room, streamed)


def _free_memory(on_gpu: bool) -> int:
    if on_gpu:
        return sum(torch.cuda.mem_get_info(device)[0] for device in range(torch.cuda.device_count()))
    free = psutil.virtual_memory().available
    group = Path("/sys/fs/cgroup")  # a container or a batch system may allow less than the machine has
    for limit, current in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            free = min(free, int((group / limit).read_text()) - int((group / current).read_text()))
        except (OSError, ValueError):  # no such group, or "max": no limit
            continue
    return max(free, 0)


def _workspace(config: object, n_tokens: int) -> int:
    """Bytes of what lives beside weights and kept states: a layer's activations, the logits of some
    positions."""
    width, inner = config.hidden_size, getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    inner = max(inner) if isinstance(inner, (list, tuple)) else inner
    activations = n_tokens * (8 * width + 3 * inner)
    logits = 2 * 256 * config.vocab_size
    return (
        4 * (activations + logits) + _GIB // 8
    )  # float32 at most; the rest for what libraries keep to themselves
