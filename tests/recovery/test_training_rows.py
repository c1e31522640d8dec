"""Training data: every form of row, what the model sees of it, and a sentence for all that cannot be trained
on."""

import copy
import gzip
import json
import re
from unittest.mock import Mock

import pytest
import torch
from datasets import Dataset
from tokenizers.processors import TemplateProcessing

from simdiff_utils import SimDiffError
from simdiff_utils.recovery import templates, training_rows
from simdiff_utils.recovery.training_rows import block_rows, hash_rows, load_rows, pad_rows, pad_token_id

ROWS = [
    {"instruction": f"w{10 + i}", "input": "w5" if i % 2 else "", "output": f"w{40 + i} w7"}
    for i in range(30)
]
CHATS = [
    {
        "messages": [
            {"role": "system", "content": "w3"},
            {"role": "user", "content": f"w{10 + i}"},
            {"role": "assistant", "content": f"w{40 + i} w7"},
        ]
    }
    for i in range(30)
]
TEXTS = [{"text": " ".join(f"w{3 + j}" for j in range(i))} for i in range(2, 32)]
# A header per role (w90 system, w91 user, w92 assistant), an end of turn, no system turn but as the first.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' and not loop.first %}"
    "{{ raise_exception('System role\\nnot supported here') }}{% endif %}"
    " {{ {'system': 'w90', 'user': 'w91', 'assistant': 'w92'}[m.role] }} {{ m.content }} <eos>{% endfor %}"
)


def write_rows(path, rows):
    text = json.dumps(rows) if ".jsonl" not in path.name else "".join(json.dumps(row) + "\n" for row in rows)
    with (gzip.open if path.suffix == ".gz" else open)(path, "wt", encoding="utf-8") as file:
        file.write(text)
    return str(path)


@pytest.fixture
def source(tmp_path):
    """A file of thirty Alpaca rows."""
    return write_rows(tmp_path / "rows.json", ROWS)


@pytest.fixture
def make_tokenizer(tokenizer):
    """Function: what it adds to a text, and changes -> the tiny tokenizer so changed."""

    def make(adds: str = "$A", **changes):
        changed = copy.deepcopy(tokenizer)
        changed.backend_tokenizer.post_processor = TemplateProcessing(
            single=adds, special_tokens=[("<bos>", 1), ("<eos>", 2)]
        )
        for name, value in changes.items():
            setattr(changed, name, value)
        return changed

    return make


@pytest.fixture
def chatty(make_tokenizer):
    """A tokenizer with a chat template, that prepends BOS to a text of its own accord."""
    return make_tokenizer("<bos> $A", chat_template=CHAT_TEMPLATE)


def ids_of(rows):
    return [row["input_ids"] for row in rows.train + rows.validation]


# ---- Alpaca --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.json.gz", "rows.jsonl.gz"])
def test_alpaca_rows_are_prompt_and_answer_without_eos(tmp_path, tokenizer, name):
    rows = load_rows(write_rows(tmp_path / name, ROWS), tokenizer, max_length=256, seed=0)
    assert (len(rows.train), len(rows.validation)) == (27, 3)  # a tenth, where that is fewer than 2000
    for ids in ids_of(rows):
        n = next(i for i in ids if 10 <= i < 40)
        assert 5 in ids if n % 2 else 5 not in ids  # the input, where there is one
        assert ids[-2:] == [30 + n, 7]  # ends with the answer's last word
        assert tokenizer.eos_token_id not in ids
    assert len(set(map(tuple, ids_of(rows)))) == 30  # every row once
    assert (rows.template, rows.notes) == ("Alpaca", ())


def test_template_is_alpacas():
    text = templates.ALPACA_WITH_INPUT.format(instruction="Add.", input="1, 2", output="3")
    assert text.startswith(
        "Below is an instruction that describes a task, paired with an input that provides further "
    )
    assert text.endswith("### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n### Response:\n3")
    text = templates.ALPACA_WITHOUT_INPUT.format(instruction="Add.", output="3")
    assert text == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the "
        "request.\n\n### Instruction:\nAdd.\n\n### Response:\n3"
    )


@pytest.mark.parametrize("missing", [{}, {"input": None}, {"input": " \n"}])
def test_an_input_may_be_missing(tmp_path, tokenizer, source, missing):
    rows = [
        {key: row[key] for key in ("instruction", "output")} | (missing if not row["input"] else row)
        for row in ROWS
    ]
    assert load_rows(write_rows(tmp_path / "other.json", rows), tokenizer, 256, seed=0) == load_rows(
        source, tokenizer, 256, seed=0
    )


def test_alpacas_own_text_column_is_not_what_is_trained_on(tmp_path, tokenizer, source):
    rows = [row | {"text": "w3 w4"} for row in ROWS]
    assert load_rows(write_rows(tmp_path / "other.json", rows), tokenizer, 256, seed=0) == load_rows(
        source, tokenizer, 256, seed=0
    )


def test_braces_in_a_row_are_text(tmp_path, tokenizer):
    rows = [{"instruction": "{input} {x}", "input": "", "output": "{}"}] * 2
    assert load_rows(write_rows(tmp_path / "rows.json", rows), tokenizer, 256, seed=0).train


def test_eos_that_the_tokenizer_appends_is_taken_off_and_bos_is_kept(source, tokenizer, make_tokenizer):
    appending, both = make_tokenizer("$A <eos>"), make_tokenizer("<bos> $A <eos>")
    assert appending("w5")["input_ids"] == [5, 2]
    for max_length in (256, 12):  # cut or not: the EOS never takes the place of a token of the row
        plain = load_rows(source, tokenizer, max_length, seed=0)
        assert load_rows(source, appending, max_length, seed=0) == plain
        cut = [[1, *ids[: max_length - 1]] for ids in ids_of(plain)]
        assert ids_of(load_rows(source, both, max_length, seed=0)) == cut


@pytest.mark.parametrize("adds", ["$A", "$A <eos>"])
def test_eos_that_a_row_itself_ends_with_stays(tmp_path, make_tokenizer, adds):
    rows = [row | {"output": "w7 <eos>"} for row in ROWS]
    rows = load_rows(write_rows(tmp_path / "rows.json", rows), make_tokenizer(adds), 256, seed=0)
    assert {tuple(ids[-2:]) for ids in ids_of(rows)} == {(7, 2)}


def test_bos_alone_is_no_appended_eos(tmp_path, make_tokenizer):
    """GPT-2's BOS is its EOS."""
    one_for_both = make_tokenizer("<eos> $A", bos_token="<eos>")
    rows = load_rows(write_rows(tmp_path / "rows.json", TEXTS), one_for_both, 256, seed=0)
    assert sorted(ids_of(rows)) == sorted([2, *range(3, 3 + n)] for n in range(2, 32))


# ---- chats ---------------------------------------------------------------------------------------


def test_chats_go_through_the_models_template(tmp_path, chatty):
    rows = load_rows(write_rows(tmp_path / "rows.jsonl", CHATS), chatty, 256, seed=0)
    expected = [
        [1, 90, 3, 2, 91, 10 + i, 2, 92, 40 + i, 7, 2] for i in range(30)
    ]  # one BOS, and the last end of turn
    assert sorted(ids_of(rows)) == expected
    assert rows.template == "chat template of the model"
    assert rows.example == chatty.decode(rows.train[0]["input_ids"])
    assert rows.example.startswith("<bos> w90 w3 <eos> w91 w")


def test_sharegpt_is_the_same_chat(tmp_path, chatty):
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    shared = [
        {
            "id": i,
            "conversations": [{"from": names[m["role"]], "value": m["content"]} for m in row["messages"]],
        }
        for i, row in enumerate(CHATS)
    ]
    assert load_rows(write_rows(tmp_path / "shared.json", shared), chatty, 256, seed=3) == load_rows(
        write_rows(tmp_path / "chats.json", CHATS), chatty, 256, seed=3
    )


def test_alpaca_rows_as_chats_on_request(tmp_path, source, chatty):
    rows = load_rows(source, chatty, 256, seed=0, chat_template=True)
    assert sorted(ids_of(rows)) == [[1, 91, 10 + i, *[5] * (i % 2), 2, 92, 40 + i, 7, 2] for i in range(30)]
    assert rows.template == "chat template of the model"
    assert load_rows(source, chatty, 256, seed=0).template == "Alpaca"
    adding = [{"instruction": "Add.", "input": given, "output": "3"} for given in ("1, 2", "")]
    seen, _ = templates.render_rows(adding, "a.json", chatty, chat_template=True)
    assert [re.findall("w91 (.*?) <eos>", text, re.DOTALL) for text in seen] == [["Add.\n\n1, 2"], ["Add."]]


def test_a_template_that_writes_the_date_gives_the_same_rows_every_day(tmp_path, make_tokenizer):
    template = (
        "\n{% set day = strftime_now('%d %b %Y') %}{{ day }}|{{ strftime_now('%d %B %Y') }}|"
        "{{ strftime_now('%Y-%m-%d') }}|{{ messages[0].content }}"
    )
    chat = {"messages": [{"role": "user", "content": "w5"}]}
    seen, _ = templates.render_rows([chat], "a.json", make_tokenizer(chat_template=template), False)
    assert seen == ["\n26 Jul 2024|26 July 2024|2024-07-26|w5"]


def test_no_chat_template(tmp_path, source, tokenizer):
    with pytest.raises(SimDiffError, match="tokenizer has none: take an instruct model"):
        load_rows(write_rows(tmp_path / "chats.json", CHATS), tokenizer, 256, seed=0)
    with pytest.raises(SimDiffError, match="with chat_template off"):
        load_rows(source, tokenizer, 256, seed=0, chat_template=True)


@pytest.mark.parametrize(
    ("turns", "sentence"),
    [
        (
            [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}],
            r"Row 31 of \S+ is refused by .*chat template \(System role not supported here\): change that",
        ),
        ([], r"Row 31 of \S+rows.json is refused by .*empty conversation"),
        (
            [{"role": "user", "content": "a"}, {"role": "bot", "content": "b"}],
            r"Row 31 of \S+rows.json has a message 2 .*assistant, gpt.* is 'bot'",
        ),
        ([{"role": "user", "content": None}], "Row 31 .* has a message 1 that cannot be read"),
        ([{"role": ["user"], "content": "a"}], "Row 31 .* has a message 1 that cannot be read"),
        (["a"], "Row 31 .* has a message 1 that cannot be read.* is None"),
    ],
)
def test_a_chat_that_cannot_be_read_is_named(tmp_path, chatty, turns, sentence):
    with pytest.raises(SimDiffError, match=sentence):
        load_rows(write_rows(tmp_path / "rows.json", [*CHATS, {"messages": turns}]), chatty, 256, seed=0)


# ---- texts, cutting, splitting -------------------------------------------------------------------


def test_texts_are_cut_and_too_short_ones_left_out_and_the_notes_say_so(tmp_path, tokenizer):
    source = write_rows(tmp_path / "rows.jsonl", [*TEXTS, {"text": "w5"}, {"text": ""}])
    rows = load_rows(source, tokenizer, max_length=8, seed=0, chat_template=True)
    assert sorted(map(len, ids_of(rows))) == [2, 3, 4, 5, 6, 7, *[8] * 24]
    assert all(ids == list(range(3, 3 + len(ids))) for ids in ids_of(rows))  # cut at the end
    assert rows.template == "plain text"
    assert rows.notes == (
        "23 of 32 rows were longer than 8 tokens and were cut.",  # the one of 8 was not
        "2 of 32 rows had fewer than 2 tokens, which leaves nothing to predict, and were left out.",
        "The rows are plain texts without turns: the chat template asked for does not apply to them.",
    )


def test_bos_and_one_token_are_a_row(tmp_path, chatty):
    rows = load_rows(
        write_rows(tmp_path / "rows.json", [{"text": "w5"}, {"text": ""}, {"text": "w6"}]), chatty, 8, 0
    )
    assert sorted(ids_of(rows)) == [[1, 5], [1, 6]]


def test_too_little_is_left(tmp_path, tokenizer):
    with pytest.raises(SimDiffError, match="Of the 3 rows of .*, cut to 8 tokens, 1 have the 2 tokens"):
        load_rows(
            write_rows(tmp_path / "a.json", [{"text": "w5 w6"}, {"text": ""}, {"text": "w6"}]),
            tokenizer,
            8,
            0,
        )
    with pytest.raises(SimDiffError, match="Of the 30 rows of .*, cut to 1 tokens, 0 have"):
        load_rows(write_rows(tmp_path / "rows.json", TEXTS), tokenizer, 1, 0)


def test_rows_are_drawn_by_the_seed(source, tokenizer):
    assert load_rows(source, tokenizer, 256, seed=1) == load_rows(source, tokenizer, 256, seed=1)
    one, other = (load_rows(source, tokenizer, 256, seed=seed) for seed in (1, 2))
    assert sorted(ids_of(one)) == sorted(ids_of(other))
    assert one.validation != other.validation
    held_out = load_rows(source, tokenizer, 256, seed=1, n_validation=2)
    assert len(held_out.validation) == 2
    assert load_rows(source, tokenizer, 256, seed=1, n_validation=0).validation == []
    assert ids_of(held_out)[-2:] == [row["input_ids"] for row in one.validation[:2]]
    assert len({one.sha256, other.sha256, held_out.sha256}) == 3


@pytest.mark.parametrize("batch", [1, 7, 1000])
def test_batches_lose_no_row(source, tokenizer, monkeypatch, batch):
    before = load_rows(source, tokenizer, 256, seed=0)
    monkeypatch.setattr(training_rows, "BATCH", batch)
    assert load_rows(source, tokenizer, 256, seed=0) == before


def test_hash_knows_tokens_rows_order_and_split(tokenizer):
    a, b, ab = {"input_ids": [5, 6]}, {"input_ids": [7]}, {"input_ids": [5, 6, 7]}
    parts = [([a, b], []), ([a], [b]), ([b, a], []), ([ab], []), ([], [a, b]), ([], [])]
    assert len({hash_rows(*part) for part in parts}) == len(parts)
    blocks = torch.tensor([[5, 6], [7, 8]])
    rows = block_rows(blocks, blocks[:0], tokenizer)
    assert rows.sha256 == hash_rows([{"input_ids": [5, 6]}, {"input_ids": [7, 8]}], [])


# ---- sources -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        (
            {"instruction": "a", "response": "b"},
            "has no form .*Alpaca.*chat.*ShareGPT.*text; its fields are: instruction, response",
        ),
        ({"instruction": "a", "input": "", "output": None}, "has no form that is known"),
        ({"instruction": "a", "input": ["b"], "output": "c"}, "has an input that is no text"),
        ({"text": "a"}, "has the form text where row 1 has the form Alpaca"),
        ("just a string", "has no form .* its fields are: none, being a str"),
        ({"instruction": "a", "output": "\ud83d"}, "holds half a character"),
    ],
)
def test_a_row_that_cannot_be_read_is_named(tmp_path, tokenizer, row, sentence):
    for name in ("rows.json", "rows.jsonl"):
        with pytest.raises(SimDiffError, match=rf"Row 31 of \S+{name} {sentence}"):
            load_rows(write_rows(tmp_path / name, [*ROWS, row]), tokenizer, 256, seed=0)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.jsonl", b'{"text": "a b"}\n{"text": "a",\n', "line 2 of .*/a.jsonl is not JSON"),
        ("a.json", b"[]", "Of the 0 rows of .*a.json, .* need at least 2 such rows"),
        ("a.jsonl", b'{"text": "w5 w6"}\n', "Of the 1 rows of .*a.jsonl, cut to 256 tokens, 1 have"),
        ("a.json", b'{"version": 1, "data": [{"text": "a"}]}', "its fields are: version, data"),
        ("a.json", b"7", "its fields are: none, being a int"),
        ("a.json.gz", b'[{"text": "a"}]', "a.json.gz cannot be read as UTF-8 text"),
        ("a.txt", b"a text", r"no data set .* \.json, \.jsonl, .* plain text .* with the parameter text"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, tokenizer, name, content, sentence):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SimDiffError, match=sentence) as refused:
        load_rows(str(tmp_path / name), tokenizer, 256, seed=0)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("gone.jsonl", "There is no file gone.jsonl"),
        ("some/gone.json.gz", "There is no file some/gone.json.gz"),
        ("some/gone.txt", "plain text is trained on as the run's own"),
        ("text", "plain text is trained on as the run's own"),
        ("wikitext2", "no data set this can train on: give a hub data set as org/name"),
        ("nobody/no-such-data", r"does not give nobody/no-such-data \(.*\): check the name; offline, give"),
    ],
)
def test_sources_that_are_not_there(tokenizer, source, sentence):
    with pytest.raises(SimDiffError, match=sentence):
        load_rows(source, tokenizer, 256, seed=0)


@pytest.mark.parametrize("rows", [ROWS, CHATS, TEXTS])
def test_hub_rows_are_those_of_a_file(tmp_path, chatty, monkeypatch, rows):
    calls = []

    def load_dataset(name, config, split):
        calls.append((name, config, split))
        return Dataset.from_list(rows)

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    from_file = load_rows(write_rows(tmp_path / "rows.json", rows), chatty, 256, seed=0)
    assert load_rows("org/some-data", chatty, 256, seed=0) == from_file
    assert load_rows("org/some-data:en.v1", chatty, 256, seed=0) == from_file
    assert calls == [("org/some-data", None, "train"), ("org/some-data", "en.v1", "train")]


# ---- padding -------------------------------------------------------------------------------------


def test_padding_is_never_a_label_and_the_prompt_always_is():
    batch = pad_rows([{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9]}], pad_token_id=6)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 6]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [-100, 9, -100]]  # position 0 is nobody's target
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]


def test_blocks_are_rows_of_one_length(tokenizer):
    blocks = torch.tensor([[5, 6], [7, 8]])
    rows = block_rows(blocks, blocks[:0], tokenizer)
    assert pad_rows(rows.train, pad_token_id=0)["input_ids"].tolist() == blocks.tolist()


def test_a_missing_pad_token_is_told(source, tokenizer, make_tokenizer):
    assert pad_token_id(tokenizer) == 0
    assert pad_token_id(Mock(pad_token_id=97, eos_token_id=2), 97) == 2  # added to the tokenizer alone
    without = make_tokenizer(pad_token=None)
    assert pad_token_id(without) == 2
    assert load_rows(source, without, 256, seed=0).notes == (
        "The tokenizer has no pad token: short rows are filled up with its EOS token (id 2), which is "
        "masked, so that nothing is learned from it.",
    )
    bare = make_tokenizer(pad_token=None, eos_token=None)
    assert pad_token_id(bare) == 0
    assert "its first token (id 0)" in load_rows(source, bare, 256, seed=0).notes[0]
