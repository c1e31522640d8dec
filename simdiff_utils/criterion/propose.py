"""From a criterion's name to candidate sets of layers.

A criterion that has one candidate has chosen; of several, the one of lowest validation perplexity is taken.
"""

import numpy as np
import pandas as pd

from simdiff_utils import SimDiffError, registry, require
from simdiff_utils.criterion.candidates import Candidate, Evidence
from simdiff_utils.criterion.equations import count_saturated, fuse, normalise
from simdiff_utils.criterion.search import search_ternary
from simdiff_utils.engine.perplexity import perplexity

N_BLOCKS = 3  # contiguous blocks that the portfolio tries


def propose(criterion: str, evidence: Evidence, n_remove: int) -> list[Candidate]:
    """The sets of n_remove layers that a criterion would remove.

    Raises:
        SimDiffError: no such criterion; it protects too many layers, or gives scores that are not finite; it
            looks at what the evidence lacks; it gives a set that may not be removed (`evidence.cuts`).
    """
    evidence.cuts.check(n_remove)
    found = _sets(criterion, evidence, n_remove)
    allowed = [c for c in found if evidence.cuts.allows(c.removed)]
    require(
        allowed,
        f"{criterion} proposes only sets such as {sorted(found[0].removed) if found else []}, which hold a "
        "protected layer or break the model's pattern: choose another criterion, or change protected or "
        "keep_pattern.",
    )
    return allowed


def _sets(criterion: str, evidence: Evidence, n_remove: int) -> list[Candidate]:
    row = registry.find(criterion)
    if row.gives == "line":
        return _line_sets(criterion, evidence, n_remove)
    if row.gives == "sets":
        return registry.load(criterion)(evidence, n_remove)
    protected = sorted(row.protected(evidence.n_layers))
    if n_remove > evidence.n_layers - len(protected):  # said before anything is scored
        raise SimDiffError(
            f"{criterion} protects layers {protected} of {evidence.n_layers} and cannot remove {n_remove}: "
            "remove fewer, or choose another criterion."
        )
    scores = evidence.remember(criterion, lambda: score_layers(criterion, evidence))
    scores[protected] = np.inf
    removed = evidence.cuts.lowest(scores, n_remove)
    require(
        np.isfinite(scores[list(removed)]).all(),
        f"{criterion} protects layers {protected}, and no {n_remove} of the others may go (see keep_pattern "
        "and protected): remove another number, or choose another criterion.",
    )
    return [Candidate(removed, criterion)]


def score_layers(criterion: str, evidence: Evidence) -> np.ndarray:
    """One float64 a layer, [n_layers], of a criterion that scores layers: the smallest goes first."""
    given = {
        "statistics": evidence.statistics.table,
        "model": evidence.decoder,
        "calibration": evidence.calibration,
        "losses": evidence.evaluator,
    }
    arguments = [given[word]() for word in registry.find(criterion).sees if word in given]
    found = registry.load(criterion)(*arguments)
    try:
        scores = np.array(found, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise SimDiffError(f"{criterion} gives no numbers ({error}): return one float a layer.") from error
    if scores.shape != (evidence.n_layers,):
        raise SimDiffError(
            f"{criterion} gives scores of shape {scores.shape} and the model has {evidence.n_layers} layers: "
            "return one float a layer."
        )
    if not np.isfinite(scores).all():
        raise SimDiffError(
            f"{criterion} gives layer {int(np.isfinite(scores).argmin())} a score that is not finite; "
            'run with dtype="float32".'
        )
    return scores


def count_passes(criterion: str, candidates: list[Candidate], n_layers: int, n_remove: int) -> int:
    """Passes that finding the set takes, as the peers' papers count them: each over all of its text, none
    shared."""
    n_compared = len({candidate.removed for candidate in candidates})
    proposing = registry.find(criterion).passes(n_layers, n_remove) + max(c.n_models for c in candidates)
    return proposing + (n_compared if n_compared > 1 else 0)


def summarise_paths(evidence: Evidence, grid: list[int]) -> pd.DataFrame:
    """What each criterion that fuses two measurements can choose at all on these statistics.

    Returns:
        one row per criterion: saturated (layers whose I_diff is exactly 1 in float64; 0 for those without a
        sigmoid), for every number of layers K in `grid` a column "sets, K=..." (how many sets some alpha
        chooses, exact ties included), and shortgpt: True where, for every K in the grid, no alpha below 1
        chooses any set but that of cosine distance alone.
    """
    rows, table = [], evidence.statistics.table()
    for criterion in registry.of_kind("line"):
        path = evidence.alpha_path(criterion)
        path = path[path["n_remove"].isin(grid)]
        published = registry.find(criterion).source == registry.SIMDIFF
        shortgpt = (path["low"] == 0) & (path["high"] == 1) | (path["low"] == 1)
        rows.append(
            {
                "criterion": criterion,
                "saturated": count_saturated(table[criterion]) if published else 0,
                **{f"sets, K={k}": int((path["n_remove"] == k).sum()) for k in grid},
                "shortgpt": bool(shortgpt.all()),
            }
        )
    return pd.DataFrame(rows)


# ---- criteria that fuse two measurements


def _line_sets(criterion: str, evidence: Evidence, n_remove: int) -> list[Candidate]:
    """Every set that some alpha chooses; that of a given alpha; or those that the published search probes."""
    if evidence.alpha == "auto" and evidence.search == "path":
        return _path_sets(criterion, evidence, n_remove)
    if evidence.alpha == "auto":
        probed = search_probes(criterion, evidence, n_remove)
        alphas, sets = probed["alpha"], probed["removed"]
    else:
        scores = fuse(*normalise(evidence.statistics.table(), criterion), float(evidence.alpha))
        alphas, sets = [float(evidence.alpha)], [evidence.cuts.lowest(scores, n_remove)]
    return [Candidate(frozenset(s), criterion, alpha, alpha) for alpha, s in zip(alphas, sets, strict=True)]


def _path_sets(criterion: str, evidence: Evidence, n_remove: int) -> list[Candidate]:
    path = evidence.alpha_path(criterion)
    return [
        Candidate(frozenset(row.removed), criterion, row.low, row.high, row.n_tied)
        for row in path[path["n_remove"] == n_remove].itertuples()
    ]


def search_probes(criterion: str, evidence: Evidence, n_remove: int) -> pd.DataFrame:
    """Algorithm 1 as published: every alpha that the ternary search tries (see `search_ternary`)."""
    evaluator = evidence.evaluator()
    return search_ternary(
        *normalise(evidence.statistics.table(), criterion),
        n_remove,
        lambda removed: perplexity(evaluator.losses([removed])),
        evidence.eps,
        evidence.max_iterations,
        choose=evidence.cuts.lowest,
    )


# ---- criteria that give sets


def _block(first: int, n_remove: int) -> frozenset[int]:
    return frozenset(range(int(first), int(first) + n_remove))


def angular_sets(evidence: Evidence, n_remove: int, n_blocks: int = 1) -> list[Candidate]:
    """Contiguous blocks over which the last token's state turns least, best first (arXiv:2403.17887)."""
    distances = evidence.statistics.angular_distance
    turned = distances.diagonal(n_remove)  # [n_layers - n_remove + 1], by first layer
    blocks = [_block(first, n_remove) for first in turned.argsort(kind="stable")]
    allowed = [block for block in blocks if evidence.cuts.allows(block)]
    return [Candidate(block, "angular") for block in allowed[:n_blocks]]


def tail_sets(evidence: Evidence, n_remove: int) -> list[Candidate]:
    """The last layers."""
    return [Candidate(_block(evidence.n_layers - n_remove, n_remove), "tail")]


def random_sets(evidence: Evidence, n_remove: int) -> list[Candidate]:
    """Layers drawn by the seed; a smaller set lies in a larger one."""
    place = np.random.default_rng(evidence.seed).permutation(evidence.n_layers).argsort()
    return [Candidate(evidence.cuts.lowest(place, n_remove), "random")]


def window_sets(evidence: Evidence, n_remove: int) -> list[Candidate]:
    """Every contiguous block: the losses decide."""
    blocks = [_block(first, n_remove) for first in range(evidence.n_layers - n_remove + 1)]
    return [Candidate(block, "window") for block in blocks if evidence.cuts.allows(block)]


def portfolio_sets(evidence: Evidence, n_remove: int) -> list[Candidate]:
    """The alpha paths of all criteria that fuse (each holds ShortGPT's set at 0), some blocks, the tail."""
    every = [c for name in registry.of_kind("line") for c in _path_sets(name, evidence, n_remove)]
    every += angular_sets(evidence, n_remove, N_BLOCKS) + tail_sets(evidence, n_remove)
    first: dict[frozenset[int], Candidate] = {}
    for candidate in every:
        first.setdefault(candidate.removed, candidate)
    return list(first.values())
