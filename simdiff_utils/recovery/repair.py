"""Repair without training: what stays of a pruned model is adjusted at each cut, from one pass of calibration
text.

Cuts are healed front to back, on the states of the model healed so far, with the dense model's as targets.

* `linear` (after ReplaceMe, arXiv:2505.02819). The layer before the cut leaves h = r + W u, where u is what
  its last linear map reads; t is the dense state after the cut. W becomes W + D, with D of least sum over
  tokens of |t - h - D u|^2 / |t|^2 + ridge |D|^2. The weights 1 / |t|^2, because norms follow: the few tokens
  whose states are a hundred times larger would decide otherwise. ReplaceMe's D = (M - 1) W, with M [d, d], is
  a special case: of the log-perplexity that SmolLM2 loses without layers 13 to 18 it wins back 27 %, where D
  wins 37 % (8,192 tokens). Where a norm writes last (Gemma3, OLMo2), a number per channel is fitted in the
  same way, into its weight. Behind a cut that takes the last layer stands the head, for which nearer states
  may be worse ones (Gemma-3-270M without its last layer: the loss grows by 0.6 nats): there a fit stays only
  if predictions come nearer to the dense model's, too.
* `magnitude` (after Prune&Comp, arXiv:2507.18212). The states after the cut are to be s times as large, s =
  mean of |t| / |h| over tokens; the paper's mean over channels is at the mercy of a few. The paper multiplies
  all that writes before the cut by s, the embedding too, which a tied head forbids. Layers that ignore the
  scale of what they read make the same model of 1 / s on all that writes after the cut: that is done.
"""

from functools import partial

import pandas as pd
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from simdiff_utils import SimDiffError
from simdiff_utils.engine.decoder import Decoder, Through
from simdiff_utils.engine.load import text_config
from simdiff_utils.engine.perplexity import CHUNK
from simdiff_utils.engine.surgery import keep
from simdiff_utils.recovery.writers import difference, find_writers, hooked, ignores_scale

REPAIRS = ("magnitude", "linear")
STRENGTHS = (1e-6, 1e-4, 1e-2, 0.1, 0.3, 1.0, 3.0, 10.0)  # of the ridge, in mean squares of a feature
_NUMBERS = ("strength", "error_before", "error_after")
COLUMNS = ("first", "last", "layer_idx", "target", *_NUMBERS, "note")


@torch.inference_mode()
def repair(
    dense: Decoder,
    pruned: PreTrainedModel,
    removed: frozenset[int],
    blocks: Tensor,
    batch_size: int,
    form: str,
) -> pd.DataFrame:
    """Adjust weights of a pruned model at every cut; names, shapes, dtypes, config, embedding and head stay.

    Args:
        dense: the model that was pruned, in memory or streamed; it is only run.
        pruned: the same without those layers, in memory; changed in place.
        removed: 0-based, in the dense model.
        blocks: calibration token ids [n_blocks, seq_len], no padding; the last quarter chooses the ridge's
            strength.
        batch_size: blocks per forward pass.
        form: one of `REPAIRS`.

    Returns:
        one row per cut (a run of neighbouring removed layers): first and last (its ends), layer_idx (the
        layer adjusted, for magnitude the first of them; NA for none), all in the dense model's numbering;
        target (what in it); strength (of the ridge, or s); error_before and error_after (squared distance to
        the dense state over that state's squared norm, mean over the calibration tokens; magnitude matches
        norms and may raise it); note (why a cut is left as it is, else "").

    Raises:
        SimDiffError: an unknown form, nothing removed, another model, too little text, or states that are not
            finite.
    """
    kept = keep(removed, dense.n_layers)
    _refuse_unsuitable(dense, pruned, removed, blocks, form)
    cuts = find_cuts(removed)
    ends = {
        kept.index(first - 1): last for first, last in cuts if first
    }  # layer before the cut, in the pruned model
    made = {
        last: {"note": "Left as it is: no layer stands before the cut."} for first, last in cuts if not first
    }
    if ends:
        targets = _dense_states(dense, set(ends.values()), blocks, batch_size)
        decoder = Decoder(pruned)
        heal = (
            _Magnitude(decoder, min(ends) + 1, blocks[:1]).heal
            if form == "magnitude"
            else partial(_fit_linear, n_fit=len(blocks) - max(1, len(blocks) // 4), decoder=decoder)
        )

        def revise(layer_idx: int, layer: nn.Module, through: Through) -> None:
            if layer_idx in ends:
                made[ends[layer_idx]] = heal(layer_idx, layer, through, targets.pop(ends[layer_idx]))

        behind = frozenset(range(max(ends) + 1, decoder.n_layers))  # nothing is learnt there
        for _ in decoder.run(blocks, batch_size, (behind,), desc=f"{form} repair", revise=revise):
            pass
    rows = [{"first": first, "last": last, "target": "", "note": ""} | made[last] for first, last in cuts]
    table = pd.DataFrame(rows, columns=COLUMNS).astype(dict.fromkeys(_NUMBERS, float))
    places = [kept[row["layer_idx"]] if "layer_idx" in row else pd.NA for row in rows]
    return table.assign(layer_idx=pd.array(places, dtype="Int64"))


def find_cuts(removed: frozenset[int]) -> list[tuple[int, int]]:
    """First and last layer of every run of neighbouring removed layers, in order."""
    return list(
        zip(
            sorted(i for i in removed if i - 1 not in removed),
            sorted(i for i in removed if i + 1 not in removed),
            strict=True,
        )
    )


def _refuse_unsuitable(
    dense: Decoder, pruned: PreTrainedModel, removed: frozenset[int], blocks: Tensor, form: str
) -> None:
    if form not in REPAIRS:
        raise SimDiffError(f"a repair is one of {', '.join(REPAIRS)}; got {form!r}.")
    if not removed:
        raise SimDiffError("there is nothing to repair: no layer was removed.")
    mine, theirs = text_config(pruned), text_config(dense.model)
    n_kept = dense.n_layers - len(removed)
    if (mine.num_hidden_layers, mine.hidden_size) != (n_kept, theirs.hidden_size):
        raise SimDiffError(
            f"this is not the dense model without layers {sorted(removed)}: it has "
            f"{mine.num_hidden_layers} layers of width {mine.hidden_size}, where {n_kept} of width "
            f"{theirs.hidden_size} should be left."
        )
    if blocks.dim() != 2 or len(blocks) < 2:
        raise SimDiffError(
            "a repair needs two blocks of calibration text or more: it is fitted on some and chosen on "
            "others."
        )


def _dense_states(dense: Decoder, ends: set[int], blocks: Tensor, batch_size: int) -> dict[int, list[Tensor]]:
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


def _relative(target: Tensor, after: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Dense and healed states over the norm of the dense ones, float64 [tokens, d], and that norm [tokens,
    1]."""
    t, h = (states.flatten(0, 1).double() for states in (target.to(after.device), after))
    if not (torch.isfinite(t).all() and torch.isfinite(h).all()):
        raise SimDiffError(
            f'the states at a cut are not finite in {after.dtype}; run with dtype="float32", or '
            '"bfloat16" where float16 overflows.'
        )
    size = t.norm(dim=-1, keepdim=True).clamp_min(1e-30)
    return t / size, h / size, size


# ---- the two forms -------------------------------------------------------------------------------


def _fit_linear(
    layer_idx: int, layer: nn.Module, through: Through, targets: list[Tensor], n_fit: int, decoder: Decoder
) -> dict:
    """Fit D on `n_fit` blocks with every strength, take the one that is best on the others, and fit on all of
    them."""
    writer = next((writer for writer in find_writers(layer, through, hold=False) if writer.adjustable), None)
    if not writer:
        return {
            "note": "Left as it is: what writes last to the residual stream is no linear map and no norm."
        }
    before_head = layer_idx == decoder.n_layers - 1
    grams, crosses, error, n_tokens, n_left, given, held_out = [0.0, 0.0], [0.0, 0.0], 0.0, 0, n_fit, [], []
    with hooked([writer.module], lambda _module, args, _output: given.append(args[0])):
        for (_, after), target in zip(through(), targets, strict=True):
            t, h, size = _relative(target, after)
            x = writer.features(given[0]).to(size.device) / size
            given.clear()
            first = min(max(n_left, 0), len(after))  # of the blocks held out
            held_out.append((first, after[first:] if before_head else None))
            n_left -= len(after)
            for part, tokens in enumerate(
                (slice(first * after.shape[1]), slice(first * after.shape[1], None))
            ):
                gram, cross = _products(x[tokens], (t - h)[tokens], writer.per_channel)
                grams[part] += gram
                crosses[part] += cross
            error, n_tokens = error + (t - h).square().sum().item(), n_tokens + len(t)
    row = {"error_before": error / n_tokens, "error_after": error / n_tokens}
    gains = {
        strength: _gain(grams[1], crosses[1], _solve(grams[0], crosses[0], strength))
        for strength in STRENGTHS
    }
    strength = max(gains, key=gains.get)
    if gains[strength] <= 0:
        return row | {"note": "Left as it is: what fits one part of the text does not fit the part held out."}
    old = [parameter.clone() for parameter in writer.module.parameters()] if before_head else []
    writer.add(_solve(sum(grams), sum(crosses), strength))
    error = nearer = 0.0
    for (_, after), target, (first, before) in zip(through(), targets, held_out, strict=True):
        t, h, _ = _relative(target, after)
        error += (t - h).square().sum().item()
        if before_head:
            nearer += _nearer(decoder, before, after[first:], target[first:])
    if before_head and nearer <= 0:
        for parameter, value in zip(writer.module.parameters(), old, strict=True):
            parameter.copy_(value)
        return row | {
            "note": "Left as it is: states come nearer to the dense model's, but what the head makes of them "
            "does not."
        }
    return row | {
        "layer_idx": layer_idx,
        "target": writer.name,
        "strength": strength,
        "error_after": error / n_tokens,
    }


def _nearer(decoder: Decoder, before: Tensor, after: Tensor, target: Tensor) -> float:
    """By how much the KL divergence from the dense model's next-token distributions falls, summed over
    tokens, in nats.

    Args:
        before, after, target: states behind the last layer, unhealed, healed and dense, [batch, seq, d].
    """
    fallen = 0.0
    for states in zip(
        *(part.to(before).flatten(0, 1).split(CHUNK) for part in (before, after, target)), strict=True
    ):
        unhealed, healed, dense = (
            decoder.logits(part[:, None])[:, 0].float().log_softmax(-1) for part in states
        )
        fallen += (dense.exp() * (healed - unhealed)).sum().item()
    return fallen


def _products(x: Tensor, error: Tensor, per_channel: bool) -> tuple[Tensor, Tensor]:
    """Sums over tokens of x x^T [f, f] and x e^T [f, d]; per channel, of x^2 and x e [d]."""
    return ((x * x).sum(0), (x * error).sum(0)) if per_channel else (x.T @ x, x.T @ error)


def _solve(gram: Tensor, cross: Tensor, strength: float) -> Tensor:
    """D, [f, d] or [d], of least sum |e - D x|^2 + ridge |D|^2; the ridge is `strength` times the mean square
    of x."""
    regular = gram.clone()
    squares = regular if gram.dim() == 1 else regular.diagonal()
    squares += (strength * squares.mean()).clamp_min(1e-30)
    return cross / regular if gram.dim() == 1 else torch.cholesky_solve(cross, torch.linalg.cholesky(regular))


def _gain(gram: Tensor, cross: Tensor, change: Tensor) -> float:
    """By how much D lowers sum |e - D x|^2."""
    return (change * (2 * cross - (gram * change if gram.dim() == 1 else gram @ change))).sum().item()


class _Magnitude:
    """Scales all that writes after a cut. The stream is then too small there, `_factor` times, and nothing
    sees it."""

    def __init__(self, decoder: Decoder, start: int, block: Tensor) -> None:
        """Find what writes in each layer from `start` on; None for a layer that cannot be scaled by it."""
        self._factor, self._writers = 1.0, {}

        def look(layer_idx: int, layer: nn.Module, through: Through) -> None:
            if layer_idx >= start:
                writers = find_writers(layer, through, hold=True)
                scalable = all(writer.adjustable for writer in writers) and ignores_scale(
                    layer, through, writers
                )
                self._writers[layer_idx] = writers if scalable else None

        for _, _, states in decoder.run(block, 1, desc="what writes", revise=look):
            logits, others = decoder.logits(states[:, :8]), decoder.logits(2 * states[:, :8])
            if difference(others, logits) > 0.05:  # no final norm
                self._writers = dict.fromkeys(self._writers)

    def heal(self, layer_idx: int, _layer: nn.Module, through: Through, targets: list[Tensor]) -> dict:
        """Learn s behind this layer, and scale all that is written later."""
        later = {place: writers for place, writers in self._writers.items() if place > layer_idx}
        if not later:
            return {"note": "Left as it is: no layer stands after the cut, and the final norm ignores scale."}
        if None in later.values():
            return {
                "note": "Left as it is: what a later layer writes depends on the scale of what it reads, or is no "
                "linear map's and no norm's."
            }
        ratios = products = squares = n_tokens = 0
        for (_, after), target in zip(through(), targets, strict=True):
            t, h, _ = _relative(target, after)
            square = h.square().sum(-1)
            ratios, squares = ratios + square.rsqrt().sum().item(), squares + square.sum().item()
            products, n_tokens = products + (t * h).sum().item(), n_tokens + len(t)
        before, self._factor = self._factor, ratios / n_tokens
        for writer in (writer for writers in later.values() for writer in writers):
            writer.scale(before / self._factor)
        errors = [
            1 + (factor**2 * squares - 2 * factor * products) / n_tokens for factor in (before, self._factor)
        ]
        return {
            "layer_idx": min(later),
            "target": "all that writes to the residual stream from this layer on",
            "strength": self._factor / before,
            "error_before": errors[0],
            "error_after": errors[1],
        }
