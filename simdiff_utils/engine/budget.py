"""A memory budget: whether a model fits in memory, is streamed from disk, or cannot be run at all."""

from math import ceil
from pathlib import Path

import psutil
import torch

from simdiff_utils import SimDiffError
from simdiff_utils.engine.load import read_config
from simdiff_utils.engine.stored import StoredWeights
from simdiff_utils.engine.weights import skeleton

_GIB = 2**30
_LIMITS = (  # of a container or a batch system, which may allow less than the machine has
    ("memory.max", "memory.current"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
)


def plan_states_room(folder: Path, dtype: torch.dtype, memory_gib: float, n_tokens: int) -> float | None:
    """Decide from the sizes alone how a checkpoint is run; no weight is read.

    Args:
        folder: checkpoint in safetensors.
        dtype: of the weights in memory.
        memory_gib: the budget; 0: what is free now (on a GPU: its free memory, that of all where there are
            several).
        n_tokens: tokens of one forward pass.

    Returns:
        None where the whole model fits; else it is streamed, and this many bytes of hidden states may be in
        memory meanwhile.

    Raises:
        SimDiffError: the budget is too small even for streaming; the sentence says what would do.
    """
    on_gpu = torch.cuda.is_available()
    used = 0 if on_gpu else psutil.Process().memory_info().rss
    budget = memory_gib * _GIB or used + free_memory()
    model = skeleton(read_config(folder), dtype)
    stored = StoredWeights(folder, model)
    work = _workspace(model.config.get_text_config(), n_tokens)

    def n_bytes(names: list[str]) -> int:
        read = sum(stored.tensors[name].n_bytes for name in names)
        cast = sum(stored.tensors[name].n_parameters for name in names) * dtype.itemsize
        return cast if read == cast else read + cast  # another dtype: a copy is made while the file is open

    if used + n_bytes(list(stored.tensors)) + work <= budget:
        return None
    layer = 2 * max(map(n_bytes, stored.layers))  # twice: experts are merged into one tensor in a copy
    streamed = used + n_bytes(stored.rest) + layer + work
    if streamed > budget:
        raise SimDiffError(
            f"{budget / _GIB:.1f} GiB of memory are too little for {folder.name}: streamed layer by "
            f"layer it needs {ceil(streamed / _GIB * 10) / 10} GiB (memory_gib), "
            "less with a smaller batch_size or seq_len."
        )
    return psutil.virtual_memory().available / 2 if on_gpu else budget - streamed


def free_memory() -> int:
    """Bytes that are free now: of the GPUs where there are any, else of the machine or of its container."""
    if torch.cuda.is_available():
        return sum(torch.cuda.mem_get_info(device)[0] for device in range(torch.cuda.device_count()))
    free, group = psutil.virtual_memory().available, Path("/sys/fs/cgroup")
    for limit, current in _LIMITS:
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
    logits = 2 * 256 * config.vocab_size  # of two chunks, see `logits_in_chunks`
    libraries = _GIB // 8  # what they keep to themselves
    return 4 * (activations + logits) + libraries  # float32 at most
