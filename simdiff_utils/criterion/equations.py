"""The annotated paper, Eq. 5 to 9 of SimDiff (arXiv:2604.19520), as pure functions; then what criteria fuse.

Symbols as in the paper: L_sim and L_diff are raw measurements of a layer, I_sim and I_diff the same
normalised, I the fused importance. Small importance: the layer is removed first.
"""

from collections.abc import Mapping

import numpy as np
import torch

from simdiff_utils import SimDiffError, registry


def normalise_difference(l_diff: np.ndarray) -> np.ndarray:
    """I_diff = sigmoid(L_diff), Eq. 5: L_diff >= 0, so I_diff lies in [0.5, 1].

    In float64 the sigmoid is exactly 1 above about 36.8: a large L_diff no longer tells layers apart.
    """
    return 1 / (1 + np.exp(-np.asarray(l_diff, dtype=np.float64)))


def normalise_similarity(l_sim: np.ndarray) -> np.ndarray:
    """I_sim = L_sim / 2, Eq. 6, in [0, 1]."""
    return np.asarray(l_sim, dtype=np.float64) / 2


def fuse(i_sim: np.ndarray, i_diff: np.ndarray, alpha: float) -> np.ndarray:
    """I = alpha * I_diff + (1 - alpha) * I_sim, Eq. 7: one importance per layer, float64 [n_layers]."""
    if not 0 <= alpha <= 1:
        raise SimDiffError(f"alpha must lie in [0, 1], got {alpha}.")
    return alpha * np.asarray(i_diff, dtype=np.float64) + (1 - alpha) * np.asarray(i_sim, dtype=np.float64)


def choose_removed(importance: np.ndarray, n_remove: int) -> frozenset[int]:
    """The n_remove layers of smallest importance, Eq. 8 and 9 (Algorithm 2); ties go to the earlier layer."""
    order = np.argsort(importance, kind="stable")
    return frozenset(int(layer_idx) for layer_idx in order[:n_remove])


def count_saturated(l_diff: np.ndarray, dtype: torch.dtype = torch.float64) -> int:
    """How many I_diff are exactly 1 in a dtype: where all are, SimDiff ranks by cosine distance alone.

    This package computes Eq. 5 in float64, where that begins at about 36.8; in float32 it begins at about
    16.6, in bfloat16 at about 6.2.
    """
    l_diff = torch.as_tensor(np.array(l_diff, dtype=np.float64)).to(dtype)
    return int((torch.sigmoid(l_diff) == 1).sum())


# ---- ShortGPT's criterion, which is one measurement, and those that fuse two
#
# Each takes the statistics (columns of `LayerStatistics.table`, float [n_layers] each). Those that fuse
# return I_sim and I_diff: the two ends, alpha 0 and 1, of each layer's line. The last two are ours: nothing
# in them saturates.


def cosine_scores(statistics: Mapping[str, np.ndarray]) -> np.ndarray:
    """Eq. 2 alone, float64 [n_layers]: ShortGPT (arXiv:2403.03853) removes what turns its input least."""
    return np.asarray(statistics["cosine_distance"], dtype=np.float64)


def mssd_line(statistics: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """SimDiff as published, the difference by Eq. 3."""
    return normalise_similarity(statistics["cosine_distance"]), normalise_difference(statistics["mssd"])


def masd_line(statistics: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """SimDiff as published, the difference by Eq. 4."""
    return normalise_similarity(statistics["cosine_distance"]), normalise_difference(statistics["masd"])


def log_mssd_line(statistics: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The logarithm of MSSD in the sigmoid's place, both measurements stretched to [0, 1] over the layers.

    Stretching changes no set that some alpha chooses (ranks depend on alpha up to a change of its scale); it
    makes alpha readable.
    """
    mssd = np.asarray(statistics["mssd"], dtype=np.float64)
    logarithm = np.log(np.maximum(mssd, np.finfo(np.float64).tiny))  # an identity layer has MSSD 0
    return _stretch(statistics["cosine_distance"]), _stretch(logarithm)


def relative_line(statistics: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The update in units of the state, stretched likewise."""
    return _stretch(statistics["cosine_distance"]), _stretch(statistics["relative_update"])


def normalise(statistics: Mapping[str, np.ndarray], criterion: str) -> tuple[np.ndarray, np.ndarray]:
    """I_sim and I_diff of a criterion that fuses two measurements, float64 [n_layers] each.

    Raises:
        SimDiffError: the criterion fuses nothing.
    """
    if registry.find(criterion).gives != "line":
        fused = ", ".join(registry.of_kind("line"))
        raise SimDiffError(f"{criterion} fuses no two measurements by alpha; it must be one of {fused}.")
    return registry.load(criterion)(statistics)


def _stretch(values: np.ndarray) -> np.ndarray:
    """Min-max over the layers: [0, 1]; all 0 where they do not differ."""
    values = np.asarray(values, dtype=np.float64)
    spread = values.max() - values.min()
    return (values - values.min()) / spread if spread else np.zeros_like(values)
