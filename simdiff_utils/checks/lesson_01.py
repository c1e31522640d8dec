"""Exercises of notebook 01: the three measurements, what they see, and the final norm."""

import torch
from torch import Tensor

from simdiff_utils.checks import Exercise

# two tokens of three numbers, before and after a layer
_IN = torch.tensor([[1.0, -2.0, 2.0], [3.0, 0.0, -4.0]])
_OUT = torch.tensor([[2.0, 2.0, 1.0], [3.0, 1.0, 8.0]])
_LONGER = 2 * _IN  # a layer that only lengthens
_CASES = [(_IN, _OUT), (_IN, _LONGER), (_OUT, _IN)]


def _cosine(h_in: Tensor, h_out: Tensor) -> Tensor:
    return torch.cosine_similarity(h_in, h_out, dim=-1)


cosine_distance = Exercise(
    right=lambda h_in, h_out: 1 - _cosine(h_in, h_out).mean(),
    cases=_CASES,
    mistakes=[
        (lambda a, b: _cosine(a, b).mean(), "this is the similarity; the distance is 1 minus it."),
        (lambda a, b: 1 - _cosine(a, b), "the tokens are still there: take the mean over them."),
        (
            lambda a, b: 1 - torch.cosine_similarity(a, b, dim=0).mean(),
            "the cosine runs over the wrong axis: dim=-1, the numbers of one token.",
        ),
        (
            lambda a, b: 1 - torch.cosine_similarity(a.mean(0), b.mean(0), dim=-1),
            "you took one cosine of the mean states; take the cosine of each token, then the mean.",
        ),
        (lambda a, b: 1 - _cosine(a, b).sum(), "take the mean over tokens, not the sum."),
        (lambda a, b: 1 - (a * b).sum(-1).mean(), "the vectors are not divided by their lengths."),
    ],
    why="A layer that only lengthens the state has distance 0: the angle does not see it.",
)

mssd = Exercise(
    right=lambda h_in, h_out: (h_out - h_in).square().sum(-1).mean(),
    cases=_CASES,
    mistakes=[
        (
            lambda a, b: (b - a).square().mean(),
            "you took the mean over the D numbers; Eq. 3 takes their sum, and the mean over tokens only.",
        ),
        (lambda a, b: (b - a).square().sum(-1), "the tokens are still there: take the mean over them."),
        (lambda a, b: (b - a).square().sum(), "the sum runs over tokens as well; take the mean over them."),
        (lambda a, b: (b - a).norm(dim=-1).mean(), "this is the mean length; Eq. 3 squares it."),
        (
            lambda a, b: (b - a).mean(0).square().sum(),
            "you took the mean before the square: updates of opposite sign cancel.",
        ),
        (
            lambda a, b: b.square().sum(-1).mean(),
            "this measures the state after the layer; subtract the state before it.",
        ),
    ],
)

masd = Exercise(
    right=lambda h_in, h_out: (h_out - h_in).abs().mean(),
    cases=_CASES,
    mistakes=[
        (
            lambda a, b: (b - a).abs().sum(-1).mean(),
            "this is the sum over D; Eq. 4 takes the mean over tokens and over D.",
        ),
        (
            lambda a, b: (b - a).mean().abs(),
            "you took the mean before the absolute value: plus and minus cancel.",
        ),
        (lambda a, b: (b - a).norm(dim=-1).mean(), "this is the mean length; MASD takes absolute values."),
        (lambda a, b: (b - a).mean(), "without the absolute value plus and minus cancel."),
        (
            lambda a, b: (b.abs() - a.abs()).mean(),
            "this is a difference of lengths; take the length of the difference.",
        ),
        (lambda a, b: (b - a).square().mean(), "this squares; MASD is the mean absolute value."),
    ],
)

# all hidden states times ten: what cosine distance, MSSD, MASD and relative update are multiplied by
scaled_by_ten = Exercise(
    right=(1, 100, 10, 1),
    mistakes=[
        ((10, 100, 10, 1), "the angle does not change when both vectors grow alike."),
        ((1, 10, 10, 1), "MSSD squares: ten times the update is a hundred times the square."),
        ((1, 100, 100, 1), "MASD does not square: it grows like the update itself."),
        ((1, 100, 10, 10), "the relative update divides by the state, which grows as well."),
        ((1, 1, 1, 1), "only two of the four are blind to size: the angle and the relative update."),
    ],
    why="This is why MSSD and MASD of two models cannot be compared, and why a sigmoid of them can saturate.",
)

# of the L + 1 hidden states that transformers returns, the pairs that give each layer's own input and output
clean_pairs = Exercise(
    right=lambda n_layers: [(i, i + 1) for i in range(n_layers - 1)],
    cases=[(4,), (30,)],
    mistakes=[
        (
            lambda n: [(i, i + 1) for i in range(n)],
            "the last state is taken after the final norm: the last pair mixes the norm in. Leave it out.",
        ),
        (
            lambda n: [(i, i + 1) for i in range(1, n)],
            "there are L + 1 states; the first is the embedding, the input of layer 0.",
        ),
        (
            lambda n: [(i, i) for i in range(n - 1)],
            "a layer's output is the next layer's input: the pairs are (i, i + 1).",
        ),
        (
            lambda n: [(i, i + 1) for i in range(n - 2)],
            "one pair too many is gone: only the last layer's output is normed.",
        ),
        (lambda n: [(i + 1, i) for i in range(n - 1)], "before comes first: (input, output)."),
    ],
)
