"""The reader of files: text and rows of JSON, plain or gzip, and one sentence for what cannot be read."""

import gzip
import json

import pytest

from simdiff_utils import SimDiffError
from simdiff_utils.text.rows import find_file, read_rows, read_text

ROWS = [{"text": "one\u2028\x85two"}, 7, "é", None]


@pytest.mark.parametrize("name", ["a.json", "a.json.gz", "a.jsonl", "a.jsonl.gz"])
def test_a_list_or_a_row_a_line_plain_or_gzip_with_byte_order_mark_and_blank_lines(tmp_path, name):
    lines = [json.dumps(row, ensure_ascii=False) for row in ROWS]
    content = "\r\n\r\n".join(lines) + "\r\n" if "jsonl" in name else f" [{','.join(lines)}]"
    content = f"\ufeff{content}".encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert read_rows(tmp_path / name) == ROWS


@pytest.mark.parametrize("name, read", [("a.txt", read_text), ("a.json", read_rows), ("a.jsonl", read_rows)])
def test_what_is_no_text_is_named_with_its_folder(tmp_path, name, read):
    whole = gzip.compress(b'[{"text": "a"}]' * 99, mtime=0)
    bad = {name: "[ä]".encode("latin-1")}
    bad |= dict.fromkeys([f"{name}.gz"], b"[1]") | {
        f"cut-{name}.gz": whole[:-9],
        f"mad-{name}.gz": whole[:10] + b"\xff" * 99,
    }
    for each, content in (bad | {f"gone-{name}": None}).items():
        if content is not None:
            (tmp_path / each).write_bytes(content)
        with pytest.raises(
            SimDiffError, match=rf"^{tmp_path.name}/{each} cannot be read as UTF-8 text \("
        ) as refused:
            read(tmp_path / each)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "content, sentence",
    [
        ("", "a.jsonl is empty"),
        (" \n\n", "a.jsonl is empty"),
        (
            '{"a": 1}\n\n{"a": 1,\n',
            "line 3 of .*/a.jsonl is not JSON .*: write a list of rows, or one row a line",
        ),
        ('{"version": 1,\n "data": [{"text": "a"}]}', "line 1 of .*/a.jsonl is not JSON"),
        ('[{"text": "a b"},\n{"text"', "a.jsonl is no complete JSON list .*: write a list of rows"),
    ],
)
def test_what_is_no_row_is_named_by_its_line(tmp_path, content, sentence):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(SimDiffError, match=sentence) as refused:
        read_rows(tmp_path / "a.jsonl")
    assert "\n" not in str(refused.value)


def test_a_file_is_found_from_the_notebooks_folder(tmp_path, monkeypatch):
    (tmp_path / "pyproject.toml").touch()
    for folder in ("simdiff_utils", "notebooks"):
        (tmp_path / folder).mkdir()
    (tmp_path / "mine.txt").touch()
    monkeypatch.chdir(tmp_path / "notebooks")
    assert find_file("mine.txt") == tmp_path / "mine.txt"
    assert find_file("notebooks") is find_file("") is find_file("yours.txt") is None
