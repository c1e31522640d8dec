"""The exercises: with the stubs as they are every check says "not yet", with the solutions all pass."""

import contextlib
import io
import json
import re
from pathlib import Path

import pytest

from simdiff_utils.checks import NOT_YET

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
EXERCISES = sorted((NOTEBOOKS / "exercises").glob("*.ipynb"))


def read(path):
    """[(kind, tags, source)] of a notebook's cells."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [(cell["cell_type"], cell["metadata"].get("tags", []), "".join(cell["source"])) for cell in cells]


def solutions_of(cells):
    """The code in each cell's folded solution, in order."""
    found = [re.search(r"<summary>Solution</summary>\s*```python\n(.*?)```", s, re.S) for _, _, s in cells]
    return [match[1] for match in found if match]


def run(cells, solutions=None):
    """What each check prints; stubs replaced by the solutions where they are given."""
    said, names, solutions = [], {}, iter(solutions or [])
    for kind, tags, source in cells:
        if kind != "code":
            continue
        if "stub" in tags:
            source = next(solutions, source)
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(source, "cell", "exec"), names)
        if "check" in tags:
            said.append(printed.getvalue())
    return said


def test_every_lesson_has_its_exercises():
    lessons = sorted(path.name for path in NOTEBOOKS.glob("0[1-6]_*.ipynb"))
    assert [path.name for path in EXERCISES] == lessons
    assert sum(len(solutions_of(read(path))) for path in EXERCISES) >= 14


@pytest.mark.parametrize("path", EXERCISES, ids=lambda path: path.stem)
def test_the_stubs_are_not_yet_answers_and_the_solutions_are_right(path):
    cells = read(path)
    stubs, solutions = [tags for _, tags, _ in cells if "stub" in tags], solutions_of(cells)
    assert len(stubs) == len(solutions) >= 3
    as_they_are, solved = run(cells), run(cells, solutions)
    assert len(as_they_are) == len(stubs) and all(words.startswith(NOT_YET) for words in as_they_are)
    assert len(solved) == len(stubs) and all(words.startswith("Right.") for words in solved), solved


@pytest.mark.parametrize("path", EXERCISES, ids=lambda path: path.stem)
def test_each_exercise_says_its_kind_difficulty_and_minutes_and_folds_its_solution(path):
    cells = read(path)
    heads = [source for kind, _, source in cells if kind == "markdown" and re.match(r"## \d", source)]
    assert len(heads) == len(solutions_of(cells))
    for head in heads:
        assert re.search(r"\*(write|predict|judge)\* · difficulty [★☆]{3} · \d+ minutes", head)
    folded = [source for _, _, source in cells if "<summary>Solution" in source]
    assert all(source.count("<details>") == source.count("</details>") == 2 for source in folded)
    for link in re.findall(r"\]\((\.\./[^)]+)\)", " ".join(source for _, _, source in cells)):
        assert (path.parent / link).exists(), link
    assert not any(len(line) > 110 for kind, _, s in cells if kind == "code" for line in s.splitlines())
