"""The embedded text: English Wikipedia articles out of a MediaWiki export, stripped of their mark-up."""

import bz2
import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator

import mwparserfromhell
from mwparserfromhell.nodes import Tag, Template, Wikilink
from tqdm.auto import tqdm

from simdiff_utils import SimDiffError, assets
from simdiff_utils.files import write_whole
from simdiff_utils.text.rows import read_rows

STRIP_RULES = f"v1-mwparserfromhell-{mwparserfromhell.__version__}"  # raise v1 when the rules below change
MIN_ARTICLE_CHARS = 2_000
UNWANTED_TAGS = {"ref", "references", "table", "gallery", "math", "timeline"}
# [[File:...]], [[Category:...]] and links to other languages; not [[2001: A Space Odyssey]]
UNWANTED_LINK = re.compile(r"\s*:?\s*((?i:file|image|media|category)|simple|[a-z]{2,3}(-[a-z-]+)?)\s*:")
TRAILING_SECTION = re.compile(
    r"^==[ \t]*(see also|notes|references|notes and references|footnotes|sources|"
    r"further reading|bibliography|external links)[ \t]*==[ \t]*$",
    re.I | re.M,
)
# What the parser leaves where an article's own mark-up is broken: table rows, unclosed links and tags.
RESIDUE = re.compile(
    r"\{\{[^{}]*\}\}|^[ \t]*(\||!|\{\||\[\[).*$|</?(ref|div|span|br|small|sub|sup|center|nowiki)\b"
    r"[^<>\n]*>|__[A-Z]+__|\{\{|\}\}|\]\]|''",
    re.M,
)


def load_articles() -> list[str]:
    """The embedded articles without mark-up, stripped on first use and kept in the cache."""
    source = assets.fetch("wikipedia")
    stripped = source.with_name(f"articles-{STRIP_RULES}.jsonl")
    try:
        return [row["text"] for row in read_rows(stripped)]
    except SimDiffError:  # not there yet, or damaged
        pass
    with bz2.open(source) as file:
        pages = list(_read_pages(file))
    bar = tqdm(pages, desc="strip mark-up", leave=False)
    articles = [{"title": title, "text": strip_markup(wikitext)} for title, wikitext in bar]
    rows = [article for article in articles if len(article["text"]) > MIN_ARTICLE_CHARS]
    with write_whole(stripped) as partial:
        partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return [row["text"] for row in rows]


def _read_pages(file) -> Iterator[tuple[str, str]]:
    """Title and wikitext of the articles of a MediaWiki export: no redirects, no talk or other pages."""
    for _, element in ElementTree.iterparse(file):
        if element.tag.endswith("}page"):
            if element.findtext("{*}ns") == "0" and element.find("{*}redirect") is None:
                yield element.findtext("{*}title"), element.findtext("{*}revision/{*}text") or ""
            element.clear()


def strip_markup(wikitext: str) -> str:
    """Plain prose of an article: no templates, tables, references, formulas, pictures, trailing sections."""
    trailing = TRAILING_SECTION.search(wikitext)
    code = mwparserfromhell.parse(wikitext[: trailing.start()] if trailing else wikitext)
    _prune(code)
    text = RESIDUE.sub("", code.strip_code())
    text = re.sub(r"\(\s*[,;]?\s*\)", "", text)  # brackets that held a template only
    text = re.sub(r"[ \t\u00a0]+", " ", text)
    text = re.sub(r" ([,.;:)])(?=\s|$)", r"\1", text)
    return re.sub(r" *\n\s*", "\n", text).strip()


def _prune(code: mwparserfromhell.wikicode.Wikicode) -> None:
    """Drop unwanted nodes in place, walking down once: the library's `remove` searches all for each."""
    code.nodes = [node for node in code.nodes if not _is_unwanted(node)]
    for node in code.nodes:
        inner = node.contents if isinstance(node, Tag) else node.text if isinstance(node, Wikilink) else None
        if inner is not None:
            _prune(inner)


def _is_unwanted(node) -> bool:
    if isinstance(node, Tag):
        return str(node.tag).strip().lower() in UNWANTED_TAGS
    return isinstance(node, Template) or (
        isinstance(node, Wikilink) and bool(UNWANTED_LINK.match(str(node.title)))
    )
