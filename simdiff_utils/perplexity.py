"""Perplexity of a model, whole or without some of its layers, on equal token blocks."""

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from simdiff_utils.settings import SimDiffError
from simdiff_utils.surgery import layers_removed


@torch.inference_mode()
def block_losses(model: torch.nn.Module, blocks: Tensor, removed: frozenset[int] = frozenset(),
                 batch_size: int = 2) -> np.ndarray:
    """Mean next-token loss of every block, in nats per token, of the model without a set of layers.

    Args:
        model: a causal language model in eval mode; it is whole again afterwards.
        blocks: token ids [n_blocks, seq_len], no padding.
        removed: 0-based layer indices; the empty set is the dense model.
        batch_size: blocks per forward pass; the logits [batch, seq_len, vocabulary] are the peak of memory.

    Returns:
        float64 [n_blocks]; every block predicts seq_len - 1 tokens.

    Raises:
        SimDiffError: a loss is not finite.
    """
    losses = []
    desc = f"without {len(removed)} layers" if removed else "dense"
    with layers_removed(model, removed):
        for batch in tqdm(blocks.split(batch_size), desc=desc, unit="batch", leave=False):
            batch = batch.to(model.device)
            logits = model(input_ids=batch, use_cache=False).logits
            for block, block_logits in zip(batch, logits, strict=True):  # [seq], [seq, vocabulary]
                losses.append(torch.nn.functional.cross_entropy(block_logits[:-1].float(), block[1:]).item())
    if not np.isfinite(losses).all():
        raise SimDiffError(f"the model without layers {sorted(removed)} gives a loss that is not finite in "
                           f'{model.dtype}; run with dtype="float32".')
    return np.array(losses)


def perplexity(losses: np.ndarray) -> float:
    """exp of the mean loss in nats per token; at least 1, and infinite only where float64 ends."""
    return float(np.exp(np.mean(losses)))


def round_to_two_digits(value: float) -> str:
    """Two significant digits in plain decimals (1234 -> 1200): what survives another processor's rounding."""
    return f"{float(f'{value:.2g}'):,g}"


def check_perplexity_ratio(pruned: float, dense: float, max_ratio: float) -> None:
    """Refuse a pruned model whose perplexity is more than `max_ratio` times the dense one's; 0 lets all pass."""
    if max_ratio and pruned / dense > max_ratio:
        raise SimDiffError(f"the pruned model's perplexity is {pruned / dense:.2f} times the dense model's, above "
                           f"max_perplexity_ratio = {max_ratio}; remove fewer layers or raise the limit.")
