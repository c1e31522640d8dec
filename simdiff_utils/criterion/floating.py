"""A search that evaluates few sets: lazily greedy, and floating.

What a layer is worth after others are gone no one-pass number sees: it has to be measured, but not for every
layer at every step, nor on all of the text. The search looks at a first slice; its best few sets then race on
all blocks.
"""

from collections.abc import Callable, Iterable

import numpy as np

from simdiff_utils.criterion.candidates import Candidate, Evidence
from simdiff_utils.criterion.cuts import Cuts
from simdiff_utils.criterion.propose import N_BLOCKS, angular_sets
from simdiff_utils.criterion.race import Evaluator, Removed
from simdiff_utils.criterion.search import next_sets

BATCH = 4  # layers tried at once: the sets share what lies before their first difference
N_BACK = 1  # sets that the floating search asks for after each step, with a layer put back
N_FINALISTS = 4  # sets that race on all blocks


class Chain:
    """A set for every number of layers, each one layer more than the best one before it.

    Minoux's lazy greedy search: what a layer cost when it was last measured is an estimate of what it costs
    now. Layers are tried in the order of their estimates until the best of them beats every estimate that is
    left. That is plain greedy where increments never fall; where they do, a layer may be passed over.

    With `n_back` it floats (Pudil et al., 1994): after each step the layer that cost most is put back (of
    those not tried yet, and so many of them), and where that betters the best set known of one layer fewer,
    the search goes on from there.

    Attributes:
        losses: of each set asked for, the mean over the first slice of the blocks.
        best: by number of layers, the set of lowest loss among them.
        estimates: by layer, the increment last measured.
        n_asked: how many sets had been asked for at each number of layers.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        n_remove: int,
        cuts: Cuts | None = None,
        protected: frozenset[int] = frozenset(),
        n_back: int = 0,
        others: Callable[[int], Iterable[Removed]] = lambda _n_removed: (),
        batch: int = BATCH,
        exact: bool = False,
    ) -> None:
        """Search sets of 1 to n_remove layers.

        Args:
            others: sets of so many layers from elsewhere; the chain goes on from one that is better.
            exact: look at all blocks, not at a slice of them.
        """
        self._evaluator, self._slice = evaluator, None if exact else evaluator.first_slice()
        self.losses, self.best, self.estimates = {}, {}, {}
        self._ask([frozenset()])
        self.n_asked, k = [1], 0
        while k < n_remove:
            self._extend(next_sets(evaluator, sorted(self.best[k]), n_remove, protected, cuts), batch)
            k += 1
            self._ask(others(k))
            self.n_asked[k:] = [len(self.losses)]
            while k > 1 and self._put_back(k, n_back):
                k -= 1

    def _ask(self, sets: Iterable[Removed]) -> bool:
        """Whether one of these sets betters the best of its size; of equal ones the one of earlier layers."""
        new = [removed for removed in dict.fromkeys(sets) if removed not in self.losses]
        means = self._evaluator.losses(new, self._slice).mean(1) if new else ()
        self.losses |= dict(zip(new, map(float, means), strict=True))
        before = dict(self.best)
        for removed in new:
            present = self.best.setdefault(len(removed), removed)
            self.best[len(removed)] = min(present, removed, key=lambda s: (self.losses[s], sorted(s)))
        return self.best != before

    def _extend(self, larger: list[Removed], batch: int) -> None:
        """Try one layer more, as many as it takes."""
        before = self.best[len(larger[0]) - 1]
        waiting = sorted((self.estimates.get(i, -np.inf), i, s) for s in larger for i in s - before)
        unknown = sum(estimate == -np.inf for estimate, *_ in waiting)  # at first all: they are tried at once
        measured: list[tuple[float, int]] = []
        while waiting and (not measured or min(measured) > waiting[0][:2]):
            size = max(batch, unknown - len(measured))
            tried, waiting = waiting[:size], waiting[size:]
            self._ask(removed for *_, removed in tried)
            measured += [(self.losses[s] - self.losses[before], i) for _, i, s in tried]
        self.estimates |= {layer_idx: increment for increment, layer_idx in measured}

    def _put_back(self, k: int, n_back: int) -> bool:
        removed = self.best[k]
        dearest = sorted(removed, key=lambda i: (-self.estimates.get(i, np.inf), i))
        smaller = [s for s in (removed - {layer_idx} for layer_idx in dearest) if s not in self.losses]
        return self._ask(smaller[:n_back])


def floating_sets(evidence: Evidence, n_remove: int) -> list[Candidate]:
    """The best sets of the floating search, which also looks at blocks of layers that turn the state little.

    It goes one layer further than asked, so that one may be put back; and it looks at the same numbers of
    layers on its way whatever n_remove is, so that a grid takes hardly more than its largest number.
    """
    n_layers, cuts = evidence.n_layers, evidence.cuts
    stride = max(2, round(n_layers / 10))
    further = not evidence.kinds and n_remove + 1 < n_layers - len(cuts.protected)
    end = n_remove + further

    def blocks(k: int) -> Iterable[Removed]:
        found = angular_sets(evidence, k, N_BLOCKS) if k % stride == 0 or k == n_remove else ()
        return (c.removed for c in found if cuts.completes(c.removed, end, frozenset()))

    chain = Chain(evidence.evaluator(), end, cuts, n_back=N_BACK, others=blocks, exact=evidence.exact)
    found = sorted((s for s in chain.losses if len(s) == n_remove), key=chain.losses.get)[:N_FINALISTS]
    n_others = len(chain.losses) - len(found)
    return [Candidate(removed, "floating", n_models=n_others) for removed in found]
