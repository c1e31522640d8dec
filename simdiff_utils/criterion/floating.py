"""Searches that evaluate few sets: lazily greedy, and floating from the best set known (ours).

What a layer is worth after others are gone no one-pass number sees: it has to be measured, but not for every
layer at every step.
"""

from collections.abc import Iterable, Iterator

import numpy as np

from simdiff_utils.criterion.candidates import Candidate, Evidence
from simdiff_utils.criterion.cuts import Cuts
from simdiff_utils.criterion.propose import propose
from simdiff_utils.criterion.race import Evaluator, Removed
from simdiff_utils.criterion.search import next_sets

# candidates that the lazy search measures at once: they share what lies before their first difference
BATCH = 2
# of a swap: layers put back (the best), layers taken away for each (the most promising)
N_BACK, N_AWAY = 3, 6


class LazyGreedy:
    """Minoux's lazy greedy search: what a layer cost the step before is an estimate of what it costs now.

    Layers are tried on a first slice of the blocks, in the order of their estimates, until the best of them
    beats every estimate that is left; all that were tried then race. That is plain greedy where increments
    never fall (and the slice orders like the whole); where they do, a layer may be passed over.

    Attributes:
        order: layers in the order of removal: the first k are the answer for k.
        estimates: by layer that is left, the increment of the mean loss last measured, on the first slice.
        asked: the sets whose losses were asked for.
        n_asked: how many these were after each step.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        n_remove: int,
        cuts: Cuts | None = None,
        protected: frozenset[int] = frozenset(),
        batch: int = BATCH,
        **race,
    ) -> None:
        """Search a chain of sets of 1 to n_remove layers; `race` as in `Evaluator.race`, for each step."""
        self.order: list[int] = []
        self.estimates: dict[int, float] = {}
        self.asked: set[Removed] = {frozenset()}
        self.n_asked: list[int] = []
        self._evaluator, self._batch = evaluator, batch
        self._slice = None if race.get("exact") else evaluator.first_slice()
        for step in range(n_remove):
            tried = next_sets(evaluator, self.order, n_remove, protected, cuts)
            measured = self._measure([layer_idx for s in tried for layer_idx in s - {*self.order}])
            self.estimates |= measured
            raced = {step: [frozenset({*self.order, i}) for i in sorted(measured)]}
            (best,) = evaluator.race(raced, **race).winners[step] - {*self.order}
            self.estimates.pop(best)
            self.order.append(best)
            self.n_asked.append(len(self.asked))

    def _measure(self, left: list[int]) -> dict[int, float]:
        """Increments of the most promising layers, as many as it takes."""
        base = self._evaluator.losses([frozenset(self.order)], self._slice).mean()
        unknown = sum(layer_idx not in self.estimates for layer_idx in left)
        waiting = sorted((self.estimates.get(i, -np.inf), i) for i in left)
        measured: dict[int, float] = {}
        while waiting and (not measured or min((loss, i) for i, loss in measured.items()) > waiting[0]):
            size = max(self._batch, unknown - len(measured))  # at first all: nothing is known of them
            tried, waiting = [i for _, i in waiting[:size]], waiting[size:]
            sets = [frozenset({*self.order, i}) for i in tried]
            self.asked |= {*sets}
            losses = self._evaluator.losses(sets, self._slice).mean(1)
            measured |= {i: loss - base for i, loss in zip(tried, losses, strict=True)}
        return measured


class Floating:
    """Floating search (Pudil et al., 1994): layers put back and others taken away, as long as the loss falls.

    A swap puts each removed layer back, and takes from the best `N_BACK` of these sets each of the `N_AWAY`
    layers of the smallest known increment. Where no swap helps, a detour takes one more layer away first.

    Attributes:
        best: the set of lowest loss by now.
        asked: the sets whose losses were asked for, on some blocks at least.
    """

    def __init__(self, evidence: Evidence, known: list[Removed], estimates: dict[int, float]) -> None:
        """Start from the best of some sets of one size.

        Args:
            estimates: by layer, what removing it is thought to cost.
        """
        self._evaluator, self._cuts, self._estimates = evidence.evaluator(), evidence.cuts, estimates
        self._race = {"confidence": evidence.confidence, "exact": evidence.exact}
        self.asked: set[Removed] = set()
        self.best = self._best_of(known)
        while self._improve(self._swaps()) or self._improve(self._detours()):
            pass

    def _improve(self, moves: Iterable[Removed]) -> bool:
        before = self.best
        self.best = self._best_of([before, *filter(self._cuts.allows, moves)])
        return self.best != before

    def _best_of(self, sets: list[Removed]) -> Removed:
        self.asked.update(sets)
        return self._evaluator.race({0: dict.fromkeys(sets)}, **self._race).winners[0]

    def _swaps(self) -> Iterator[Removed]:
        for smaller in self._most_promising(self._put_back(self.best)):
            yield from self._take_away(smaller, self.best)

    def _detours(self) -> Iterator[Removed]:
        if len(self.best) + 1 < self._evaluator.n_layers:
            for larger in self._most_promising(self._take_away(self.best, self.best)):
                yield from self._put_back(larger)

    def _most_promising(self, sets: list[Removed]) -> list[Removed]:
        """The best few by the losses of a first slice."""
        self.asked.update(sets)
        losses = self._evaluator.losses(sets, self._evaluator.first_slice()).mean(1)
        return [sets[place] for place in losses.argsort(kind="stable")[:N_BACK]]

    def _take_away(self, removed: Removed, but: Removed) -> list[Removed]:
        """The set with one more of the layers that promise to cost least."""
        left = [i for i in range(self._evaluator.n_layers) if i not in removed | but | self._cuts.protected]
        left.sort(key=lambda i: (self._estimates.get(i, np.inf), i))
        return [removed | {i} for i in left[:N_AWAY]]

    @staticmethod
    def _put_back(removed: Removed) -> list[Removed]:
        return [removed - {i} for i in sorted(removed)]


def floating_sets(evidence: Evidence, n_remove: int) -> list[Candidate]:
    """What the floating search makes of the portfolio's sets and of what the lazy search reaches."""
    race = {"confidence": evidence.confidence, "exact": evidence.exact}
    lazy = LazyGreedy(evidence.evaluator(), n_remove, evidence.cuts, **race)
    known = [frozenset(lazy.order), *(c.removed for c in propose("portfolio", evidence, n_remove))]
    search = Floating(evidence, known, lazy.estimates)
    return [Candidate(search.best, "floating", n_models=len(search.asked | lazy.asked))]
