"""The checks of the exercises: the right answer passes, every known mistake is called by its name."""

import importlib

import numpy as np
import pytest

from simdiff_utils.checks import NOT_YET, Exercise

LESSONS = [importlib.import_module(f"simdiff_utils.checks.lesson_{number:02d}") for number in range(1, 7)]
EXERCISES = {
    f"{lesson.__name__.rpartition('.')[2]}.{name}": value
    for lesson in LESSONS
    for name, value in vars(lesson).items()
    if isinstance(value, Exercise)
}


def test_there_are_as_many_as_the_plan_says():
    assert len(EXERCISES) >= 14
    for lesson in LESSONS:
        own = [name for name in EXERCISES if name.startswith(lesson.__name__.rpartition(".")[2])]
        assert len(own) >= 3, lesson.__name__


@pytest.mark.parametrize("name", EXERCISES)
def test_the_right_answer_is_right(name, capsys):
    exercise = EXERCISES[name]
    assert exercise.judge(exercise.right).startswith("Right.")
    exercise(exercise.right)
    assert capsys.readouterr().out.startswith("Right.")


@pytest.mark.parametrize("name", EXERCISES)
def test_every_mistake_that_is_planted_is_called_by_its_name(name):
    exercise = EXERCISES[name]
    said = [exercise.judge(wrong) for wrong, _ in exercise.mistakes]
    assert said == [f"{NOT_YET}: {sentence}" for _, sentence in exercise.mistakes]
    assert len(said) >= (5 if exercise.cases else 1)


@pytest.mark.parametrize("name", EXERCISES)
def test_a_stub_is_not_yet_an_answer_and_nothing_raises(name):
    exercise = EXERCISES[name]
    answers = [..., None, lambda *_: None, lambda *_: ..., lambda *_: 1 / 0, "something else", object()]
    for answer in answers:
        assert exercise.judge(answer).startswith(NOT_YET)


def test_what_is_wrong_in_a_way_that_nobody_foresaw_is_shown_with_its_case():
    twice = Exercise(right=lambda x: 2 * x, cases=[(1.0,), (3.0,)], mistakes=[])
    assert twice.judge(lambda x: x + 1) == "Not yet: for (3) your function gives 4, and it should be 6."
    assert twice.judge(lambda x: [x]) == "Not yet: for (1) your function gives [1.0], and it should be 2."
    assert twice.judge(lambda x: {}["w"]) == "Not yet: your code stops with KeyError: 'w'"
    assert twice.judge(lambda: 1).startswith("Not yet: your code stops with TypeError")
    assert Exercise(right=(1, 2), mistakes=[]).judge((1, 2, 3)) == "Not yet: it is not (1, 2, 3)."


def test_a_right_answer_in_another_dress_is_right():
    first, second, third = (lesson for lesson in LESSONS[:3])
    assert first.masd.judge(lambda a, b: float((b - a).abs().mean())).startswith("Right")
    assert first.masd.judge(lambda a, b: (b - a).abs().mean().reshape(1)).startswith("Right")
    assert first.clean_pairs.judge(lambda n: zip(range(n - 1), range(1, n), strict=True)).startswith("Right")

    def by_numpy(importance, k):
        return np.argsort(importance, kind="stable")[:k]

    assert second.choose_removed.judge(by_numpy).startswith("Right")
    assert second.choose_removed.judge(lambda x, k: by_numpy(x, k).tolist()).startswith("Right")
    assert second.saturated_from.judge(37).startswith("Right")
    assert third.is_it_real.judge(" No difference shown").startswith("Right")


def test_an_answer_that_changes_its_arguments_changes_no_case():
    def in_place(h_in, h_out):
        return h_out.sub_(h_in).square_().sum(-1).mean()

    for _ in range(2):
        assert LESSONS[0].mssd.judge(in_place).startswith("Right")
    sorts = LESSONS[1].choose_removed
    assert sorts.judge(lambda x, k: x.sort() or set(range(k))).startswith(NOT_YET)
    assert sorts.judge(lambda x, k: np.sort(x)[:k]).startswith(NOT_YET)
    assert sorts.judge(lambda x, k: np.argsort(x, kind="stable")[:2]).startswith(NOT_YET)


def test_of_several_numbers_the_first_wrong_one_is_named():
    assert LESSONS[0].scaled_by_ten.judge((1, 10, 10, 10)) == f"{NOT_YET}: number 2 of 4 is not 10."
