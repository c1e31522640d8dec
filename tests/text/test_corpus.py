"""Corpora: fixed splits, texts of every kind, and one clear sentence for every bad input."""

import bz2
import dataclasses
import gzip
import hashlib
import json

import datasets
import pytest

from simdiff_utils import SimDiffError, assets
from simdiff_utils.text import corpus as text
from simdiff_utils.text import wikipedia

ARTICLE = "'''Alpha''' is a [[letter|letter of the alphabet]].<ref>A book</ref> " + "It comes first. " * 200


# --- the embedded text ---


def test_embedded_split_is_fixed_disjoint_and_long_enough():
    corpus = text.load_corpus("embedded:wikipedia")
    documents = corpus.documents
    assert [len(documents[split]) for split in text.SPLITS] == [77, 10, 9]
    assert documents["validation"][0].startswith("Alabama")
    assert documents["test"][0].startswith("The Academy Awards")
    assert len({article for articles in documents.values() for article in articles}) == 96
    for split in ("validation", "test"):  # at 4.4 characters a token, 120 blocks of 256 tokens are 135,000
        assert sum(map(len, documents[split])) > 180_000
    assert corpus.sha256 == text.load_corpus("embedded:wikipedia").sha256


def test_embedded_articles_hold_no_markup():
    documents = text.load_corpus("embedded:wikipedia").documents
    prose = "\n".join(article for articles in documents.values() for article in articles)
    marks = ("{{", "}}", "[[", "]]", "''", "<ref", "{|", "__TOC__", "\nReferences\n", "\nExternal links\n")
    for mark in marks:
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
    """The embedded export's place taken by one of twelve articles, a redirect, a talk page and a stub."""

    def page(title, ns, wikitext, extra=""):
        inside = f"<ns>{ns}</ns>{extra}<revision><text>{wikitext}</text></revision>"
        return f"<page><title>{title}</title>{inside}</page>"

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


# --- local files ---


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


@pytest.mark.parametrize(
    "name, content, sentence",
    [
        ("a.txt", b"one paragraph", "too short"),
        ("a.txt", b"", "too short"),
        ("a.txt", b"\xff\xfe\x00", "a.txt cannot be read as UTF-8"),
        ("a.jsonl", b'{"text": "one"}\n' * 9, "too short: nothing is left for test"),
        ("a.jsonl", b'{"text": "one"}\n{"text": \n', "line 2 of .*a.jsonl is not JSON"),
        ("a.jsonl", b'{"body": "one"}\n', "row 1 of a.jsonl has no field"),
        ("a.jsonl", b'["one"]\n', "row 1 of a.jsonl has no field"),
        ("a.pdf", b"%PDF", "must end in"),
    ],
)
def test_bad_file_is_one_sentence(tmp_path, name, content, sentence):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SimDiffError, match=sentence):
        text.load_corpus(str(tmp_path / name))


def test_half_a_character_and_lists_without_end_are_a_sentence(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "w5"}\n{"text": "w5 \\ud83d"}\n')
    with pytest.raises(SimDiffError, match="Row 2 of rows.jsonl holds half a character"):
        text.load_corpus(str(path))
    path.write_text("[" * 100_000)
    with pytest.raises(SimDiffError, match="is no complete JSON list"):
        text.load_corpus(str(path))


@pytest.mark.parametrize(
    "name", ["missing.txt", "data/missing.jsonl", "/no/such/folder", "embedded:wiki", ""]
)
def test_unknown_text_lists_what_may_be_named(name):
    with pytest.raises(SimDiffError, match="give embedded:wikipedia, wikitext2, an existing file"):
        text.load_corpus(name)


# --- the hub, stubbed: these tests need no network ---


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


def test_hub_that_cannot_be_reached_says_what_to_do():  # conftest sets HF_HUB_OFFLINE
    with pytest.raises(SimDiffError, match="nobody/no-such-data .* offline, name a local") as refusal:
        text.load_corpus("nobody/no-such-data")
    assert "\n" not in str(refusal.value)
