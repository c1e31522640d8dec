"""The peers' scores of layers, each from its paper's formula; small score: the layer is removed first.

Here is what looks at weights, gradients or states. ShortGPT is in `equations`, what needs only the statistics
or the losses of whole sets in `propose` and `search`, LaCo in `laco`. No width pruner is here: they remove no
layers.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

from simdiff_utils import SimDiffError
from simdiff_utils.engine.decoder import Decoder
from simdiff_utils.engine.load import decoder_layers

N_TAYLOR = 10  # samples of Shortened-LLM's calibration
N_NEIGHBOURS = 25  # EntroDrop's k
N_ENTROPY_TOKENS = 2048  # of a sample; distances between all pairs are taken: 32 MB in float64


def magnitude_scores(decoder: Decoder) -> np.ndarray:
    """Sum of a layer's absolute weights, norms included, biases not (Shortened-LLM's Mag, arXiv:2402.02834,
    as released), float64 [n_layers]."""
    scores = np.zeros(decoder.n_layers)
    for layer_idx in range(decoder.n_layers):
        with decoder.layer(layer_idx) as layer:
            sums = [w.detach().abs().sum(dtype=torch.float64) for w in _weights(layer)]
            scores[layer_idx] = sum(total.item() for total in sums)
    return scores


def taylor_scores(decoder: Decoder, blocks: Tensor) -> np.ndarray:
    """First-order estimate of what zeroing a layer's weights does to the loss (Shortened-LLM's Taylor).

    Sum over the entries w of the layer's weights (norms included, biases not, as released) of |w *
    dLoss/dw|, the gradient summed over the samples first.

    Args:
        decoder: in memory: the gradients of all layers are held at once.
        blocks: token ids [n_samples, seq_len], of which the first `N_TAYLOR` are taken; a forward and a
            backward pass each.

    Returns:
        float64 [n_layers].
    """
    if decoder.streamed:
        raise SimDiffError("taylor takes gradients and needs the model in memory: raise memory_gib.")
    model, layers = decoder.model, decoder_layers(decoder.model)
    wanted = {id(w) for layer in layers for w in _weights(layer)}
    found = {parameter: (parameter.requires_grad, parameter.grad) for parameter in model.parameters()}
    try:
        for parameter in found:
            parameter.grad = None  # what is there already is not of these samples
            parameter.requires_grad_(id(parameter) in wanted)
        for block in tqdm(blocks[:N_TAYLOR], desc="gradients", unit="sample", leave=False):
            tokens = block[None].to(decoder.device)
            with torch.enable_grad():
                logits = model(input_ids=tokens, use_cache=False).logits[0, :-1]
                cross_entropy(logits.float(), tokens[0, 1:].to(logits.device)).backward()
        return np.array([sum(map(_first_order, _weights(layer))) for layer in layers], dtype=np.float64)
    finally:
        for parameter, (asked, before) in found.items():
            parameter.grad = before
            parameter.requires_grad_(asked)


def _first_order(w: nn.Parameter) -> float:
    """Sum of |w * dLoss/dw| over the entries; 0 without a gradient: an expert that no token reached."""
    return 0.0 if w.grad is None else (w.detach() * w.grad).abs().sum(dtype=torch.float64).item()


def entropy_increases(decoder: Decoder, blocks: Tensor, n_neighbours: int = N_NEIGHBOURS) -> np.ndarray:
    """Entropy of a layer's output tokens less that of its input tokens (EntroDrop, arXiv:2504.03794).

    By nearest neighbours, H = d * mean log r_k + constants, r_k a token's distance to its k-th neighbour
    among those of its sample: so it depends on the states' scale, and tokens that coincide (equal words
    before layer 0) have no entropy. As released, a sample at a time, then the mean over the samples; the
    paper drops attention only, we drop whole layers by it.

    Args:
        blocks: token ids [n_samples, seq_len]; of longer samples the first 2,048 tokens are taken.
        n_neighbours: k.

    Returns:
        float64 [n_layers], in nats.
    """
    blocks = blocks[:, :N_ENTROPY_TOKENS]
    if blocks.shape[1] <= n_neighbours:
        raise SimDiffError(
            f"entrodrop looks at the {n_neighbours}-th neighbour of each token and samples have "
            f"{blocks.shape[1]} tokens: raise seq_len."
        )
    sums = np.zeros(
        decoder.n_layers + 1
    )  # over the samples, of what enters layer 0 and what each layer leaves

    def observe(layer_idx: int, before: Tensor, after: Tensor) -> None:
        if layer_idx == 0:
            sums[0] += sum(_log_distance(sample, n_neighbours) for sample in before)
        sums[layer_idx + 1] += sum(_log_distance(sample, n_neighbours) for sample in after)

    for _, _, states in decoder.run(blocks, 1, observe=observe, desc="entropy"):
        width = states.shape[-1]
    return width * np.diff(sums) / len(blocks)


def _log_distance(states: Tensor, n_neighbours: int) -> float:
    """Mean over the tokens of log r_k; states [tokens, d]."""
    states = states.double()
    # by matrix products: many times as fast, and in float64 as exact as is needed
    distances = torch.cdist(states, states, compute_mode="use_mm_for_euclid_dist")
    # one more than k: the nearest is the token itself
    nearest = distances.topk(n_neighbours + 1, dim=1, largest=False).values[:, -1]
    equal = nearest <= 1e-6 * states.norm(dim=1)  # what is there then is the products' rounding
    return nearest.where(~equal, torch.finfo(torch.float32).tiny).log().mean().item()


def _weights(layer: nn.Module) -> Iterator[nn.Parameter]:
    """All parameters of a layer but its biases."""
    return (parameter for name, parameter in layer.named_parameters() if not name.endswith("bias"))
