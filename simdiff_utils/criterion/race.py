"""Losses of many candidate sets of layers: nothing computed twice, the winner of each group found by racing.

Candidates share the layers before their first difference (see `Decoder.run`). A race evaluates all of them on
a first slice of the blocks and drops those that are behind by more than chance; what is left is finished on
all blocks.
"""

import hashlib
import itertools
from collections.abc import Hashable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import pandas as pd
from scipy import stats
from torch import Tensor
from transformers import PreTrainedModel

from simdiff_utils import SimDiffError
from simdiff_utils.engine.decoder import Decoder
from simdiff_utils.engine.perplexity import block_losses
from simdiff_utils.files import read_kept, write_kept

Removed = frozenset[int]
_FIRST_SLICE = 4  # blocks; fewer tell little of how much differences vary


class Edit(Protocol):
    """What is done to a model beside leaving layers out, for as long as a `with` block lasts.

    Attributes:
        key: names the edit in a file's path.
    """

    key: str

    def applied(self, model: PreTrainedModel) -> AbstractContextManager:
        """The model edited, and whole again afterwards."""


@dataclass
class Cost:
    """What evaluating took: tokens through layers, counted for each, and through the head, for each set; the
    sets of which nothing was known before."""

    layer_tokens: int = 0
    head_tokens: int = 0
    n_sets: int = 0


class Evaluator:
    """Losses per block of one model without sets of layers: each is computed once (ever, given a folder).

    Attributes:
        cost: of all that was computed here; what was read from the folder costs nothing.
    """

    def __init__(
        self,
        decoder: Decoder,
        blocks: Tensor,
        batch_size: int = 2,
        folder: Path | None = None,
        edit: Edit | None = None,
    ) -> None:
        """Take a model and token ids [n_blocks, seq_len]; losses are kept in `folder`, a file per set.

        The folder belongs to this model and these blocks: the caller names it after both.

        Args:
            edit: made before any layer is left out; an edited model's losses lie in a folder below.
        """
        self._decoder, self._blocks, self._batch_size, self._folder = decoder, blocks, batch_size, folder
        self._edit = edit
        self._known: dict[Removed, np.ndarray] = {}
        self.cost = Cost()

    @property
    def n_layers(self) -> int:
        """Decoder layers of the model."""
        return self._decoder.n_layers

    @property
    def n_blocks(self) -> int:
        """Blocks in all."""
        return len(self._blocks)

    def first_slice(self) -> np.ndarray:
        """The blocks that a race begins with."""
        return self._order(0)[: _slice_ends(self.n_blocks)[0]]

    def _order(self, seed: int) -> np.ndarray:
        return np.random.default_rng(seed).permutation(self.n_blocks)

    def edited(self, edit: Edit | None) -> "Evaluator":
        """The same for the model edited so, and in no other way."""
        if edit == self._edit:
            return self
        return Evaluator(self._decoder, self._blocks, self._batch_size, self._folder, edit)

    def losses(self, sets: Iterable[Removed], which: np.ndarray | None = None) -> np.ndarray:
        """Mean loss of every block without each set of layers, in nats per token.

        What is not known yet is computed in one pass over the model for all sets that lack the same blocks.

        Args:
            sets: 0-based layer indices to leave out; the empty set is the dense model.
            which: indices of the blocks wanted; None: all.

        Returns:
            float64 [n_sets, n_wanted].

        Raises:
            SimDiffError: as `block_losses`.
        """
        sets = list(sets)
        which = np.arange(self.n_blocks) if which is None else np.asarray(which)
        missing: dict[tuple[int, ...], list[Removed]] = {}
        for removed in dict.fromkeys(sets):
            known = self._look_up(removed)
            blocks = tuple(int(block) for block in np.unique(which) if np.isnan(known[block]))
            if blocks:
                missing.setdefault(blocks, []).append(removed)
        for blocks, new in missing.items():
            self._compute(tuple(new), list(blocks))
        return np.array([self._known[removed][which] for removed in sets])

    def race(
        self,
        groups: Mapping[Hashable, Iterable[Removed]],
        confidence: float = 0.99,
        exact: bool = False,
        seed: int = 0,
    ) -> "Race":
        """The set of lowest loss over all blocks in each group of candidates.

        All groups run side by side on slices of the blocks (drawn at random, each slice as large as all
        before it). After each, a set is dropped from a group if a t-test on the differences per block to the
        group's present leader puts its loss over *all* blocks above the leader's. The blocks not yet seen are
        finite in number, so the variance of the difference carries the factor 1 - n_seen / n_blocks; the
        error allowed, 1 - confidence, is shared out over all comparisons that a winner has to survive
        (Bonferroni).

        Args:
            groups: name -> candidate sets, at least one each; a set may be in several groups.
            confidence: with at least this probability (over the draw of the slices, differences being near
                normal) the winner of a group is that of evaluating everything.
            exact: no racing: every set on every block.
            seed: of the draw.
        """
        if not 0 < confidence < 1 and not exact:
            raise SimDiffError(
                f"confidence must lie between 0 and 1, got {confidence}; exact=True races nothing."
            )
        alive = {name: list(dict.fromkeys(sets)) for name, sets in groups.items()}
        for name, sets in alive.items():
            if not sets:
                raise SimDiffError(
                    f"there is no candidate set in group {name!r}; give at least one to each group."
                )
        order = self._order(seed)
        ends = [self.n_blocks] if exact else _slice_ends(self.n_blocks)
        # Bonferroni: each rival meets the leader after each slice; after the last nothing is in doubt
        n_tests = {name: max(1, (len(sets) - 1) * (len(ends) - 1)) for name, sets in alive.items()}
        log = []
        for n_seen in ends:
            running = {name: sets for name, sets in alive.items() if len(sets) > 1}
            # one pass over the model for all groups: what they share is computed once
            self.losses(dict.fromkeys(itertools.chain(*running.values())), order[:n_seen])
            for name, sets in running.items():
                losses = self.losses(sets, order[:n_seen])  # [n_sets, n_seen], known by now
                kept = _contenders(losses, self.n_blocks, (1 - confidence) / n_tests[name])
                alive[name] = list(itertools.compress(sets, kept))
                told = zip(map(sorted, sets), losses.mean(1), kept, strict=True)
                log += [(name, n_seen, *facts) for facts in told]
        # what is left (one set, or several that nothing tells apart) is finished on all blocks, in one pass
        self.losses(dict.fromkeys(itertools.chain(*alive.values())))
        winners = {name: sets[int(self.losses(sets).mean(1).argmin())] for name, sets in alive.items()}
        return Race(winners, pd.DataFrame(log, columns=["group", "n_blocks", "removed", "loss", "kept"]))

    def _compute(self, sets: tuple[Removed, ...], blocks: list[int]) -> None:
        def count(_layer_idx: int, before: Tensor, _after: Tensor) -> None:
            self.cost.layer_tokens += before.shape[0] * before.shape[1]

        with self._edit.applied(self._decoder.model) if self._edit else nullcontext():
            losses = block_losses(self._decoder, self._blocks[blocks], sets, self._batch_size, observe=count)
        self.cost.head_tokens += len(sets) * len(blocks) * (self._blocks.shape[1] - 1)
        self.cost.n_sets += sum(bool(np.isnan(self._known[removed]).all()) for removed in sets)
        for removed, values in zip(sets, losses, strict=True):
            self._known[removed][blocks] = values
            if self._folder:
                kept = [None if np.isnan(value) else value for value in self._known[removed].tolist()]
                write_kept(self._path(removed), {"removed": sorted(removed), "losses": kept})

    def _look_up(self, removed: Removed) -> np.ndarray:
        if removed not in self._known:
            stored = (self._folder and read_kept(self._path(removed))) or {}
            self._known[removed] = np.array(stored.get("losses") or [None] * self.n_blocks, dtype=np.float64)
        return self._known[removed]

    def _path(self, removed: Removed) -> Path:
        folder = self._folder / self._edit.key if self._edit else self._folder
        name = "-".join(["without", *map(str, sorted(removed))]) if removed else "dense"
        if len(name) > 120:  # file systems end names at 255 bytes
            name = "without-" + hashlib.sha256(name.encode()).hexdigest()[:32]
        return folder / f"{name}.json"


@dataclass(frozen=True)
class Race:
    """Outcome of a race.

    Attributes:
        winners: group -> the set of lowest loss.
        log: one row per (group, slice, set still in the race): n_blocks seen, removed (a sorted list), mean
            loss so far, kept (False: dropped here).
    """

    winners: dict[Hashable, Removed]
    log: pd.DataFrame


def _slice_ends(n_blocks: int) -> list[int]:
    """How many blocks have been seen after each slice."""
    ends = [min(_FIRST_SLICE, n_blocks)]
    while ends[-1] < n_blocks:
        ends.append(min(2 * ends[-1], n_blocks))
    return ends


def _contenders(losses: np.ndarray, n_blocks: int, doubt: float) -> np.ndarray:
    """Which sets may still have the lowest mean over all blocks, bool [n_sets]; losses [n_sets, n_seen]."""
    n_seen = losses.shape[1]
    if n_seen < 2:
        return np.ones(len(losses), dtype=bool)
    behind = losses - losses[losses.mean(1).argmin()]  # [n_sets, n_seen]
    unseen = max(0.0, 1 - n_seen / n_blocks)
    margin = stats.t.ppf(1 - doubt, n_seen - 1) * behind.std(1, ddof=1) * np.sqrt(unseen / n_seen)
    return behind.mean(1) <= margin


def verdict(same_set: bool, low: float, high: float) -> str:
    """What an interval of a ratio of perplexities says: "same set", "better", "worse", or, where it holds 1,
    "no difference shown"."""
    if same_set:
        return "same set"
    return "better" if high < 1 else "worse" if low > 1 else "no difference shown"
