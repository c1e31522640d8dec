"""The checks of the exercises: the right answer passes, every known mistake is called by its name."""

import importlib

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
    assert twice.judge(lambda x: x + 1) == "Not yet: for (3) your function gives 4; by hand it is 6."
    assert twice.judge(lambda x: [x]) == "Not yet: for (1) your function gives [1.0]; by hand it is 2."
    assert twice.judge(lambda x: {}["w"]) == "Not yet: your code stops with KeyError: 'w'"
    assert twice.judge(lambda: 1).startswith("Not yet: your code stops with TypeError")
    assert Exercise(right=(1, 2), mistakes=[]).judge((2, 1)) == "Not yet: it is not (2, 1)."
