"""The one reader of a user's files: text, and rows of JSON, plain or gzip; every refusal is one sentence."""

import gzip
import json
import zlib
from pathlib import Path

from simdiff_utils import SimDiffError, one_line
from simdiff_utils.files import repository_root


def find_file(name: str) -> Path | None:
    """The file of that name, from here or from the repository's root: notebooks run in their own folder."""
    places = (Path(name).expanduser(), repository_root() / name)
    return next((path for path in places if path.is_file()), None)


def read_text(path: Path) -> str:
    """Text of a file, plain or .gz, in UTF-8 with or without a byte order mark; line ends become newlines.

    Raises:
        SimDiffError: it cannot be opened, is cut off, or is no UTF-8.
    """
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig") as file:
            return file.read()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise SimDiffError(f"{_short(path)} cannot be read as UTF-8 text ({one_line(error)}).") from error


def read_rows(path: Path) -> list:
    """Rows of a file: what its JSON list holds, or its lines, each a JSON value; blank lines do not count.

    The first character tells which it is, not the file's name.

    Raises:
        SimDiffError: it cannot be read, is empty, or a line is not JSON.
    """
    content = read_text(path)
    if not content.strip():
        raise SimDiffError(f"{_short(path)} is empty.")
    if content.lstrip().startswith("["):
        return _parse(content, f"{_short(path)} is no complete JSON list")
    lines = content.split("\n")  # not splitlines, which would also cut at a U+2028 inside a text
    return [
        _parse(line, f"line {i} of {_short(path)} is not JSON")
        for i, line in enumerate(lines, start=1)
        if line.strip()
    ]


def _parse(content: str, refusal: str) -> object:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:  # the latter: lists in lists without end
        raise SimDiffError(f"{refusal} ({error}): write a list of rows, or one row a line.") from error


def check_characters(row: str, number: int, source: str) -> None:
    """Refuse half a character, which JSON can state, and no tokenizer can read."""
    try:
        row.encode()
    except UnicodeEncodeError as error:
        raise SimDiffError(
            f"Row {number} of {source} holds half a character ({error}): mend that row or leave it out."
        ) from error


def _short(path: Path) -> str:
    """Its name and its folder's: of task data `validation.jsonl` alone would say little."""
    return "/".join(path.parts[-2:])
