"""The peers' scores of layers, each from its paper's formula; small score: the layer is removed first.

What needs only the one-pass statistics (ShortGPT, the angular block) or only losses of candidate sets (Shortened-LLM's
one-shot perplexity, SLEB, windows) stands in `methods` itself. No width pruner is here: they remove no layers.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy
from tqdm.auto import tqdm

from simdiff_utils.decoder import Decoder
from simdiff_utils.models import decoder_layers
from simdiff_utils.settings import SimDiffError
from simdiff_utils.surgery import Merge, layers_merged

N_TAYLOR = 10  # samples of Shortened-LLM's calibration
N_NEIGHBOURS = 25  # EntroDrop's k
N_ENTROPY_TOKENS = 2048  # distances between all pairs are taken: 16 MB in float32
N_LACO = 4  # samples on which LaCo compares states
LACO_SPAN, LACO_INTERVAL = 3, 2  # layers folded into one by a merge; layers walked down after it
LACO_THRESHOLDS = tuple(round(0.95 - 0.05 * i, 2) for i in range(20))  # 0.95 to 0: the highest that reaches K is taken
_BELOW_ALL = -2.0  # no cosine is as low


def magnitude_scores(decoder: Decoder) -> np.ndarray:
    """Sum of the absolute weights of a layer's matrices (Shortened-LLM's Mag, arXiv:2402.02834), float64 [n_layers]."""
    scores = np.zeros(decoder.n_layers)
    for layer_idx in range(decoder.n_layers):
        with decoder.layer(layer_idx) as layer:
            scores[layer_idx] = sum(w.detach().abs().sum(dtype=torch.float64).item() for w in _matrices(layer))
    return scores


def taylor_scores(decoder: Decoder, blocks: Tensor) -> np.ndarray:
    """First-order estimate of what zeroing a layer's weights does to the loss (Shortened-LLM's Taylor).

    Sum over the entries w of the layer's matrices of |w * dLoss/dw|, the gradient summed over the samples first.

    Args:
        decoder: in memory: the gradients of all layers are held at once.
        blocks: token ids [n_samples, seq_len]; a forward and a backward pass each.

    Returns:
        float64 [n_layers].
    """
    if decoder.streamed:
        raise SimDiffError("taylor takes gradients and needs the model in memory: raise memory_gib.")
    model, layers = decoder.model, decoder_layers(decoder.model)
    wanted = {id(w) for layer in layers for w in _matrices(layer)}
    found = {parameter: (parameter.requires_grad, parameter.grad) for parameter in model.parameters()}
    try:
        for parameter in found:
            parameter.grad = None  # what is there already is not of these samples
            parameter.requires_grad_(id(parameter) in wanted)
        for block in tqdm(blocks, desc="gradients", unit="sample", leave=False):
            tokens = block[None].to(decoder.device)
            with torch.enable_grad():
                logits = model(input_ids=tokens, use_cache=False).logits[0, :-1]
                cross_entropy(logits.float(), tokens[0, 1:].to(logits.device)).backward()
        return np.array([sum((w.detach() * w.grad).abs().sum(dtype=torch.float64).item() for w in _matrices(layer)
                             if w.grad is not None) for layer in layers])  # None: an expert that no token reached
    finally:
        for parameter, (asked, before) in found.items():
            parameter.grad = before
            parameter.requires_grad_(asked)


def entropy_increases(decoder: Decoder, blocks: Tensor, n_neighbours: int = N_NEIGHBOURS) -> np.ndarray:
    """Entropy of a layer's output tokens less that of its input tokens (EntroDrop, arXiv:2504.03794, per layer).

    By nearest neighbours, H = d * mean log r_k + constants, r_k a token's distance to its k-th neighbour among all
    tokens: so it depends on the states' scale, and tokens that coincide (equal words before layer 0) have no entropy.

    Args:
        blocks: token ids [n_samples, seq_len]; as many are taken as make 2,048 tokens.
        n_neighbours: k.

    Returns:
        float64 [n_layers], in nats.
    """
    blocks = blocks[:max(1, N_ENTROPY_TOKENS // blocks.shape[1]), :N_ENTROPY_TOKENS]
    if blocks.numel() <= n_neighbours:
        raise SimDiffError(f"entrodrop looks at the {n_neighbours}-th neighbour of each token and there are "
                           f"{blocks.numel()} tokens: raise n_samples or seq_len.")
    entropies = np.zeros(decoder.n_layers + 1)

    def observe(layer_idx: int, before: Tensor, after: Tensor) -> None:
        if layer_idx == 0:
            entropies[0] = _log_distance(before.flatten(0, 1), n_neighbours)
        entropies[layer_idx + 1] = _log_distance(after.flatten(0, 1), n_neighbours)

    for _, _, states in decoder.run(blocks, len(blocks), observe=observe, desc="entropy"):
        return states.shape[-1] * np.diff(entropies)


def _log_distance(states: Tensor, n_neighbours: int) -> float:
    """Mean over the tokens of log r_k; states [tokens, d]."""
    states = states.double()  # distances by matrix products: many times as fast, and in float64 as exact as is needed
    distances = torch.cdist(states, states, compute_mode="use_mm_for_euclid_dist")
    nearest = distances.topk(n_neighbours + 1, dim=1, largest=False).values[:, -1]  # the first is the token itself
    equal = nearest <= 1e-6 * states.norm(dim=1)  # what is there then is the products' rounding
    return nearest.where(~equal, torch.finfo(torch.float32).tiny).log().mean().item()


# ---- LaCo ------------------------------------------------------------------------------------------------------------


def merge_layers(decoder: Decoder, blocks: Tensor, n_remove: int, span: int = LACO_SPAN,
                 interval: int = LACO_INTERVAL) -> tuple[tuple[Merge, ...], int]:
    """LaCo's walk (arXiv:2402.11187, its paper's rule): fold layers into the one below, from the top down.

    Layer l becomes l + sum over k = 1..C of (theta_{l+k} - theta_l) and l+1 .. l+C go, if the states after the last
    layer (before the final norm) keep a mean cosine above T with the dense ones; then the walk goes down by the
    interval, else by one. The paper sets T by hand; here it is the highest of `LACO_THRESHOLDS` at which the walk
    takes out n_remove layers (below all of them, every merge is accepted and the interval ends at layer 0: n_remove
    layers always go).

    Args:
        blocks: token ids [n_samples, seq_len].
        span: C; the last merge takes what is still missing.

    Returns:
        the merges in their order, and how many models were compared.

    Raises:
        SimDiffError: the model is streamed, its layers are not built alike, or states are not finite.
    """
    if decoder.streamed:
        raise SimDiffError("laco changes weights and needs the model in memory: raise memory_gib.")
    dense = _last_states(decoder, blocks, ())
    similarities: dict[tuple[Merge, ...], float] = {}

    def similarity(merges: tuple[Merge, ...]) -> float:
        if merges not in similarities:
            similarities[merges] = cosine_similarity(_last_states(decoder, blocks, merges), dense, dim=-1).mean().item()
            if not np.isfinite(similarities[merges]):
                raise SimDiffError(f"laco compares hidden states that are not finite in {decoder.model.dtype}; "
                                   'run with dtype="float32".')
        return similarities[merges]

    for threshold in (*LACO_THRESHOLDS, _BELOW_ALL):
        kept, merges, left = list(range(decoder.n_layers)), (), n_remove
        place = len(kept) - 1 - min(span, left)
        while place >= 0 and left:
            size = min(span, left, len(kept) - 1 - place)
            tried = (*merges, (kept[place], tuple(kept[place + 1:place + 1 + size])))
            accepted = similarity(tried) > threshold
            if accepted:
                merges, left = tried, left - size
                del kept[place + 1:place + 1 + size]
            place = min(place - (interval if accepted else 1), len(kept) - 1 - min(span, left))
            place = max(place, 0) if threshold == _BELOW_ALL else place
        if not left:
            break
    return merges, len(similarities) + 1


def _last_states(decoder: Decoder, blocks: Tensor, merges: tuple[Merge, ...]) -> Tensor:
    """States after the last layer, [tokens, d], of the model with some layers merged."""
    removed = frozenset(layer_idx for _, gone in merges for layer_idx in gone)
    with layers_merged(decoder.model, merges):
        return torch.cat([states.float().flatten(0, 1) for _, _, states in decoder.run(blocks, 1, (removed,))])


def _matrices(layer: nn.Module) -> Iterator[nn.Parameter]:
    """The weights of linear maps: everything of two or more dimensions (experts have three), no norm and no bias (of
    which experts have a row each)."""
    return (parameter for name, parameter in layer.named_parameters()
            if parameter.dim() >= 2 and not name.endswith("bias") and "norm" not in name)
