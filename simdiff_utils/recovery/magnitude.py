"""The magnitude repair: states behind a cut get the dense model's size (after Prune&Comp, arXiv:2507.18212).

The states after the cut are to be s times as large, s = mean of |t| / |h| over tokens; the paper's mean over
channels is at the mercy of a few. The paper multiplies all that writes before the cut by s, the embedding
too, which a tied head forbids. Layers that ignore the scale of what they read make the same model of 1 / s on
all that writes after the cut: that is done.
"""

from torch import Tensor, nn

from simdiff_utils.engine.decoder import Decoder, Through
from simdiff_utils.recovery.targets import relative
from simdiff_utils.recovery.writers import Writer, difference, find_writers, ignores_scale

_NOTHING_AFTER = "Left as it is: no layer stands after the cut, and the final norm ignores scale."
_NOT_SCALABLE = (
    "Left as it is: what a later layer writes depends on the scale of what it reads, or is no "
    "linear map's and no norm's."
)


class MagnitudeRepair:
    """Scales all that writes after a cut. The stream is then too small there, `_factor` times, and nothing
    sees it."""

    def __init__(self, decoder: Decoder, start: int, block: Tensor) -> None:
        """Find what writes in each layer from `start` on; None for a layer that cannot be scaled by it.

        Args:
            block: token ids [1, seq_len] to try it on.
        """
        self._factor = 1.0
        self._writers: dict[int, list[Writer] | None] = {}

        def look(layer_idx: int, layer: nn.Module, through: Through) -> None:
            if layer_idx >= start:
                writers = find_writers(layer, through, hold=True)
                adjustable = all(writer.adjustable for writer in writers)
                scalable = adjustable and ignores_scale(layer, through, writers)
                self._writers[layer_idx] = writers if scalable else None

        for _, _, states in decoder.run(block, 1, desc="what writes", revise=look):
            logits, of_twice = decoder.logits(states[:, :8]), decoder.logits(2 * states[:, :8])
            if difference(of_twice, logits) > 0.05:  # no final norm
                self._writers = dict.fromkeys(self._writers)

    def heal(self, layer_idx: int, _layer: nn.Module, through: Through, targets: list[Tensor]) -> dict:
        """Learn s behind this layer, and scale all that is written later."""
        later = {place: writers for place, writers in self._writers.items() if place > layer_idx}
        if not later:
            return {"note": _NOTHING_AFTER}
        if None in later.values():
            return {"note": _NOT_SCALABLE}

        # Sums over tokens, where t and h are over the norm of t: of 1 / |h|, |h|^2 and t h.
        ratios = products = squares = n_tokens = 0
        for (_, after), target in zip(through(), targets, strict=True):
            t, h, _ = relative(target, after)
            square = h.square().sum(-1)
            ratios += square.rsqrt().sum().item()
            squares += square.sum().item()
            products += (t * h).sum().item()
            n_tokens += len(t)

        # What stands in the model is the stream over the factor of the cuts before: only the rest is new.
        before, self._factor = self._factor, ratios / n_tokens
        for writers in later.values():
            for writer in writers:
                writer.scale(before / self._factor)

        def error(factor: float) -> float:
            return 1 + (factor**2 * squares - 2 * factor * products) / n_tokens

        return {
            "layer_idx": min(later),
            "target": "all that writes to the residual stream from this layer on",
            "strength": self._factor / before,
            "error_before": error(before),
            "error_after": error(self._factor),
        }
