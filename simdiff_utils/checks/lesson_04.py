"""Exercises of notebook 04: the repair, one adapter, and what share came back."""

import numpy as np
import torch
from torch import Tensor

from simdiff_utils.checks import Exercise

_DRAW = torch.Generator().manual_seed(0)
_U = torch.randn(12, 3, generator=_DRAW, dtype=torch.float64)  # inputs of the down projection, 12 tokens
_GAP = torch.randn(12, 2, generator=_DRAW, dtype=torch.float64)  # what is missing behind the cut, t - h


def _ridge(u: Tensor, gap: Tensor, strength: float) -> Tensor:
    width = u.shape[1]
    return torch.linalg.solve(u.T @ u + strength * torch.eye(width, dtype=u.dtype), u.T @ gap).T


# C [out, in] that minimises the sum over tokens of |gap - C u|^2 + strength |C|^2
least_squares = Exercise(
    right=_ridge,
    cases=[(_U, _GAP, 0.5), (_U, _GAP, 0.0)],
    mistakes=[
        (lambda u, g, s: _ridge(u, g, s).T, "C is transposed: it maps inputs to outputs, [out, in]."),
        (
            lambda u, g, s: _ridge(u, g, 0.0),
            "the strength is missing: without it a small sample is fitted too well.",
        ),
        (
            lambda u, g, s: torch.linalg.solve(u.T @ u + s, u.T @ g).T,
            "the strength belongs on the diagonal only, times the identity.",
        ),
        (lambda u, g, s: -_ridge(u, g, s), "the sign is turned: C has to add what is missing."),
        (lambda u, g, s: (u.T @ g).T, "this is u'gap alone; divide by u'u (torch.linalg.solve)."),
    ],
)

_X = torch.tensor([[1.0, 2.0, 3.0], [0.5, -1.0, 4.0]])  # two tokens
_W = torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, -1.0]])
_A = torch.tensor([[0.5, 0.5, 0.0], [1.0, -1.0, 2.0]])  # rank 2
_B = torch.tensor([[1.0, 0.5], [-2.0, 1.0]])

# the output of a linear layer W with an adapter: A [rank, in], B [out, rank], scale
lora_forward = Exercise(
    right=lambda x, w, a, b, scale: x @ w.T + scale * (x @ a.T @ b.T),
    cases=[(_X, _W, _A + 1, _B, 2.0), (2 * _X, _W, _A + 1, _B, 0.5)],
    mistakes=[
        (
            lambda x, w, a, b, s: s * (x @ a.T @ b.T),
            "the frozen layer is missing: the adapter is added to it.",
        ),
        (lambda x, w, a, b, s: x @ w.T + x @ a.T @ b.T, "the scale is missing."),
        (lambda x, w, a, b, s: s * (x @ w.T + x @ a.T @ b.T), "the scale belongs to the adapter alone."),
        (lambda x, w, a, b, s: x @ w.T - s * (x @ a.T @ b.T), "the adapter is subtracted; it is added."),
        (
            lambda x, w, a, b, s: x @ w.T + s / len(a) * (x @ a.T @ b.T),
            "`scale` is divided by the rank already.",
        ),
    ],
    why="B begins with zeros: at first the layer is unchanged.",
)


def _share(dense: float, pruned: float, healed: float) -> float:
    return float(1 - np.log(healed / dense) / np.log(pruned / dense))


# of perplexities: how much of the lost log-perplexity is won back?
share_won_back = Exercise(
    right=_share,
    cases=[(20.0, 60.0, 30.0), (20.0, 60.0, 60.0), (20.0, 60.0, 20.0)],
    mistakes=[
        (lambda d, p, h: 1 - _share(d, p, h), "this is the share that is still lost; 1 minus it came back."),
        (
            lambda d, p, h: (p - h) / (p - d),
            "take logarithms: from 40 to 20 is as large a step as from 1,000 to 500.",
        ),
        (
            lambda d, p, h: float(1 - np.log(h / d)),
            "this compares with the dense model only; what was lost by pruning goes below the line.",
        ),
        (
            lambda d, p, h: float(np.log(p / h)),
            "this came back; divide it by what was lost, log(pruned / dense).",
        ),
        (
            lambda d, p, h: float(np.log(h / d)),
            "this is still lost; divide it by what was lost, and take 1 minus that.",
        ),
    ],
)
