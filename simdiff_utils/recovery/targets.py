"""What a repair aims at: the dense model's states behind each cut, and how far from them others are."""

import torch
from torch import Tensor

from simdiff_utils import SimDiffError
from simdiff_utils.engine.decoder import Decoder


def dense_states(dense: Decoder, ends: set[int], blocks: Tensor, batch_size: int) -> dict[int, list[Tensor]]:
    """The dense states [batch, seq, d] after some layers, a list of batches each; no layer behind them is
    run."""
    states = {layer_idx: [] for layer_idx in ends}

    def observe(layer_idx: int, _before: Tensor, after: Tensor) -> None:
        if layer_idx in ends:
            states[layer_idx].append(after.cpu())

    behind = frozenset(range(max(ends) + 1, dense.n_layers))
    for _ in dense.run(blocks, batch_size, (behind,), observe, "dense states"):
        pass
    return states


def relative(target: Tensor, after: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Dense and healed states over the norm of the dense ones, float64 [tokens, d], and that norm [tokens,
    1].

    Raises:
        SimDiffError: a state is not finite.
    """
    t, h = (states.flatten(0, 1).double() for states in (target.to(after.device), after))
    if not (torch.isfinite(t).all() and torch.isfinite(h).all()):
        raise SimDiffError(
            f'the states at a cut are not finite in {after.dtype}; run with dtype="float32", or '
            '"bfloat16" where float16 overflows.'
        )
    size = t.norm(dim=-1, keepdim=True).clamp_min(1e-30)
    return t / size, h / size, size
