"""The linear repair: a least-squares change of the map that writes last before a cut (after ReplaceMe).

After ReplaceMe, arXiv:2505.02819. The layer before the cut leaves h = r + W u, where u is what its last
linear map reads; t is the dense state after the cut. W becomes W + D, with D of least sum over tokens of
|t - h - D u|^2 / |t|^2 + ridge |D|^2. The weights 1 / |t|^2, because norms follow: the few tokens whose
states are a hundred times larger would decide otherwise. ReplaceMe's D = (M - 1) W, with M [d, d], is a
special case, which wins back less. Where a norm writes last (Gemma3, OLMo2), a number per channel is fitted
in the same way, into its weight. Behind a cut that takes the last layer stands the head, for which nearer
states may be worse ones: there a fit stays only if predictions come nearer to the dense model's, too.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from simdiff_utils.engine.decoder import Decoder, Through
from simdiff_utils.engine.logits import logits_in_chunks
from simdiff_utils.recovery.targets import relative
from simdiff_utils.recovery.writers import Writer, find_writers, hooked

STRENGTHS = (1e-6, 1e-4, 1e-2, 0.1, 0.3, 1.0, 3.0, 10.0)  # of the ridge, in mean squares of a feature
_NO_WRITER = "Left as it is: what writes last to the residual stream is no linear map and no norm."
_NO_GAIN = "Left as it is: what fits one part of the text does not fit the part held out."
_NO_BETTER_WORDS = (
    "Left as it is: states come nearer to the dense model's, but what the head makes of them does not."
)


class LinearRepair:
    """Fits D at a cut.

    Args:
        decoder: the pruned model, for its head.
        n_fit: blocks of text that D is fitted on; the strength of the ridge is chosen on those after them.
    """

    def __init__(self, decoder: Decoder, n_fit: int) -> None:
        self._decoder, self._n_fit = decoder, n_fit

    def heal(self, layer_idx: int, layer: nn.Module, through: Through, targets: list[Tensor]) -> dict:
        """Fit D with every strength, take the one that is best on the blocks held out, and fit on all."""
        writer = next((w for w in find_writers(layer, through, hold=False) if w.adjustable), None)
        if not writer:
            return {"note": _NO_WRITER}

        # What one pass says of the error before and of D, on the blocks fitted and on those held out.
        fitted, held_out, error, n_tokens = self._measure(writer, through, targets)
        row = {"error_before": error / n_tokens, "error_after": error / n_tokens}
        gains = {strength: held_out.gain(fitted.solve(strength)) for strength in STRENGTHS}
        strength = max(gains, key=gains.get)
        if gains[strength] <= 0:
            return row | {"note": _NO_GAIN}

        # Before the head, predictions on the blocks held out decide, so their states of now are kept.
        before_head = layer_idx == self._decoder.n_layers - 1
        batches = self._batches(through, targets) if before_head else ()
        unhealed = [after[first:] for after, _, first in batches]
        weights = [parameter.clone() for parameter in writer.module.parameters()]
        writer.add((fitted + held_out).solve(strength))

        error = nearer = 0.0
        for n, (after, target, first) in enumerate(self._batches(through, targets)):
            t, h, _ = relative(target, after)
            error += (t - h).square().sum().item()
            if before_head:
                nearer += _nearer(self._decoder, unhealed[n], after[first:], target[first:])
        if before_head and nearer <= 0:
            for parameter, value in zip(writer.module.parameters(), weights, strict=True):
                parameter.copy_(value)
            return row | {"note": _NO_BETTER_WORDS}
        changed = {"layer_idx": layer_idx, "target": writer.name, "strength": strength}
        return row | changed | {"error_after": error / n_tokens}

    def _batches(self, through: Through, targets: list[Tensor]) -> Iterator[tuple[Tensor, Tensor, int]]:
        """Of every batch the states [batch, seq, d], the dense ones, and the first of its blocks held
        out."""
        n_left = self._n_fit
        for (_, after), target in zip(through(), targets, strict=True):
            yield after, target, min(max(n_left, 0), len(after))
            n_left -= len(after)

    def _measure(
        self, writer: Writer, through: Through, targets: list[Tensor]
    ) -> tuple["_Equations", "_Equations", float, int]:
        """The equations of D on the blocks fitted and on those held out, the sum of |t - h|^2 / |t|^2, and
        over how many tokens."""
        fitted, held_out = _Equations(), _Equations()
        error, n_tokens, given = 0.0, 0, []
        with hooked([writer.module], lambda _module, args, _output: given.append(args[0])):
            for after, target, first in self._batches(through, targets):
                t, h, size = relative(target, after)
                x = writer.features(given[0]).to(size.device) / size
                given.clear()
                n_first = first * after.shape[1]  # tokens before the first block held out
                fitted.add(x[:n_first], (t - h)[:n_first], writer.per_channel)
                held_out.add(x[n_first:], (t - h)[n_first:], writer.per_channel)
                error += (t - h).square().sum().item()
                n_tokens += len(t)
        return fitted, held_out, error, n_tokens


@dataclass
class _Equations:
    """The normal equations of D, where x are features and e is what is missing.

    Attributes:
        gram: sum over tokens of x x^T, [f, f]; per channel of x^2, [d].
        cross: of x e^T, [f, d]; per channel of x e, [d].
    """

    gram: Tensor | float = 0.0
    cross: Tensor | float = 0.0

    def add(self, x: Tensor, error: Tensor, per_channel: bool) -> None:
        """More tokens: x [tokens, f], error [tokens, d]."""
        self.gram += (x * x).sum(0) if per_channel else x.T @ x
        self.cross += (x * error).sum(0) if per_channel else x.T @ error

    def __add__(self, other: "_Equations") -> "_Equations":
        return _Equations(self.gram + other.gram, self.cross + other.cross)

    def solve(self, strength: float) -> Tensor:
        """D, [f, d] or [d], of least sum |e - D x|^2 + ridge |D|^2; the ridge is `strength` times the mean
        square of x."""
        regular = self.gram.clone()
        squares = regular if regular.dim() == 1 else regular.diagonal()
        squares += (strength * squares.mean()).clamp_min(1e-30)
        if regular.dim() == 1:
            return self.cross / regular
        return torch.cholesky_solve(self.cross, torch.linalg.cholesky(regular))

    def gain(self, change: Tensor) -> float:
        """By how much D lowers sum |e - D x|^2."""
        squares = self.gram * change if self.gram.dim() == 1 else self.gram @ change
        return (change * (2 * self.cross - squares)).sum().item()


def _nearer(decoder: Decoder, before: Tensor, after: Tensor, target: Tensor) -> float:
    """By how much the KL divergence from the dense model's next-token distributions falls, summed over
    tokens, in nats.

    Args:
        before, after, target: states behind the last layer, unhealed, healed and dense, [batch, seq, d].
    """
    fallen = 0.0
    states = (part.to(before).flatten(0, 1) for part in (before, after, target))
    for chunk in zip(*(logits_in_chunks(decoder, part) for part in states), strict=True):
        unhealed, healed, dense = (logits.float().log_softmax(-1) for (logits,) in chunk)
        fallen += (dense.exp() * (healed - unhealed)).sum().item()
    return fallen
