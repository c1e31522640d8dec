"""The annotated paper, Eq. 2 to 4 of SimDiff (arXiv:2604.19520): what a layer does to each token.

H is the residual stream [tokens, d].
"""

import torch
from torch import Tensor

from simdiff_utils import SimDiffError


def measure_tokens(h_in: Tensor, h_out: Tensor) -> Tensor:
    """The measurements of one layer for every token, before averaging: the three of SimDiff, and one of ours.

    Eq. 2, cosine distance 1 - cos(H(i), H(i+1)), computed from the update by the law of cosines: for nearly
    parallel states 1 - cos would lose all its digits. It is ShortGPT's Block Influence.
    Eq. 3, squared L2 norm over d of the update H(i+1) - H(i) (a sum over d, not a mean).
    Eq. 4, mean over d of the absolute update.
    Ours: relative update, |H(i+1) - H(i)| / |H(i)|, which a model's scale does not change.

    Args:
        h_in: residual stream entering the layer, [..., d], any float dtype.
        h_out: the same after the layer, before any final norm, [..., d].

    Returns:
        float32 [4, ...]: cosine distance in [0, 2] (0 for an identity layer), squared update, absolute
        update, relative update (0 where the state is).
        A non-finite state gives non-finite values: the caller names the layer.

    Raises:
        SimDiffError: the shapes differ.
    """
    if h_in.shape != h_out.shape:
        raise SimDiffError(
            f"a layer turned states of shape {tuple(h_in.shape)} into {tuple(h_out.shape)}; "
            "depth pruning needs layers that keep the shape."
        )
    update = h_out.float() - h_in.float()
    length, before, after = (
        torch.linalg.vector_norm(h, dim=-1, dtype=torch.float32) for h in (update, h_in, h_out)
    )
    mssd = length.square()
    turned = mssd - (after - before).square()  # = 2 |H(i)| |H(i+1)| (1 - cos)
    cosine_distance = turned.clamp(min=0) / (2 * before * after).clamp(min=torch.finfo(torch.float32).tiny)
    relative = torch.where(
        before > 0, length / before, 0
    )  # a state that is exactly 0 has no size to compare with
    return torch.stack([cosine_distance, mssd, update.abs_().mean(-1), relative])
