"""Benchmark tasks in process against lm-eval's own model, dense and built by hand without the layers."""

import copy
import json
import logging
import os
import random
import subprocess
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

import lm_eval
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers.utils import logging as transformers_logging

from simdiff_utils import SimDiffError
from simdiff_utils.comparison.tasks import jobs
from simdiff_utils.comparison.tasks.evaluate import COLUMNS, evaluate_tasks
from simdiff_utils.comparison.tasks.lm import SetsLM
from simdiff_utils.comparison.tasks.load import TaskData
from simdiff_utils.comparison.tasks.suites import BLANK, SUITES, average_accuracy
from simdiff_utils.engine.decoder import Decoder, stream_decoder
from simdiff_utils.files import repository_root
from simdiff_utils.pruning.export import export_pruned
from tests.helpers import SETS, build_by_hand, words, write_rows

DENSE = frozenset()
PRUNED = frozenset({1, 4})
SCORED = ("piqa", "arc_easy", "boolq", "winogrande", "mathqa", "hellaswag", "race", "c3", "ocnli")
FACTS = {
    "model": "tiny",
    "source": "tiny",
    "hub_id": None,
    "criterion": "masd",
    "alpha": 0.25,
    "text": "words",
    "calibration": "4 samples",
    "machine": "a machine",
    "scores": [0.1] * 6,
    "measured": {},
}


@pytest.fixture
def data(data_folder) -> TaskData:
    return TaskData(data_folder, ("folder",))


def requests_of(rng: random.Random) -> list[Instance]:
    """Contexts of 0 to 80 tokens, continuations of 1 to 6; some share all but their last word, some all of
    it."""
    pairs = [(words(rng, n, n), " " + words(rng, 1, 6)) for n in (*range(0, 20), 40, 60, 61, 63, 64, 80)]
    pairs += [(context, f" w{last}") for context in (pairs[3][0], pairs[-1][0]) for last in (5, 6, 5)]
    pairs += [(f"{pairs[7][0]} w9", " w8"), (pairs[7][0], " w9 w8")]  # one input, cut in two places
    rng.shuffle(pairs)
    return [
        Instance("loglikelihood", {}, (context, continuation.lstrip() if not context else continuation), i)
        for i, (context, continuation) in enumerate(pairs)
    ]


def same(found: list, expected: list) -> None:
    torch.testing.assert_close(
        torch.tensor([a for a, _ in found]), torch.tensor([a for a, _ in expected]), rtol=1e-4, atol=1e-4
    )
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


def as_lm_eval_does(model, tokenizer, **options) -> HFLM:
    return HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=3, **options)


# ---- answers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "batch_tokens"),
    [
        *((name, 64) for name in ("llama", "gemma3", "gpt2", "falcon", "mixtral", "cohere2", "opt")),
        *(("llama", batch_tokens) for batch_tokens in (1, 10_000)),
    ],
)
def test_answers_equal_lm_evals_own_model(make_tiny, tokenizer, name, batch_tokens):
    model, asked = make_tiny(name), requests_of(random.Random(1))
    sets = (DENSE, *SETS)
    answers = SetsLM(Decoder(model), copy.deepcopy(tokenizer), sets, batch_tokens)
    found = {}
    for answers.removed in sets:
        found[answers.removed] = answers.loglikelihood(asked)
        built = build_by_hand(model, answers.removed)
        # its cache (lm-eval 0.4.13) reads the wrong position where one input is cut in two places
        same(
            found[answers.removed], as_lm_eval_does(built, tokenizer, logits_cache=False).loglikelihood(asked)
        )
    assert all(abs(found[DENSE][0][0] - found[removed][0][0]) > 1e-2 for removed in SETS)


def test_what_greedy_decoding_gives_is_known(llama, tokenizer):
    from simdiff_utils.engine.load import generate_text

    context = "w3 w4 w5"
    written = generate_text(llama, tokenizer, context, 3).removeprefix(context)
    other = " ".join(["w3" if written.split()[0] != "w3" else "w4", *written.split()[1:]])
    asked = [
        Instance("loglikelihood", {}, (context, text), i) for i, text in enumerate([written, f" {other}"])
    ]
    answers = SetsLM(Decoder(llama), copy.deepcopy(tokenizer), (DENSE,)).loglikelihood(asked)
    assert [greedy for _, greedy in answers] == [True, False]
    assert answers[0][0] > answers[1][0]


def test_streamed_answers_equal_those_in_memory(make_tiny, tokenizer, tiny_model):
    asked, sets = requests_of(random.Random(2)), (DENSE, PRUNED)
    streamed = SetsLM(stream_decoder(tiny_model, "float32"), copy.deepcopy(tokenizer), sets)
    in_memory = SetsLM(Decoder(make_tiny("llama")), copy.deepcopy(tokenizer), sets)
    for streamed.removed in sets:
        in_memory.removed = streamed.removed
        same(streamed.loglikelihood(asked), in_memory.loglikelihood(asked))


def test_tokenizers_without_special_tokens_are_refused(llama, tokenizer):
    bare = copy.deepcopy(tokenizer)
    bare.eos_token = None
    written = Instance(
        "generate_until", {}, ("w3 w4", {"until": ["w9"], "max_gen_toks": 4}), 0, ("gsm8k", 0, 1)
    )
    with pytest.raises(SimDiffError, match="gsm8k has the model write text until its tokenizer's EOS token"):
        SetsLM(Decoder(llama), bare, (DENSE,)).generate_until([written])
    bare.bos_token = None
    with pytest.raises(SimDiffError, match="BOS or EOS token, and it has neither: name eos_token"):
        SetsLM(Decoder(llama), bare, (DENSE,))


def test_every_input_is_run_once_for_all_sets(llama, tokenizer, data, monkeypatch):
    decoder, ran = Decoder(llama), []
    run = decoder.run
    monkeypatch.setattr(
        decoder, "run", lambda batches, *args, **kwargs: ran.append(batches) or run(batches, *args, **kwargs)
    )
    evaluate_tasks(decoder, tokenizer, (DENSE, *SETS), ["boolq"], data, batch_tokens=200)
    (batches,) = ran  # one pass
    assert sum(len(batch) for batch in batches) == 12  # "yes" and "no" after each question share their input
    assert all(batch.numel() <= 200 for batch in batches)
    n_tokens = [batch.shape[1] for batch in batches]
    assert n_tokens == sorted(n_tokens, reverse=True)


def test_no_logits_are_kept_for_a_gradient(llama, tokenizer, monkeypatch):
    decoder, seen = Decoder(llama), []
    logits = decoder.logits
    monkeypatch.setattr(decoder, "logits", lambda hidden: seen.append(logits(hidden)) or seen[-1])
    SetsLM(decoder, copy.deepcopy(tokenizer), (DENSE,)).loglikelihood(requests_of(random.Random(4)))
    assert seen and not any(each.requires_grad for each in seen)  # else all of a task's stay until its end


# ---- results -------------------------------------------------------------------------------------


def lm_evals_results(model, tokenizer, data, task, **options) -> dict[str, tuple]:
    built = data.find(task).build()
    built.set_config("num_fewshot", 0)
    found = lm_eval.evaluate(as_lm_eval_does(model, tokenizer), {"tasks": {task: built}}, **options)
    return {
        name.partition(",")[0]: (value, found["results"][task][name.replace(",", "_stderr,")])
        for name, value in found["results"][task].items()
        if name.endswith(",none") and "_stderr" not in name
    }


def test_results_equal_lm_evals_on_the_model_built_by_hand(llama, tokenizer, data):
    table = evaluate_tasks(Decoder(llama), tokenizer, [DENSE, PRUNED], SCORED, data)
    assert list(table) == COLUMNS
    for removed in (DENSE, PRUNED):
        built = build_by_hand(llama, removed)
        for task in SCORED:
            here = table[
                (table["task"] == task) & table["removed"].map(lambda one, it=removed: one == sorted(it))
            ]
            expected = lm_evals_results(built, tokenizer, data, task)
            assert dict(
                zip(here["metric"], zip(here["value"], here["stderr"], strict=True), strict=True)
            ) == {metric: pytest.approx(pair) for metric, pair in expected.items()}
    facts = table[table["task"] == "arc_easy"].iloc[0]
    assert (facts["source"], facts["split"], facts["n_samples"]) == ("folder", "test", 12)
    assert facts["data_sha256"] == data.find("arc_easy").sha256 and facts["task_version"] == "1.0"
    assert set(table[table["task"] == "hellaswag"]["metric"]) == {"acc", "acc_norm"}
    for row in table.itertuples():  # a bit for each question
        assert len(row.hits) == row.n_samples
        assert row.hits.count("1") / len(row.hits) == pytest.approx(row.value)


def test_limit_takes_the_first_documents(llama, tokenizer, data):
    table = evaluate_tasks(Decoder(llama), tokenizer, [DENSE], ["piqa"], data, limit=5)
    expected = lm_evals_results(llama, tokenizer, data, "piqa", limit=5)
    assert set(table["n_samples"]) == {5} and set(table["limit"]) == {5}
    assert dict(zip(table["metric"], table["value"], strict=True)) == {
        k: pytest.approx(v) for k, (v, _) in expected.items()
    }
    one = evaluate_tasks(Decoder(llama), tokenizer, [DENSE], ["piqa"], data, limit=1)
    assert one["stderr"].isna().all() and one["value"].notna().all()  # a single document has no spread


def test_written_answers_equal_those_of_the_model_built_by_hand(make_tiny, tokenizer, data):
    model = make_tiny("llama", max_position_embeddings=128)
    data.find("coqa").config["generation_kwargs"]["max_gen_toks"] = 40  # lm-eval lets CoQA write 256
    task = data.find("coqa").build()
    task.build_all_requests(limit=1, rank=0, world_size=1)
    answers = SetsLM(Decoder(model), copy.deepcopy(tokenizer), (DENSE, PRUNED))
    written = []
    for answers.removed in (DENSE, PRUNED):
        written.append(answers.generate_until(task.instances))
        built = build_by_hand(model, answers.removed)
        assert written[-1] == HFLM(pretrained=built, tokenizer=copy.deepcopy(tokenizer)).generate_until(
            task.instances
        )
    assert written[0] != written[1]
    table = evaluate_tasks(Decoder(model), tokenizer, [PRUNED], ["coqa"], data, limit=1)
    assert dict(zip(table["metric"], table["value"], strict=True)) == task.process_results(
        task.eval_docs[0], written[1]
    )


def test_the_chat_template_reaches_the_model(llama, tokenizer, data):
    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = "w90 {{ messages[0]['content'] }} w91 "
    plain = evaluate_tasks(Decoder(llama), chatty, [DENSE], ["piqa"], data)
    table = evaluate_tasks(Decoder(llama), chatty, [DENSE], ["piqa"], data, chat_template=True)
    expected = lm_evals_results(llama, chatty, data, "piqa", apply_chat_template=True)
    assert dict(zip(table["metric"], table["value"], strict=True)) == {
        metric: pytest.approx(value) for metric, (value, _) in expected.items()
    }
    assert list(plain["value"]) != list(table["value"])  # another question, another answer


# ---- kept results --------------------------------------------------------------------------------


class Loader:
    """Loads the model, and knows how often."""

    def __init__(self, model) -> None:
        self.model, self.n_loaded = model, 0

    def __call__(self) -> Decoder:
        self.n_loaded += 1
        return Decoder(self.model)


def test_known_results_are_read_without_the_model(llama, tokenizer, data, tmp_path):
    load, given = (
        Loader(llama),
        dict(sets=[DENSE, PRUNED], tasks=["piqa", "boolq"], data=data, folder=tmp_path),
    )
    first = evaluate_tasks(load, tokenizer, **given)
    assert load.n_loaded == 1 and len(list(tmp_path.glob("*.json"))) == 4
    tokenizer(
        "w3", padding="max_length", max_length=9, truncation=True
    )  # leaves its mark in a fast tokenizer
    again = evaluate_tasks(load, tokenizer, **given)
    assert load.n_loaded == 1
    pd.testing.assert_frame_equal(first, again)
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")}
    evaluate_tasks(load, tokenizer, **given | {"sets": [PRUNED, frozenset({2})], "tasks": ["boolq"]})
    assert load.n_loaded == 2 and len(list(tmp_path.glob("*.json"))) == 5
    assert kept == {path: path.stat().st_mtime_ns for path in kept}, "what was known is not computed again"


@pytest.mark.parametrize("change", ["limit", "identity", "chat_template", "tokenizer", "rows", "set"])
def test_whatever_a_result_depends_on_makes_another(llama, tokenizer, data_folder, tmp_path, change):
    rows = tmp_path / "rows" / "piqa" / "validation.jsonl"
    made = [{"goal": "w3", "sol1": "w4", "sol2": "w5", "label": i % 2} for i in range(4)]
    write_rows(rows, made)
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    load, given = (
        Loader(llama),
        dict(sets=[DENSE], tasks=["piqa"], folder=tmp_path, identity={"weights": "a"}),
    )
    evaluate_tasks(load, tokenizer, data=TaskData(tmp_path / "rows"), **given)
    if change == "tokenizer":
        tokenizer.add_tokens(["new"])
    elif change == "rows":
        write_rows(rows, made[::-1])
    else:
        given |= {
            "limit": {"limit": 3},
            "identity": {"identity": {"weights": "b"}},
            "chat_template": {"chat_template": True},
            "set": {"sets": [PRUNED]},
        }[change]
    for _ in range(2):
        evaluate_tasks(load, tokenizer, data=TaskData(tmp_path / "rows"), **given)
    assert load.n_loaded == 2


def test_results_that_were_measured_are_found_by_the_same_key(tmp_path):
    stored = (repository_root() / "figures" / "06_ledger.jsonl").read_text(encoding="utf-8").splitlines()
    stored = [row for row in map(json.loads, stored) if "/tasks/" in row["file"]]
    assert stored
    for row in stored:
        results, facts = row["data"]["results"], row["data"]["depends_on"]
        assert jobs._path(tmp_path, frozenset(results[0]["removed"]), facts).name == Path(row["file"]).name


def test_what_a_result_depends_on_is_what_it_always_was(data):
    """A fact more or less would lose all results that were measured, see the ledger."""
    stored = (repository_root() / "figures" / "06_ledger.jsonl").open(encoding="utf-8")
    known = next(row["data"]["depends_on"] for row in map(json.loads, stored) if "/tasks/" in row["file"])
    ours = ("lm_eval", "tokenizer", "limit", "chat_template", "identity")  # given by evaluate_tasks
    job = jobs.Job.plan(data.find("piqa"), {name: known[name] for name in ours}, (DENSE,), None)
    assert set(job.facts) == set(known)
    assert (
        (job.facts["n_shots"], job.facts["shots_sha256"])
        == (0, "")
        == (known["n_shots"], known["shots_sha256"])
    )


def test_a_run_that_was_cut_off_goes_on_at_its_task(llama, tokenizer, data, tmp_path, monkeypatch):
    decoder, whole, ran = Decoder(llama), SetsLM._loglikelihood_tokens, []

    def cut_off(self, requests, **kwargs):
        ran.append(len(requests))
        if len(ran) == 2:
            raise KeyboardInterrupt
        return whole(self, requests, **kwargs)

    monkeypatch.setattr(SetsLM, "_loglikelihood_tokens", cut_off)
    given = dict(sets=[DENSE, PRUNED], tasks=["piqa", "boolq", "c3"], data=data, folder=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        evaluate_tasks(decoder, tokenizer, **given)
    assert len(list(tmp_path.glob("piqa-*.json"))) == len(list(tmp_path.glob("*.json"))) == 2
    evaluate_tasks(decoder, tokenizer, **given)
    assert len(ran) == 4 and len(list(tmp_path.glob("*.json"))) == 6  # piqa, boolq cut off; boolq, c3


def test_nothing_outside_is_changed(llama, tokenizer, data, capfd, caplog):
    before, as_it_was = copy.deepcopy(llama.state_dict()), tokenizer.padding_side

    def draw() -> tuple[float, float, float]:
        return random.random(), np.random.rand(), torch.rand(1).item()

    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(7)
    expected = draw()
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(7)
    levels = logging.getLogger("lm_eval").level, transformers_logging.get_verbosity()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluate_tasks(Decoder(llama), tokenizer, [PRUNED], ["hellaswag"], data)
    assert draw() == expected
    assert levels == (logging.getLogger("lm_eval").level, transformers_logging.get_verbosity())
    assert not caplog.records
    said = capfd.readouterr()
    assert said.out == "" and "Running" not in said.err and "Map" not in said.err
    assert all(torch.equal(before[name], tensor) for name, tensor in llama.state_dict().items())
    assert tokenizer.padding_side == as_it_was


# ---- averages ------------------------------------------------------------------------------------


def table_of(values: dict[str, float], removed=(), stderr: float = 0.02) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {
                "removed": sorted(removed),
                "task": task,
                "metric": metric,
                "value": value + shift,
                "stderr": stderr,
            }
            for task, value in values.items()
            for metric, shift in (("acc", 0.0), ("acc_norm", 0.3))
        ]
    )


def test_average_is_that_of_plain_accuracy_over_the_eight_tasks():
    dense = {task: 0.5 + 0.01 * i for i, task in enumerate(SUITES["zero_shot"])}
    pruned = {task: value * 0.8 for task, value in dense.items()}
    averages = average_accuracy(pd.concat([table_of(dense | {"race": 0.9}), table_of(pruned, PRUNED, 0.04)]))
    assert averages["metric"].tolist() == ["AVG", "AVG"] and averages["removed"].tolist() == [[], [1, 4]]
    assert averages["value"].tolist() == pytest.approx([0.535, 0.428])
    assert averages["stderr"].tolist() == pytest.approx([0.02 / 8**0.5, 0.04 / 8**0.5])
    assert averages["RP"].tolist() == pytest.approx([100, 80])
    assert average_accuracy(table_of(pruned, PRUNED))["RP"].isna().all()  # no dense row


def test_an_average_of_seven_tasks_is_never_called_avg():
    dense = {task: 0.5 for task in SUITES["zero_shot"]}
    seven = {task: 0.4 for task in SUITES["zero_shot"] if task != "mathqa"}
    averages = average_accuracy(pd.concat([table_of(dense), table_of(seven, PRUNED)]))
    assert averages["metric"].tolist() == ["AVG", "AVG-7"]
    assert averages["missing"].tolist() == [[], ["mathqa"]] and averages["n_tasks"].tolist() == [8, 7]
    assert averages["stderr"][1] == pytest.approx(0.02 / 7**0.5)
    assert np.isnan(averages["RP"][1])  # seven tasks against eight say nothing
    both = average_accuracy(pd.concat([table_of(seven), table_of(seven, PRUNED)]))
    assert both["metric"].tolist() == ["AVG-7", "AVG-7"] and both["RP"].tolist() == pytest.approx([100, 100])
    assert np.isnan(average_accuracy(table_of(dense, stderr=float("nan")))["stderr"][0])


def test_suites_are_the_papers_and_blank_cells_have_sentences():
    assert len(SUITES["zero_shot"]) == 8 and not set(BLANK) & set(SUITES["nlu"])
    assert all(sentence.endswith(".") and "\n" not in sentence for sentence in BLANK.values())
    with pytest.raises(SimDiffError, match="piqa has two results"):
        average_accuracy(pd.concat([table_of({"piqa": 0.5})] * 2))


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"tasks": ["piqua"]}, "no task 'piqua'"),
        ({"tasks": ["sciq"]}, "no rows for sciq"),
        ({"sets": [frozenset({6})]}, "layers 0 to 5"),
        ({"limit": 0}, "limit"),
        ({"chat_template": True}, "no chat template"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(llama, tokenizer, data, given, match):
    with pytest.raises(SimDiffError, match=match) as refusal:
        evaluate_tasks(
            Decoder(llama), tokenizer, **{"sets": [DENSE], "tasks": ["piqa"], "data": data} | given
        )
    assert "\n" not in str(refusal.value)


def test_a_streamed_model_writes_no_text_and_says_so_first(tokenizer, data, tiny_model, tmp_path):
    decoder = stream_decoder(tiny_model, "float32")
    with pytest.raises(SimDiffError, match="coqa .* streamed from disk: raise memory_gib"):
        evaluate_tasks(decoder, tokenizer, [DENSE], ["piqa", "coqa"], data, folder=tmp_path)
    assert not list(tmp_path.iterdir())


def test_requests_that_cannot_be_answered_are_one_sentence(llama, tokenizer):
    answers = SetsLM(Decoder(llama), copy.deepcopy(tokenizer), (DENSE,))
    with pytest.raises(SimDiffError, match="65 tokens, .* for 1 to 64"):
        answers.loglikelihood([Instance("loglikelihood", {}, ("w3", " w4" * 65), 0)])
    with pytest.raises(SimDiffError, match="perplexity"):
        answers.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, ("w3",), 0, ("wikitext", 0, 1))])
    with torch.no_grad():
        llama.model.norm.weight[0] = float("nan")
    with pytest.raises(SimDiffError, match="no numbers"):
        answers.loglikelihood([Instance("loglikelihood", {}, ("w3", " w4"), 0)])


# ---- the command line ----------------------------------------------------------------------------


@pytest.mark.slow
def test_an_exported_checkpoint_gives_the_same_on_the_command_line(
    tiny_model, tokenizer, make_tiny, data, data_folder, tmp_path
):
    names = ["piqa", "arc_easy", "boolq"]
    export_pruned(tiny_model, PRUNED, tmp_path / "pruned", FACTS)
    lm_evals = Path(find_spec("lm_eval").origin).parent / "tasks"
    for name, own in zip(names, ("piqa/piqa", "arc/arc_easy", "super_glue/boolq/default"), strict=True):
        split = data.find(name).split
        others = {f"{other}_split": None for other in ("training", "validation", "test")}
        task = {
            "include": str(lm_evals / f"{own}.yaml"),
            "task": f"local_{name}",
            "dataset_path": "json",
            "dataset_name": None,
            "tag": None,
            **others,
            f"{split}_split": split,
            "dataset_kwargs": {"data_files": {split: str(data_folder / name / f"{split}.jsonl.gz")}},
        }
        path = tmp_path / "yaml" / f"{name}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(yaml.safe_dump(task))
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "lm_eval",
            "run",
            "--model",
            "hf",
            "--model_args",
            f"pretrained={tmp_path / 'pruned'},dtype=float32",
            "--tasks",
            *(f"local_{name}" for name in names),
            "--include_path",
            str(tmp_path / "yaml"),
            "--device",
            "cpu",
            "--limit",
            "10",
            "--output_path",
            str(tmp_path / "out.json"),
        ],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=tmp_path,
        env=os.environ
        | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (written,) = tmp_path.glob("out*.json")
    said = json.loads(written.read_text())["results"]
    table = evaluate_tasks(Decoder(make_tiny("llama")), tokenizer, [PRUNED], names, data, limit=10)
    assert set(table["n_samples"]) == {10}
    for row in table.itertuples():
        theirs = said[f"local_{row.task}"]
        assert row.value == pytest.approx(theirs[f"{row.metric},none"])
        assert row.stderr == pytest.approx(theirs[f"{row.metric}_stderr,none"])
