"""The annotated paper: Eq. 2 to 9 of SimDiff (arXiv:2604.19520) as pure functions.

Symbols as in the paper: H is the residual stream [tokens, d], L_sim and L_diff are raw measurements of a layer,
I_sim and I_diff their normalised forms, I the fused importance. Small importance: the layer is removed first.
"""

import numpy as np
import torch
from torch import Tensor

from simdiff_utils.settings import SimDiffError


def measure_tokens(h_in: Tensor, h_out: Tensor) -> Tensor:
    """The three measurements of SimDiff for every token of one layer, before averaging.

    Eq. 2, cosine distance 1 - cos(H(i), H(i+1)), computed from the update by the law of cosines: for nearly parallel
    states 1 - cos would lose all its digits. It is ShortGPT's Block Influence.
    Eq. 3, squared L2 norm over d of the update H(i+1) - H(i) (a sum over d, not a mean).
    Eq. 4, mean over d of the absolute update.

    Args:
        h_in: residual stream entering the layer, [..., d], any float dtype.
        h_out: the same after the layer, before any final norm, [..., d].

    Returns:
        float32 [3, ...]: cosine distance in [0, 2] (0 for an identity layer), squared update, absolute update.
        A non-finite state gives non-finite values: the caller names the layer.

    Raises:
        SimDiffError: the shapes differ.
    """
    if h_in.shape != h_out.shape:
        raise SimDiffError(f"a layer turned states of shape {tuple(h_in.shape)} into {tuple(h_out.shape)}; "
                           "depth pruning needs layers that keep the shape.")
    update = h_out.float() - h_in.float()
    length, before, after = (torch.linalg.vector_norm(h, dim=-1, dtype=torch.float32) for h in (update, h_in, h_out))
    mssd = length.square()
    turned = mssd - (after - before).square()  # = 2 |H(i)| |H(i+1)| (1 - cos)
    cosine_distance = turned.clamp(min=0) / (2 * before * after).clamp(min=torch.finfo(torch.float32).tiny)
    return torch.stack([cosine_distance, mssd, update.abs_().mean(-1)])


def normalise_difference(l_diff: np.ndarray) -> np.ndarray:
    """I_diff = sigmoid(L_diff), Eq. 5: L_diff >= 0, so I_diff lies in [0.5, 1].

    In float64 the sigmoid is exactly 1 above about 36.8: a large L_diff no longer tells layers apart.
    """
    return 1 / (1 + np.exp(-np.asarray(l_diff, dtype=np.float64)))


def normalise_similarity(l_sim: np.ndarray) -> np.ndarray:
    """I_sim = L_sim / 2, Eq. 6, in [0, 1]."""
    return np.asarray(l_sim, dtype=np.float64) / 2


def fuse(l_sim: np.ndarray, l_diff: np.ndarray, alpha: float) -> np.ndarray:
    """I = alpha * I_diff + (1 - alpha) * I_sim, Eq. 7: one importance per layer, float64 [n_layers]."""
    if not 0 <= alpha <= 1:
        raise SimDiffError(f"alpha must lie in [0, 1], got {alpha}.")
    return alpha * normalise_difference(l_diff) + (1 - alpha) * normalise_similarity(l_sim)


def choose_removed(importance: np.ndarray, n_remove: int) -> frozenset[int]:
    """The n_remove layers of smallest importance, Eq. 8 and 9 (Algorithm 2); ties go to the earlier layer."""
    order = np.argsort(importance, kind="stable")
    return frozenset(int(layer_idx) for layer_idx in order[:n_remove])


def count_saturated(l_diff: np.ndarray) -> int:
    """How many I_diff are exactly 1 in float64: where all are, SimDiff ranks by cosine distance alone."""
    return int((normalise_difference(l_diff) == 1).sum())
