"""The notebooks as a reader meets them: in JupyterLab, in a real browser, by mouse and keyboard.

On a copy of the notebooks whose parameters name a tiny model; 06 shows the committed measurements. A picture
of the last page of each test lies in its folder of temporary files (pytest's --basetemp).
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pytest
from playwright.sync_api import Locator, Page, expect, sync_playwright

from simdiff_utils.parameters import MORE, readable

CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not CHROMIUM, reason="chromium missing: apt-get install chromium"),
]
NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
LESSONS = sorted(NOTEBOOKS.glob("[0-9]*.ipynb"))
PATIENCE = 180_000  # milliseconds: other tests may hold the cores
expect.set_options(timeout=PATIENCE)
SMALL = dict(n_samples=4, seq_len=16, n_validation=2, n_test=2, n_remove_grid=[1, 2, 3], n_remove=2)
SMALL |= dict(max_steps=2, max_length=16, prompt_len=8, n_new_tokens=4, n_pairs=2, prompt="w1 w2")
# every cell is in the page, not only those in view; and nobody asks about news on top of the first cells
SETTINGS = {
    "notebook-extension/tracker": {"windowingMode": "none"},
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}
FOLDERS = dict(JUPYTER_CONFIG_DIR="config", JUPYTER_RUNTIME_DIR="runtime", JUPYTER_DATA_DIR="data")
FOLDERS |= dict(IPYTHONDIR="ipython", SIMDIFF_RUNS="runs")
CELLS = ".jp-Notebook .jp-Cell"
# In the page's own words. An error stops "run all": there is nothing to wait for then.
IDLE = """() => {
    const panel = window.jupyterapp?.shell.currentWidget;
    return panel?.content?.widgets?.length && panel.sessionContext.session?.kernel?.status === 'idle';
}"""
ERRORS = """() => jupyterapp.shell.currentWidget.content.widgets
    .flatMap(cell => cell.model.sharedModel.outputs ?? [])
    .filter(output => output.output_type === 'error').map(output => output.evalue)"""
ALL_RUN = f"""() => ({ERRORS})().length || jupyterapp.shell.currentWidget.content.widgets.every(
    cell => cell.model.type !== 'code' || cell.model.executionCount)"""
PICTURES = """async cells => {
    await Promise.allSettled([...document.images].map(image => image.decode()));
    return cells.map(cell => [...cell.querySelectorAll('img')].filter(image => image.naturalWidth).length);
}"""


def small_parameters(source: str, number: str, model: Path, text: Path) -> str:
    """A parameters cell with a tiny model's values; what it does not declare goes into its `more`."""
    given = SMALL | {"model": str(model), "text": str(text)}
    declared = set(re.findall(r"^(\w+):", source, re.MULTILINE))
    given[MORE] = {name: given[name] for name in (given.keys() & readable(number)) - declared}
    for name in declared & given.keys():
        line = re.compile(rf"^({name}: \w+ =) .*?(?=  #)", re.MULTILINE)
        source = line.sub(lambda match, value=given[name]: f"{match[1]} {value!r}", source)
    return source


@pytest.fixture(scope="module")
def lab(tmp_path_factory, tiny_model, tiny_text):
    """Function: a notebook's path -> its address in a JupyterLab with files, settings and runs of its own."""
    folder = tmp_path_factory.mktemp("lab")
    for name in ("notebooks", "docs"):
        shutil.copytree(NOTEBOOKS.parent / name, folder / "files" / name)
    for path in (folder / "files" / "notebooks").glob("[0-9]*.ipynb"):
        content = nbformat.read(path, as_version=4)
        for cell in (cell for cell in content.cells if cell.cell_type == "code"):
            cell.update(outputs=[], execution_count=None)
            if is_tagged(cell, "parameters") and not path.stem.startswith("06"):
                cell.source = small_parameters(cell.source, path.stem[:2], tiny_model, tiny_text)
        nbformat.write(content, path)
    for name, values in SETTINGS.items():
        path = folder / "config" / "lab" / "user-settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    options = "--no-browser --port=0 --allow-root --expose-app-in-browser".split()
    with open(folder / "log", "w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyter", "lab", *options, f"--ServerApp.root_dir={folder / 'files'}"],
            env=os.environ | {name: str(folder / place) for name, place in FOLDERS.items()},
            stdout=log,
            stderr=log,
        )
    try:
        deadline = time.monotonic() + PATIENCE / 1000
        while not (found := list((folder / "runtime").glob("jpserver-*.json"))):
            assert server.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.2)
        facts = json.loads(found[0].read_text())
        yield lambda path: f"{facts['url']}lab/tree/notebooks/{path}?reset&token={facts['token']}"
    finally:
        server.terminate()  # it ends its kernels
        server.wait(60)


@pytest.fixture(scope="module")
def browser():
    """The system's chromium; its sandbox refuses root, and containers have little shared memory."""
    with sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, tmp_path):
    """A page on which no script fails, and which asks nobody but the server; at the end it is pictured."""
    page, failures, asked = browser.new_page(viewport={"width": 1280, "height": 900}), [], set()
    page.set_default_timeout(PATIENCE)
    page.on("pageerror", lambda error: failures.append(error))
    page.on("request", lambda request: asked.add(urlsplit(request.url).hostname))
    yield page
    height = page.locator(".jp-WindowedPanel-inner").last.evaluate("panel => panel.scrollHeight")
    page.set_viewport_size({"width": 1280, "height": max(900, min(height + 200, 16_000))})
    page.locator(".jp-WindowedPanel-outer").last.evaluate("panel => { panel.scrollTop = 0; }")
    page.screenshot(path=tmp_path / "page.png")
    page.evaluate("jupyterapp.serviceManager.sessions.shutdownAll()")
    page.close()
    assert not failures and asked <= {"localhost", "127.0.0.1", None}


def is_tagged(cell, tag: str) -> bool:
    return tag in cell.metadata.get("tags", [])


def open_notebook(page: Page, address: str) -> Locator:
    """The notebook's cells, once its kernel is there."""
    page.goto(address)
    page.wait_for_function(IDLE)
    return page.locator(CELLS)


def run_all(page: Page) -> None:
    page.locator(".lm-MenuBar-item", has_text=re.compile("^Run$")).click()
    page.locator(".lm-Menu-item", has_text=re.compile("^Run All Cells$")).click()
    page.wait_for_function(ALL_RUN)  # the last cell has begun
    page.wait_for_function(IDLE)
    assert page.evaluate(ERRORS) == []


def run_cell(page: Page, cell: Locator, lines: str | None = None) -> None:
    """Run a cell by keyboard, after typing other lines into it (the editor indents by itself)."""
    cell.locator(".cm-content").click()
    if lines:
        page.keyboard.press("ControlOrMeta+A")
        for number, line in enumerate(lines.splitlines()):
            page.keyboard.type("\n" * (number > 0) + line.strip())
    page.keyboard.press("Control+Enter")


def check_links(page: Page) -> None:
    """Every link to a file leads to one that the server has."""
    links = page.locator(f"{CELLS} a").evaluate_all("links => links.map(link => link.href)")
    paths = {unquote(urlsplit(link).path).partition("/files/")[2] for link in links} - {""}
    assert len(paths) > 1
    for path in paths:  # fails where there is none
        page.evaluate("path => jupyterapp.serviceManager.contents.get(path, {content: false})", path)


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda path: path.stem)
def test_a_lesson_runs_and_shows_everything(lesson, lab, page):
    written = nbformat.read(lesson, as_version=4).cells
    cells = open_notebook(page, lab(lesson.name))
    expect(cells).to_have_count(len(written))
    (place,) = (i for i, cell in enumerate(written) if is_tagged(cell, "parameters"))
    expect(cells.nth(place).locator(".jp-InputPlaceholder")).to_be_visible()
    expect(cells.nth(place).locator(".cm-editor")).not_to_be_visible()
    run_all(page)
    pictures = [cell.source.count("plt.show()") * (cell.cell_type == "code") for cell in written]
    expect(page.locator(f"{CELLS} img")).to_have_count(sum(pictures))
    assert cells.evaluate_all(PICTURES) == pictures
    prose = "\n".join(re.sub("`.*?`", "", c.source) for c in written if c.cell_type == "markdown")
    formulas = re.findall(r"\$\$.+?\$\$|\$[^$]+\$", prose, re.DOTALL)
    expect(page.locator(f"{CELLS} mjx-container")).to_have_count(len(formulas))
    expect(page.locator("mjx-merror, mjx-container [style*='red']")).to_have_count(0)  # unknown: in red
    check_links(page)


def test_links_lead_from_the_start_to_a_lesson_and_on(lab, page):
    open_notebook(page, lab("start.ipynb"))
    run_all(page)
    check_links(page)
    for name in ("01_calibration_capture.ipynb", "02_criterion_derivation.ipynb"):
        page.locator(f".jp-NotebookPanel:visible a[href*='{name}']").first.click()
        expect(page.locator("#jp-main-dock-panel .lm-TabBar-tab.lm-mod-current")).to_have_text(name)
        page.wait_for_function(IDLE)
    page.locator(".jp-NotebookPanel:visible a[href*='glossary.md']").first.click()
    expect(page.locator(".jp-MarkdownViewer h1")).to_contain_text("Glossary")


def test_a_running_cell_is_interrupted_and_the_kernel_goes_on(lab, page):
    cell = open_notebook(page, lab("01_calibration_capture.ipynb")).last
    run_all(page)
    run_cell(page, cell, "import time\ntime.sleep(600)")
    expect(cell.locator(".jp-InputPrompt")).to_have_text("[*]:")
    page.get_by_title("Interrupt the kernel").click()
    expect(cell).to_contain_text("KeyboardInterrupt")
    run_cell(page, cell, "print(run.n_layers, 'layers')")
    expect(cell.locator(".jp-OutputArea-output")).to_have_text("6 layers")


def test_an_exercise_is_answered_wrongly_and_then_rightly(lab, page):
    path = NOTEBOOKS / "exercises" / "03_pruning.ipynb"
    written = nbformat.read(path, as_version=4).cells
    cells = open_notebook(page, lab(f"exercises/{path.name}"))
    check_links(page)
    places = {tag: [is_tagged(cell, tag) for cell in written].index(True) for tag in ("stub", "check")}
    solution = page.locator("details", has_text="Solution").first
    expect(solution.locator("code")).not_to_be_visible()
    solution.locator("summary").click()
    right = solution.locator("code").inner_text()
    run_cell(page, page.locator(f"{CELLS}.jp-CodeCell").first)  # the imports
    wrong = right.replace("{old: new", "{new: old")
    for answer, said in ((wrong, "Not yet: this maps new to old"), (right, "Right.")):
        run_cell(page, cells.nth(places["stub"]), answer)
        run_cell(page, cells.nth(places["check"]))
        expect(cells.nth(places["check"]).locator(".jp-OutputArea-output")).to_contain_text(said)
