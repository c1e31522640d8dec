"""Fixtures of all tests; what they are made of stands in `helpers`. No test may ask the hub."""

import json
import os
import random
from collections.abc import Callable
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported, so before anything else is

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from simdiff_utils.run import Run
from simdiff_utils.settings import Settings
from tests.helpers import FAMILIES, VOCAB_SIZE, build_tiny, build_tokenizer, words, write_rows

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers share the cores


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests last: a mistake shows before the real model is loaded."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    """A test that asks for this runs once per family."""
    return request.param


@pytest.fixture(scope="session")
def make_tiny():
    """The function `build_tiny`."""
    return build_tiny


@pytest.fixture
def tiny(make_tiny, family):
    """A fresh tiny random model of the family at hand."""
    return make_tiny(family)


@pytest.fixture
def llama(make_tiny):
    """A fresh tiny random model of the commonest family."""
    return make_tiny("llama")


@pytest.fixture
def blocks() -> torch.Tensor:
    """Random token ids [5, 20], none of them special; longer than the sliding windows."""
    return torch.randint(3, VOCAB_SIZE, (5, 20), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of 97 words."""
    return build_tokenizer()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory, make_tiny, tokenizer) -> Path:
    """A folder with a model of 6 layers and its tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    make_tiny("llama").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory) -> Path:
    """A file of 60 documents that the tiny tokenizer knows."""
    path = tmp_path_factory.mktemp("texts") / "rows.jsonl"
    rows = [{"text": " ".join(f"w{3 + (i * i + j * j) % 60}" for j in range(80))} for i in range(60)]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def settings(tiny_model, tiny_text) -> Settings:
    """A run on the tiny model that evaluates every candidate; a module may have settings of its own."""
    return Settings(
        model=str(tiny_model),
        text=str(tiny_text),
        n_samples=4,
        seq_len=16,
        n_validation=12,
        n_test=6,
        criteria=["cosine", "masd", "relative", "portfolio"],
        n_remove_grid=[1, 2, 4],
        n_remove=2,
        exact=True,
    )


@pytest.fixture
def make_run(settings, tmp_path, monkeypatch) -> Callable[..., Run]:
    """Function: settings that differ -> a run with a folder of the test's own."""
    monkeypatch.setenv("SIMDIFF_RUNS", str(tmp_path / "runs"))
    return lambda **differing: Run(settings.replace(**differing))


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory) -> Path:
    """A data folder: 12 random rows of each task, some longer than the tiny models' context of 64 tokens, and
    a text in the place of WikiText-2's test split, with headings and blank lines."""
    root, rng = tmp_path_factory.mktemp("data"), random.Random(0)

    def some(low: int = 1, high: int = 4) -> str:
        return words(rng, low, high)

    def four() -> list[str]:
        return [some() for _ in range(4)]

    rows = {
        "piqa/validation": lambda i: {"goal": some(1, 20), "sol1": some(), "sol2": some(), "label": i % 2},
        "arc_easy/test": lambda i: {
            "id": str(i),
            "question": some(1, 9),
            "answerKey": "ABCD"[i % 4],
            "choices": {"text": four(), "label": list("ABCD")},
        },
        "arc_challenge/test": lambda i: {
            "id": str(i),
            "question": some(1, 9),
            "answerKey": "ABCD"[i % 4],
            "choices": {"text": four(), "label": list("ABCD")},
        },
        "openbookqa/test": lambda i: {
            "id": str(i),
            "question_stem": some(1, 9),
            "answerKey": "ABCD"[i % 4],
            "choices": {"text": four(), "label": list("ABCD")},
        },
        "boolq/validation": lambda i: {"passage": some(1, 90), "question": some(), "idx": i, "label": i % 2},
        "winogrande/validation": lambda i: {
            "sentence": f"{some()} _ {some()}",
            "option1": some(1, 1),
            "option2": some(1, 1),
            "answer": str(1 + i % 2),
        },
        "mathqa/test": lambda i: {
            "Problem": some(1, 30),
            "correct": "abcde"[i % 5],
            "options": " , ".join(f"{letter} ) {some()}" for letter in "abcde"),
        },
        "hellaswag/validation": lambda i: {
            "activity_label": some(),
            "ctx_a": some(),
            "ctx_b": some(),
            "ctx": "",
            "endings": four(),
            "label": str(i % 4),
        },
        "race/high_test": lambda i: {
            "article": some(1, 40),
            "problems": str(
                [{"question": some(), "answer": "ABCD"[i % 4], "options": four()} for _ in range(1 + i % 3)]
            ),
        },
        "c3/test": lambda i: {
            "content": some(1, 9),
            "question": some(),
            "choices": four()[: 2 + i % 3],
            "label": i % 2,
        },
        "ocnli/validation": lambda i: {"premise": some(), "hypothesis": some(), "label": i % 3},
    }
    for name, make in rows.items():
        write_rows(root / f"{name}.jsonl.gz", [make(i) for i in range(12)])
    turns = {"input_text": [some(), some()], "turn_id": [1, 2]}
    write_rows(
        root / "coqa" / "validation.jsonl",
        [
            {"story": some(1, 30), "questions": turns, "answers": turns, "additional_answers": {}}
            for _ in range(4)
        ],
    )
    lines = []
    for i in range(12):
        lines += [
            " ",
            f" = w{3 + i} = ",
            " ",
            " " + " ".join(f"w{3 + (7 * i + j * j) % 80}" for j in range(9 + i)) + " ",
        ]
    (root / "wikitext2").mkdir()
    (root / "wikitext2" / "wiki.test.raw").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root
