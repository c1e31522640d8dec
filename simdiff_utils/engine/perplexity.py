"""Perplexity of a model without each of many sets of layers, on equal token blocks, and how sure it is."""

import numpy as np
import torch
from scipy import stats
from torch import Tensor
from torch.nn.functional import cross_entropy

from simdiff_utils import SimDiffError
from simdiff_utils.engine.decoder import Decoder, Observer
from simdiff_utils.engine.logits import logits_in_chunks, rows_in_cache
from simdiff_utils.engine.surgery import check_removed


@torch.inference_mode()
def block_losses(
    decoder: Decoder,
    blocks: Tensor,
    sets: tuple[frozenset[int], ...] = (frozenset(),),
    batch_size: int = 2,
    observe: Observer | None = None,
) -> np.ndarray:
    """Mean next-token loss of every block, in nats per token, of the model without each set of layers.

    All sets are run in one pass: layers below the first one in which two sets differ are computed once.

    Args:
        decoder: the model.
        blocks: token ids [n_blocks, seq_len], no padding.
        sets: 0-based layer indices to leave out; the empty set is the dense model.
        batch_size: blocks per forward pass.
        observe: as in `Decoder.run`.

    Returns:
        float64 [n_sets, n_blocks]; every block predicts seq_len - 1 tokens.

    Raises:
        SimDiffError: an index is no layer's, no layer would be left, or a loss is not finite.
    """
    for removed in sets:
        check_removed(removed, decoder.n_layers)
    losses = {removed: [] for removed in sets}
    desc = f"{len(losses)} sets" if len(losses) > 1 else "perplexity"
    for removed, batch, states in decoder.run(blocks, batch_size, tuple(losses), observe, desc):
        losses[removed] += _mean_losses(decoder, states, batch)
    for removed, values in losses.items():
        if not np.isfinite(values).all():
            raise SimDiffError(
                f"the model without layers {sorted(removed)} gives a loss that is not finite in "
                f'{decoder.model.dtype}; run with dtype="float32".'
            )
    return np.array([losses[removed] for removed in sets])


def _mean_losses(decoder: Decoder, states: Tensor, batch: Tensor) -> list[float]:
    """Mean loss of each block of a batch; states [batch, seq, d] as the last layer leaves them."""
    n_predicted = batch.shape[1] - 1
    total = torch.zeros(len(batch), dtype=torch.float64)
    for block, (hidden, tokens) in enumerate(zip(states, batch, strict=True)):
        for logits, wanted in logits_in_chunks(decoder, hidden[:-1], tokens[1:]):
            for rows, these in rows_in_cache(logits, wanted.to(logits.device)):
                total[block] += cross_entropy(rows.float(), these, reduction="sum").double().cpu()
    return (total / n_predicted).tolist()


def perplexity(losses: np.ndarray) -> float:
    """exp of the mean loss in nats per token; at least 1, and infinite only where float64 ends."""
    return float(np.exp(np.mean(losses)))


def perplexity_interval(
    losses: np.ndarray, baseline: np.ndarray | None = None, confidence: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Bootstrap interval over the blocks (percentiles of 2,000 redraws): other text of this kind would fall
    in it.

    Args:
        losses: of one model, [n_blocks].
        baseline: of another on the same blocks: the interval is that of the ratio of the two perplexities,
            block by block paired, which is far narrower than either alone. A ratio whose interval holds 1
            shows no difference.

    Returns:
        low and high end; the widest there are from one block, which says nothing about spread.
    """
    values = np.asarray(losses) if baseline is None else np.asarray(losses) - np.asarray(baseline)
    if len(values) < 2:
        return (1.0 if baseline is None else 0.0), float("inf")
    if np.ptp(values) == 0:
        return (perplexity(values),) * 2
    rng = np.random.default_rng(seed)
    redrawn = stats.bootstrap(
        (values,), np.mean, n_resamples=2000, confidence_level=confidence, method="percentile", rng=rng
    )
    found = redrawn.confidence_interval
    return float(np.exp(found.low)), float(np.exp(found.high))


def round_to_two_digits(value: float) -> str:
    """Two significant digits in plain decimals (1234 -> 1200): what survives another processor's rounding."""
    return f"{float(f'{value:.2g}'):,g}"


def check_perplexity_ratio(pruned: float, dense: float, max_ratio: float) -> None:
    """Refuse a pruned model whose perplexity is more than `max_ratio` times the dense one's; 0 lets all
    pass."""
    if max_ratio and pruned / dense > max_ratio:
        raise SimDiffError(
            f"the pruned model's perplexity is {pruned / dense:.2f} times the dense model's, above "
            f"max_perplexity_ratio = {max_ratio}; remove fewer layers or raise the limit."
        )
