"""Text: fixed splits, token blocks that lose nothing, and one clear sentence for every bad input."""

import bz2
import dataclasses
import gzip
import hashlib
import json
import logging
import string

import datasets
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from simdiff_utils import SimDiffError, assets
from simdiff_utils.text import blocks, wikipedia
from simdiff_utils.text import corpus as text

ALPHABET = string.ascii_lowercase + " \n"
IDS = {"<s>": 0, "</s>": 1, "?": 2} | {letter: 3 + i for i, letter in enumerate(ALPHABET)}
ARTICLE = "'''Alpha''' is a [[letter|letter of the alphabet]].<ref>A book</ref> " + "It comes first. " * 200


def make_tokenizer(template: str, max_length: int = 10**30) -> PreTrainedTokenizerFast:
    """One token per letter; `template` says which special tokens surround a text."""
    tokenizer = Tokenizer(models.WordLevel(IDS, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="?",
        model_max_length=max_length,
    )


TOKENIZERS = {template: make_tokenizer(template) for template in ("$A", "<s> $A", "<s> $A </s>", "$A </s>")}


# --- token blocks
# ------------------------------------------------------------------------------------------------


@settings(deadline=None)  # a busy machine is no failure
@given(
    template=st.sampled_from(list(TOKENIZERS)),
    seq_len=st.integers(1, 12),
    documents=st.lists(st.text(ALPHABET, max_size=30), max_size=5),
)
def test_blocks_side_by_side_are_the_token_stream(template, seq_len, documents):
    stream = [IDS[letter] for letter in "\n\n".join(documents)]
    prefix = [0] if template.startswith("<s>") else []
    n_text = seq_len - len(prefix)
    if n_text < 1 or len(stream) < n_text:
        with pytest.raises(SimDiffError, match="seq_len"):
            blocks.token_blocks(TOKENIZERS[template], documents, seq_len)
        return
    blocks = blocks.token_blocks(TOKENIZERS[template], documents, seq_len)
    assert blocks.dtype == torch.int64 and blocks.shape[1] == seq_len
    assert blocks[:, : len(prefix)].tolist() == [prefix] * len(blocks)
    laid_out = blocks[:, len(prefix) :].flatten().tolist()
    assert laid_out == stream[: len(laid_out)]
    assert len(stream) - len(laid_out) < n_text  # only what fills no block is dropped


def test_too_short_text_says_how_many_tokens_there_are():
    with pytest.raises(SimDiffError, match="has 5 tokens, one block of seq_len 8 takes 7"):
        blocks.token_blocks(TOKENIZERS["<s> $A"], ["abcde"], 8)


def test_text_longer_than_the_models_context_warns_of_nothing(caplog):
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        blocks.token_blocks(make_tokenizer("<s> $A", max_length=4), ["a" * 100], 4)
    finally:
        logger.removeHandler(caplog.handler)
    assert not caplog.records


# --- drawn blocks
# ------------------------------------------------------------------------------------------------


@settings(deadline=None)  # a busy machine is no failure
@given(n_blocks=st.integers(1, 60), data=st.data())
def test_drawn_blocks_are_different_ordered_and_repeatable(n_blocks, data):
    n = data.draw(st.integers(1, n_blocks))
    seed = data.draw(st.none() | st.integers(0, 2**31))
    blocks = torch.arange(n_blocks)[:, None].repeat(1, 3)
    drawn = blocks.draw_blocks(blocks, n, seed)
    positions = drawn[:, 0].tolist()
    assert drawn.shape == (n, 3) and positions == sorted(set(positions))
    assert torch.equal(drawn, blocks.draw_blocks(blocks, n, seed))
    if seed is None:
        gaps = [b - a for a, b in zip(positions, positions[1:], strict=False)]
        assert not gaps or max(gaps) - min(gaps) <= 1
        assert (
            abs(positions[0] - (n_blocks - 1 - positions[-1])) <= 1
        )  # as far from the start as from the end


def test_seeds_draw_different_blocks():
    blocks = torch.arange(100)[:, None]
    assert not torch.equal(blocks.draw_blocks(blocks, 10, 0), blocks.draw_blocks(blocks, 10, 1))


def test_too_few_blocks_names_the_setting_to_lower():
    with pytest.raises(
        SimDiffError, match="has 3 blocks of 8 tokens, 4 were asked for: lower n_test or seq_len"
    ):
        blocks.draw_blocks(torch.zeros(3, 8, dtype=torch.long), 4, parameter="n_test")


# --- the embedded text
# -------------------------------------------------------------------------------------------


def test_embedded_split_is_fixed_disjoint_and_long_enough():
    corpus = text.load_corpus("embedded:wikipedia")
    documents = corpus.documents
    assert {split: len(articles) for split, articles in documents.items()} == {
        "train": 77,
        "validation": 10,
        "test": 9,
    }
    assert documents["validation"][0].startswith("Alabama") and documents["test"][0].startswith(
        "The Academy Awards"
    )
    assert len({article for articles in documents.values() for article in articles}) == 96
    for split in ("validation", "test"):  # at 4.4 characters a token, 120 blocks of 256 tokens are 135,000
        assert sum(map(len, documents[split])) > 180_000
    assert corpus.sha256 == text.load_corpus("embedded:wikipedia").sha256


def test_embedded_articles_hold_no_markup():
    prose = "\n".join(
        article
        for articles in text.load_corpus("embedded:wikipedia").documents.values()
        for article in articles
    )
    for mark in (
        "{{",
        "}}",
        "[[",
        "]]",
        "''",
        "<ref",
        "{|",
        "__TOC__",
        "\nReferences\n",
        "\nExternal links\n",
    ):
        assert mark not in prose, mark


@pytest.mark.parametrize(
    "wikitext, plain",
    [
        ("'''Bold''' and [[Target|shown]].<ref name=a>{{cite|x}}</ref>", "Bold and shown."),
        ("Deep ''italics<ref>gone</ref> with [[File:a.png|thumb|a [[link]]]] in''.", "Deep italics with in."),
        ("[[2001: A Space Odyssey]] stays.[[de:Alpha]][[Category:Letters]]", "2001: A Space Odyssey stays."),
        ("Before ({{IPA|x}}; {{lang|y}}) after\n\n\n  {| class=x\n| cell\n|}\nnext", "Before after\nnext"),
        ("Text.\n=== Notes ===\nkept\n== See also ==\n* gone\n== Notes ==\ngone", "Text.\nNotes\nkept"),
        ("An unclosed <ref>tag and {{template stay readable", "An unclosed tag and template stay readable"),
    ],
)
def test_strip_markup(wikitext, plain):
    assert wikipedia.strip_markup(wikitext) == plain


@pytest.fixture
def small_dump(tmp_path, monkeypatch):
    """A MediaWiki export of twelve articles, a redirect, a talk page and a stub, in the place of the embedded
    one."""

    def page(title, ns, wikitext, extra=""):
        return f"<page><title>{title}</title><ns>{ns}</ns>{extra}<revision><text>{wikitext}</text></revision></page>"

    articles = [page(f"A{i}", 0, ARTICLE.replace("Alpha", f"A{i}").replace("<", "&lt;")) for i in range(12)]
    others = [
        page("Redirect", 0, ARTICLE.replace("<", "&lt;"), "<redirect title='A0' />"),
        page("Talk:A0", 1, ARTICLE.replace("<", "&lt;")),
        page("Stub", 0, "Short."),
    ]
    export = "<mediawiki xmlns='http://www.mediawiki.org/xml/export-0.10/'>" + "".join(others + articles)
    content = bz2.compress((export + "</mediawiki>").encode())
    asset = dataclasses.replace(assets.ASSETS["wikipedia"], sha256=hashlib.sha256(content).hexdigest())
    monkeypatch.setitem(assets.ASSETS, "wikipedia", asset)
    monkeypatch.setenv("SIMDIFF_CACHE", str(tmp_path))
    (tmp_path / "wikipedia").mkdir()
    (tmp_path / "wikipedia" / asset.filename).write_bytes(content)
    return tmp_path / "wikipedia"


def test_only_articles_of_some_length_are_kept_and_stripped_once(small_dump, monkeypatch):
    corpus = text.load_corpus("embedded:wikipedia")
    firsts = {
        split: [article.split()[0] for article in articles] for split, articles in corpus.documents.items()
    }
    assert firsts["validation"] == ["A4"] and firsts["test"] == ["A9"]
    assert firsts["train"] == [f"A{i}" for i in range(12) if i not in (4, 9)]
    assert corpus.documents["test"][0].startswith("A9 is a letter of the alphabet. It comes first.")

    monkeypatch.setattr(wikipedia, "strip_markup", None)  # the second time reads the cache
    assert text.load_corpus("embedded:wikipedia").sha256 == corpus.sha256


def test_damaged_stripped_articles_are_made_again(small_dump):
    before = text.load_corpus("embedded:wikipedia")
    (kept,) = small_dump.glob("*.jsonl")
    kept.write_text(kept.read_text()[:-20])
    assert text.load_corpus("embedded:wikipedia") == before


# --- local files
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.txt.gz"])
def test_text_file_is_cut_in_sequence_by_characters(tmp_path, name):
    paragraphs = [f"paragraph {i:02d}\nwith a second line" for i in range(50)]
    content = ("\n \n\n".join(paragraphs) + "\n").encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    documents = text.load_corpus(str(tmp_path / name)).documents
    assert documents == {"train": paragraphs[:40], "validation": paragraphs[40:45], "test": paragraphs[45:]}


@pytest.mark.parametrize("name, field", [("a.jsonl", "text"), ("a.jsonl.gz", "page")])
def test_jsonl_rows_are_documents_and_every_tenth_goes_to_each_small_split(tmp_path, name, field):
    content = "".join(json.dumps({"id": i, field: f"row {i}\u2028é"}) + "\n" for i in range(20)).encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    corpus = text.load_corpus(str(tmp_path / name))
    assert corpus.label == name  # no folder of the user's enters a table
    assert corpus.documents["validation"] == ["row 4\u2028é", "row 14\u2028é"]
    assert corpus.documents["test"] == ["row 9\u2028é", "row 19\u2028é"]
    assert len(corpus.documents["train"]) == 16


def test_file_is_found_from_the_notebooks_folder(tmp_path, monkeypatch):
    (tmp_path / "pyproject.toml").touch()
    for folder in ("simdiff_utils", "notebooks"):
        (tmp_path / folder).mkdir()
    (tmp_path / "mine.txt").write_text("\n\n".join("abcdefghijkl"))
    monkeypatch.chdir(tmp_path / "notebooks")
    assert text.load_corpus("mine.txt").documents["train"][0] == "a"


@pytest.mark.parametrize(
    "name, content, sentence",
    [
        ("a.txt", b"one paragraph", "too short"),
        ("a.txt", b"", "too short"),
        ("a.txt", b"\xff\xfe\x00", "UTF-8"),
        ("a.txt.gz", b"not gzip", "cannot read a.txt.gz"),
        ("a.jsonl", b'{"text": "one"}\n' * 9, "too short: nothing is left for test"),
        ("a.jsonl", b'{"text": "one"}\n{"text": \n', "line 2 of a.jsonl is not JSON"),
        ("a.jsonl", b'{"body": "one"}\n', "line 1 of a.jsonl has no field"),
        ("a.jsonl", b'["one"]\n', "line 1 of a.jsonl has no field"),
        ("a.pdf", b"%PDF", "must end in"),
    ],
)
def test_bad_file_is_one_sentence(tmp_path, name, content, sentence):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SimDiffError, match=sentence):
        text.load_corpus(str(tmp_path / name))


@pytest.mark.parametrize(
    "name", ["missing.txt", "data/missing.jsonl", "/no/such/folder", "embedded:wiki", ""]
)
def test_unknown_text_lists_what_may_be_named(name):
    with pytest.raises(SimDiffError, match="give embedded:wikipedia, wikitext2, an existing file"):
        text.load_corpus(name)


# --- the hub, stubbed: these tests need no network
# -----------------------------------------------------------------


def stub_hub(monkeypatch, columns: dict[str, dict[str, list]]) -> list:
    asked = []

    def load_dataset(*args):
        asked.append(args)
        return datasets.DatasetDict(
            {split: datasets.Dataset.from_dict(rows) for split, rows in columns.items()}
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def test_wikitext2_keeps_its_own_splits_and_rows(monkeypatch):
    rows = {split: {"text": ["", f" = {split} = \n", "line\n"]} for split in ("test", "train", "validation")}
    asked = stub_hub(monkeypatch, rows)
    corpus = text.load_corpus("wikitext2")
    assert asked == [("Salesforce/wikitext", "wikitext-2-raw-v1")]
    assert corpus.documents == {split: rows[split]["text"] for split in rows}


def test_hub_text_of_one_split_is_split_by_rows(monkeypatch):
    asked = stub_hub(monkeypatch, {"train": {"text": [f"row {i}" for i in range(10)], "id": list(range(10))}})
    corpus = text.load_corpus("org/name:config")
    assert asked == [("org/name", "config")]
    assert corpus.documents["validation"] == ["row 4"] and corpus.documents["test"] == ["row 9"]


def test_hub_text_without_text_column_names_the_columns(monkeypatch):
    stub_hub(monkeypatch, {"train": {"body": ["a"]}})
    with pytest.raises(SimDiffError, match="no column `text`; it has body"):
        text.load_corpus("org/name")


@pytest.mark.parametrize(
    "error, advice",
    [
        (ConnectionError("Couldn't reach it\non the Hub"), "offline, name a local"),
        (datasets.exceptions.DatasetNotFoundError("it is a gated dataset on the Hub"), "hf auth login"),
    ],
)
def test_hub_that_cannot_be_reached_says_what_to_do(monkeypatch, error, advice):
    def refuse(*args):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(SimDiffError, match=advice) as refusal:
        text.load_corpus("wikitext2")
    assert "\n" not in str(refusal.value)
