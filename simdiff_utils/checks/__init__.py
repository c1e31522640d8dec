"""Checks of the exercises in notebooks/exercises: an answer is held to the right one, and the commonest
mistakes are known by name.

A lesson's exercises are `Exercise`s of its module, such as `lesson_01.mssd`; called with an answer, one
prints a friendly sentence.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

NOT_YET = "Not yet"


@dataclass(frozen=True)
class Exercise:
    """A question with its answer.

    Attributes:
        right: the answer: a function, or a value.
        mistakes: what somebody who makes a common mistake answers, and a sentence that helps.
        cases: arguments on which functions are tried, a tuple each.
        why: said beside "Right".
    """

    right: object
    mistakes: Sequence[tuple[object, str]]
    cases: Sequence[tuple] = ()
    why: str = field(default="", repr=False)

    def __call__(self, answer: object) -> None:
        """Print what there is to say of an answer."""
        print(self.judge(answer))

    def judge(self, answer: object) -> str:
        """One sentence: right, a mistake by its name, or the first case that comes out otherwise."""
        if answer is ... or answer is None:
            return f"{NOT_YET}: put your answer in the place of the three dots."
        try:
            given = self._results(answer)
        except Exception as error:  # whatever a learner's code raises is something to be told, not to stop at
            return f"{NOT_YET}: your code stops with {type(error).__name__}: {error}"
        if all(value is None or value is ... for value in given):
            return f"{NOT_YET}: your function returns nothing; it ends with `return`."
        expected = self._results(self.right)
        if all(map(_alike, given, expected)):
            return f"Right. {self.why}".strip()
        for wrong, sentence in self.mistakes:
            if all(map(_alike, given, self._results(wrong))):
                return f"{NOT_YET}: {sentence}"
        return f"{NOT_YET}: {self._difference(given, expected)}"

    def _results(self, answer: object) -> list:
        if not self.cases or (self.cases == [()] and not callable(answer)):
            return [answer]
        found = [answer(*copy.deepcopy(case)) for case in self.cases]  # an answer may change what it is given
        return [list(value) if isinstance(value, Iterator) else value for value in found]

    def _difference(self, given: list, expected: list) -> str:
        if (
            isinstance(expected[0], tuple)
            and isinstance(given[0], tuple)
            and len(given[0]) == len(expected[0])
        ):
            place = next(i for i, pair in enumerate(zip(*given, *expected, strict=True)) if not _alike(*pair))
            return f"number {place + 1} of {len(expected[0])} is not {_words(given[0][place])}."
        if not any(self.cases):
            return f"it is not {_words(given[0])}."
        number = next(i for i, pair in enumerate(zip(given, expected, strict=True)) if not _alike(*pair))
        arguments = ", ".join(map(_words, self.cases[number]))
        return (
            f"for ({arguments}) your function gives {_words(given[number])}, and it should be "
            f"{_words(expected[number])}."
        )


def _alike(given: object, expected: object) -> bool:
    """Equal: numbers up to rounding, arrays in shape and values, collections item by item; a set also as a
    list, words in any case."""
    if isinstance(expected, str):
        return isinstance(given, str) and given.strip().casefold() == expected.casefold()
    if isinstance(expected, (set, frozenset)):
        items = list(given) if isinstance(given, (set, frozenset, list, tuple, np.ndarray)) else []
        return len(items) == len(expected) and set(items) == expected
    if isinstance(expected, dict):
        return (
            isinstance(given, dict)
            and given.keys() == expected.keys()
            and _alike(list(given.values()), [expected[key] for key in given])
        )
    if isinstance(expected, (list, tuple)) and isinstance(given, (list, tuple)):
        return len(given) == len(expected) and all(map(_alike, given, expected))
    try:
        one, two = (np.asarray(_plain(value), dtype=np.float64) for value in (given, expected))
    except (TypeError, ValueError):
        return False
    if two.ndim == 0 and one.size == 1:  # one number, however it is wrapped
        one = one.reshape(())
    return one.shape == two.shape and np.allclose(one, two, rtol=1e-3, atol=1e-6, equal_nan=True)


def _plain(value: object) -> object:
    return value.detach().cpu().double().numpy() if isinstance(value, torch.Tensor) else value


def _words(value: object) -> str:
    """A value as a reader wants to see it: short."""
    if isinstance(value, (torch.Tensor, np.ndarray)):
        array = np.asarray(_plain(value))
        return f"{array.round(4).tolist()}" if array.size <= 8 else f"an array of shape {array.shape}"
    return f"{value:.6g}" if isinstance(value, float) else repr(value)
