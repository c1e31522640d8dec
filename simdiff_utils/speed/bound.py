"""The bound: bytes and operations of a pass, counted on the modules, and the time that they take at this
machine's rates.

The roofline (Williams, Waterman, Patterson, Communications of the ACM 52(4), 2009): a pass takes no less time
than reading its bytes, and no less than computing its operations.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache, partial

import pandas as pd
import torch
from torch import nn
from transformers import PreTrainedModel

from simdiff_utils import SimDiffError
from simdiff_utils.engine.load import tower_parameters
from simdiff_utils.speed.generate import Protocol, now, prefill

_N_TRIES = 7  # of a measured rate, besides the one that warms up


@dataclass(frozen=True)
class Work:
    """What one pass has to do at least.

    Attributes:
        weight_bytes: of all weights that it reads, each once.
        kv_bytes: of the keys and values that it attends to, its own among them.
        operations: multiplications and additions of the matrices and of attention.
    """

    weight_bytes: int
    kv_bytes: int
    operations: int

    @property
    def n_bytes(self) -> int:
        """Both kinds of bytes."""
        return self.weight_bytes + self.kv_bytes


@dataclass(frozen=True)
class Rates:
    """What a machine does at its best: bytes read and operations of a matrix product, each in a second."""

    bandwidth: float
    matrix_rate: float
    device: str
    n_threads: int


def _parameters_read(model: PreTrainedModel) -> list[nn.Parameter]:
    """All parameters that a step reads, each once: a matrix tied to the head is the head. Embeddings that are
    not the head (untied input, learned positions) count nothing: a step looks up one row of them. Nor do
    towers, which text does not reach."""
    head = model.get_output_embeddings().weight
    rows = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)} - {id(head)}
    towers = tower_parameters(model)
    return [p for p in model.parameters() if id(p) not in rows and p not in towers]


def _share_read(model: PreTrainedModel, parameter: nn.Parameter, n_tokens: int) -> float:
    """1, but of a layer's experts (one tensor in transformers) the share that even routing sends some token
    to."""
    if parameter.dim() < 3:
        return 1.0
    chosen = getattr(model.config.get_text_config(), "num_experts_per_tok", None)
    if not chosen:
        raise SimDiffError(
            f"{type(model).__name__} has experts, and its config does not say num_experts_per_tok: its "
            "bound cannot be counted."
        )
    return 1 - (1 - chosen / parameter.shape[0]) ** n_tokens


def count_pass(model: PreTrainedModel, *, batch_size: int, n_tokens: int, n_cached: int = 0) -> Work:
    """Work of one pass over `n_tokens` new tokens of each sequence behind `n_cached` cached ones.

    The head works for the last token alone. Keys and values are counted by the model's own cache: grouped
    heads as they are stored, a sliding layer no further back than its window. Experts count as even routing
    would call them.

    Args:
        model: on any device; on the meta device a dense model of any size takes no memory.

    Raises:
        SimDiffError: experts, and no word in the config of how many a token is sent to; a model without a KV
            cache, or with states beside it.
    """
    _, cache = prefill(model, torch.zeros(1, 1, dtype=torch.long, device=model.device))
    read = _parameters_read(model)
    n_weights = sum(p.numel() * _share_read(model, p, batch_size * n_tokens) for p in read)
    n_head = model.get_output_embeddings().weight.numel()
    n_multiplied = sum(p.numel() * _share_read(model, p, 1) for p in read if p.dim() > 1) - n_head
    n_heads, total = model.config.get_text_config().num_attention_heads, n_cached + n_tokens
    kv_numbers = n_pairs_by_width = 0
    for layer in cache.layers:
        window = getattr(layer, "sliding_window", None) or total
        per_token = sum(states[0, :, 0].numel() for states in (layer.keys, layer.values))
        kv_numbers += per_token * min(total, window + n_tokens - 1)
        n_pairs = sum(min(position + 1, window) for position in range(n_cached, total))
        n_pairs_by_width += n_pairs * (layer.keys.shape[-1] + layer.values.shape[-1])
    itemsize = model.dtype.itemsize
    return Work(
        weight_bytes=round(itemsize * n_weights),
        kv_bytes=itemsize * batch_size * kv_numbers,
        operations=round(2 * batch_size * (n_tokens * n_multiplied + n_head + n_heads * n_pairs_by_width)),
    )


def bound_phases(model: PreTrainedModel, protocol: Protocol, rates: Rates) -> pd.DataFrame:
    """Work of each phase of a protocol, and the time that it takes at least.

    Returns:
        one row per phase: phase, batch_size, weight_bytes, kv_bytes, operations (of one pass; of decode the
        pass in the middle, since its work grows by the same amount from pass to pass), n_passes,
        ideal_seconds (of all passes).
    """
    passes = {"prefill": (protocol.prompt_len, 0, 1)}  # n_tokens, n_cached, n_passes
    if protocol.n_new_tokens:
        middle = protocol.prompt_len + protocol.n_new_tokens // 2
        passes[protocol.decode_phase] = (1, middle, protocol.n_new_tokens)
    rows = []
    for phase, (n_tokens, n_cached, n_passes) in passes.items():
        work = count_pass(model, batch_size=protocol.batch_size, n_tokens=n_tokens, n_cached=n_cached)
        row = {"phase": phase, "batch_size": protocol.batch_size, **asdict(work), "n_passes": n_passes}
        rows.append(row | {"ideal_seconds": n_passes * ideal_seconds(work, rates)})
    return pd.DataFrame(rows)


def ideal_seconds(work: Work, rates: Rates) -> float:
    """Seconds of a pass at the machine's rates: the longer of reading and computing."""
    return max(work.n_bytes / rates.bandwidth, work.operations / rates.matrix_rate)


@cache  # the machine stays what it is
@torch.inference_mode()
def measure_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """Best of several: a matrix-vector product (reads every byte once) and a square matrix product in
    `dtype`."""
    on_gpu = device.type == "cuda"
    n_rows, side = (2**16, 8192) if on_gpu else (2**14, 2048)
    vector = torch.ones(2**13, device=device)
    matrix = torch.ones(n_rows, len(vector), device=device)  # beyond any cache
    bandwidth = matrix.nbytes / _best_seconds(partial(torch.mv, matrix, vector), device)
    del matrix
    square = torch.ones(side, side, device=device, dtype=dtype)
    matrix_rate = 2 * side**3 / _best_seconds(partial(torch.mm, square, square), device)
    name = torch.cuda.get_device_name(device) if on_gpu else "CPU"
    return Rates(bandwidth, matrix_rate, name, torch.get_num_threads())


def _best_seconds(compute: Callable[[], object], device: torch.device) -> float:
    seconds = []
    for _ in range(_N_TRIES + 1):
        started = now(device)
        compute()
        seconds.append(now(device) - started)
    return min(seconds[1:])
