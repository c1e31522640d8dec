"""A grid's report: whole, self-contained, and opened in a real browser."""

import base64
import re
import shutil
import subprocess

import pandas as pd
import pytest

from simdiff_utils.files import write_kept
from workflow.plan import NotebookRun
from workflow.report import write_report

PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
EVIL = '<script>undefinedName()</script> & "it\'s"'


@pytest.fixture
def report(tmp_path):
    """A report of three runs, of which one failed and one did not run."""
    batch, folder = tmp_path / "batch", tmp_path / "model" / "03_pruning-1"
    folder.mkdir(parents=True)
    (folder / "03_comparison.png").write_bytes(PIXEL)
    pd.DataFrame({"criterion": ["masd", EVIL], "ratio": [1.23456789, None]}).to_csv(
        folder / "03_comparison.csv", index=False
    )
    settings = {"model": "some/model", "seed": 0, "criterion": "masd", "n_remove": 2}
    origin = {"time": "2026-01-01T00:00:00", "model": EVIL, "text": "rows", "machine": "some machine"}
    result = {
        "notebook": "03_pruning",
        "headline": {"removed layers": [3, 4], "said": EVIL},
        "folder": str(folder),
        "seconds": 12.3,
        "peak_memory_gib": 0.5,
        "settings": settings,
        "origin": origin | {"git_revision": None, "code_sha256": "abc"},
    }
    write_kept(batch / "model" / "03-masd-2-a.json", result)
    executed = batch / "model" / "executed" / "03_pruning-masd-2-a.ipynb"
    executed.parent.mkdir()
    executed.write_text("{}")
    runs = {
        f"model/03-masd-{k}-a.json": NotebookRun("03_pruning", settings | {"n_remove": k}, {})
        for k in (2, 3, 4)
    }
    write_report(batch, runs, batch / "report.html", {"model/03-masd-3-a.json": f"out of memory {EVIL}"})
    return batch / "report.html"


def test_a_report_says_what_was_found_what_failed_and_why(report):
    page = report.read_text(encoding="utf-8")
    assert "1 of 3 notebook runs are done" in page and "1 failed" in page
    assert "some/model · masd, K = 3: out of memory &lt;script&gt;" in page and "K = 4: not run yet" in page
    assert "[3, 4]" in page and "1.235" in page and "some machine" in page
    assert "undefinedName()</script>" not in page, "what stands in results is text, never a script"


def test_a_report_needs_nothing_but_itself(report):
    page = report.read_text(encoding="utf-8")
    addresses = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(addresses) > 2
    for address in addresses:
        assert address.startswith(("data:image/png;base64,", "#")) or (report.parent / address).exists(), (
            address
        )
    for anchor in (address[1:] for address in addresses if address.startswith("#")):
        assert f'id="{anchor}"' in page


@pytest.mark.long
@pytest.mark.skipif(not shutil.which("chromium"), reason="chromium missing: apt-get install chromium")
def test_a_browser_shows_every_picture_and_meets_no_error(report):
    assert browse(report) == {"images": "1", "broken": "0", "errors": "0"}
    broken = report.with_name("broken.html")
    page = report.read_text(encoding="utf-8").replace("base64,iVBOR", "base64,AAAA")
    page = page.replace("</body>", "<script>nothing()</script></body>")
    broken.write_text(page, encoding="utf-8")
    assert browse(broken) == {"images": "1", "broken": "1", "errors": "1"}, "this test would not see an error"


def browse(page) -> dict[str, str]:
    """What a real browser finds on a page: pictures, those that do not show, errors of scripts."""
    watched = page.with_name(f"watched-{page.name}")
    text = page.read_text(encoding="utf-8")
    text = text.replace("<head>", "<head><script>errors = 0; onerror = () => { errors += 1; };</script>", 1)
    counted = """<script>onload = () => {
        const broken = [...document.images].filter(image => !image.naturalWidth).length;
        document.title = JSON.stringify({images: document.images.length, broken: broken, errors: errors});
        };</script></body>"""
    watched.write_text(text.replace("</body>", counted), encoding="utf-8")
    options = "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --virtual-time-budget=10000"
    command = ["chromium", *options.split(), "--dump-dom", watched.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = re.search(r"<title>(\{.*?\})</title>", done.stdout)
    return dict(re.findall(r'"(\w+)":(\d+)', found[1]))
