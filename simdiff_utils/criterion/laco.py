"""LaCo (arXiv:2402.11187) as released: fold layers into the one below, from the top down, while the states
after the last stay alike."""

import hashlib
import json
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import PreTrainedModel

from simdiff_utils import SimDiffError
from simdiff_utils.criterion.candidates import Candidate, Evidence
from simdiff_utils.engine.decoder import Decoder
from simdiff_utils.engine.surgery import Merge, layers_merged

N_LACO = 4  # samples on which LaCo compares states
LACO_SPAN, LACO_INTERVAL = 3, 2  # layers folded into one by a merge; layers walked down after it
# 0.95 to 0: the highest that reaches K is taken
LACO_THRESHOLDS = tuple(round(0.95 - 0.05 * i, 2) for i in range(20))
_BELOW_ALL = -2.0  # no cosine is as low


@dataclass(frozen=True)
class Merges:
    """LaCo's edit of a model: layers folded into others, one merge after another; none is taken out by it."""

    merges: tuple[Merge, ...]

    @classmethod
    def read(cls, stored: Iterable) -> "Merges | None":
        """Merges as JSON gives them; None where there are none."""
        merges = tuple((stays, tuple(folded)) for stays, folded in stored)
        return cls(merges) if merges else None

    @property
    def key(self) -> str:
        """Names the edit in a file's path."""
        return "merged-" + hashlib.sha256(json.dumps(self.merges).encode()).hexdigest()[:12]

    @property
    def removed(self) -> frozenset[int]:
        """The layers folded into others, which can go afterwards."""
        return frozenset(layer_idx for _, folded in self.merges for layer_idx in folded)

    def applied(self, model: PreTrainedModel) -> AbstractContextManager:
        """See `surgery.layers_merged`."""
        return layers_merged(model, self.merges)


def laco_sets(evidence: Evidence, n_remove: int) -> list[Candidate]:
    """The one set of layers that LaCo folds away, with its merges."""
    merges, n_models = merge_layers(evidence.decoder(), evidence.calibration()[:N_LACO], n_remove)
    edit = Merges(merges)
    return [Candidate(edit.removed, "laco", edit=edit, n_models=n_models)]


def merge_layers(
    decoder: Decoder, blocks: Tensor, n_remove: int, span: int = LACO_SPAN, interval: int = LACO_INTERVAL
) -> tuple[tuple[Merge, ...], int]:
    """LaCo's merges at the highest of `LACO_THRESHOLDS` at which its walk takes out n_remove layers.

    The authors set the threshold by hand and take what comes out; here K is given and the threshold looked
    for. Below all of them every merge is accepted and the interval ends at layer 0: n_remove layers always
    go.

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
    dense = _last_states(decoder, blocks, ())  # [n_samples, seq_len * d]
    similarities: dict[tuple[Merge, ...], float] = {}

    def similarity(merges: tuple[Merge, ...]) -> float:
        if merges not in similarities:
            similarities[merges] = (
                cosine_similarity(_last_states(decoder, blocks, merges), dense, dim=-1).mean().item()
            )
            if not np.isfinite(similarities[merges]):
                raise SimDiffError(
                    f"laco compares hidden states that are not finite in {decoder.model.dtype}; "
                    'run with dtype="float32".'
                )
        return similarities[merges]

    for threshold in (*LACO_THRESHOLDS, _BELOW_ALL):
        merges, left = _walk(decoder.n_layers, n_remove, span, interval, similarity, threshold)
        if not left:
            break
    return merges, len(similarities) + 1


def _walk(
    n_layers: int,
    n_remove: int,
    span: int,
    interval: int,
    similarity: Callable[[tuple[Merge, ...]], float],
    threshold: float,
) -> tuple[tuple[Merge, ...], int]:
    """LaCo's walk as released, from the top down.

    Layers l+1 .. l+C are folded into l (see `layers_merged`) and go, if the states after the final norm (all
    of a sample's as one vector) keep a mean cosine above T with the dense ones; then the walk goes down by
    the interval, else by one. At first the topmost layer is left out; further down fewer than C layers may
    stand above l, and as many are folded as there are.

    Args:
        span: C.
        similarity: merges -> mean cosine.
        threshold: T.

    Returns:
        the merges accepted, in their order, and how many layers are still to go.
    """
    kept, merges, left = list(range(n_layers)), (), n_remove
    place = max(0, n_layers - 2 - min(span, left))  # of l among the layers kept
    while place >= 0 and left:
        size = min(span, left, len(kept) - 1 - place)
        tried = (*merges, (kept[place], tuple(kept[place + 1 : place + 1 + size])))
        accepted = similarity(tried) > threshold
        if accepted:
            merges, left = tried, left - size
            del kept[place + 1 : place + 1 + size]
        place -= interval if accepted else 1
        place = max(place, 0) if threshold == _BELOW_ALL else place
    return merges, left


def _last_states(decoder: Decoder, blocks: Tensor, merges: tuple[Merge, ...]) -> Tensor:
    """States after the final norm, [n_samples, seq_len * d], of the model with some layers merged."""
    edit = Merges(merges)
    with edit.applied(decoder.model):
        run = decoder.run(blocks, 1, (edit.removed,))
        return torch.cat([decoder.normed(states).float().flatten(1) for _, _, states in run])
