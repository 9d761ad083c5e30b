"""The labelling panel as it is used: JupyterLab on this machine, Chromium without a window."""

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest
from playwright.sync_api import expect, sync_playwright

ROOT = Path(__file__).resolve().parents[1]
# A folder to keep pictures of the panel in; without it none are taken.
PICTURES = os.environ.get("LABELLING_PICTURES")
KERNEL = "window.jupyterapp.shell.currentWidget?.sessionContext?.session?.kernel"
SCRIPT = "<script>document.title = 'taken over'</script> & <b>bold</b>"
CELL = f"""\
import os
from pathlib import Path
from rlhf_helpers.book.labelling import label
pairs = [
    (
        "How do I keep basil alive on a window sill?",
        "Water it from below when the soil is dry.",
        {SCRIPT!r},
    ),
    *[
        (f"Prompt {{i}}", f"Yes, that is response {{i}}.", f"No.\\n\\nIt is another one, {{i}}.")
        for i in range(1, 8)
    ],
]
Path("kernel.pid").write_text(str(os.getpid()))
session = label(pairs, "answers.jsonl")"""


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def settings(folder, theme):
    """JupyterLab's settings for a test: no news, one theme."""
    extension = folder / "@jupyterlab" / "apputils-extension"
    extension.mkdir(parents=True)
    quiet = {"fetchNews": "false", "checkForUpdates": False}
    (extension / "notification.jupyterlab-settings").write_text(json.dumps(quiet))
    (extension / "themes.jupyterlab-settings").write_text(json.dumps({"theme": theme}))


@contextlib.contextmanager
def jupyterlab(folder, theme="JupyterLab Light"):
    """A server with one notebook in its folder; yields the notebook's address."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL)])
    notebook.metadata.kernelspec = {
        "name": "python3",
        "display_name": "Python 3",
        "language": "python",
    }
    work = folder / "work"
    work.mkdir()
    nbformat.write(notebook, work / "label.ipynb")
    settings(folder / "settings", theme)
    # nothing of the user's own Jupyter is read or changed
    own = ["JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR"]
    env = os.environ | {name: str(folder / name.lower()) for name in own}
    env |= {"JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"), "PYTHONPATH": str(ROOT)}
    port, token = free_port(), secrets.token_hex()
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"]
    command += [f"--ServerApp.port={port}", "--ServerApp.port_retries=0", "--ip=127.0.0.1"]
    command += [f"--IdentityProvider.token={token}", "--expose-app-in-browser"]
    with open(folder / "server.log", "w") as log:
        server = subprocess.Popen(command, cwd=work, env=env, stdout=log, stderr=log)
    try:
        wait_for(f"http://127.0.0.1:{port}/api/status?token={token}", server, folder)
        yield f"http://127.0.0.1:{port}/lab/tree/label.ipynb?token={token}"
    finally:
        server.terminate()
        try:
            server.wait(timeout=20)
        except subprocess.TimeoutExpired:
            server.kill()


def wait_for(address, server, folder, seconds=60):
    end = time.monotonic() + seconds
    while time.monotonic() < end and server.poll() is None:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(address, timeout=5).close()
            return
        time.sleep(0.2)
    pytest.fail("JupyterLab did not start:\n" + (folder / "server.log").read_text()[-2000:])


@contextlib.contextmanager
def chromium(size=(1280, 900)):
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.fail("no Chromium on the PATH: apt-get install chromium")
    with sync_playwright() as playwright:
        # --no-sandbox: a container's root has no sandbox
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        context = browser.new_context(viewport={"width": size[0], "height": size[1]})
        context.set_default_timeout(30_000)
        yield context.new_page()
        browser.close()


def run_all(page):
    # what is run before the kernel is there is not run at all
    page.wait_for_function(f"{KERNEL} && {KERNEL}.status === 'idle'", timeout=60_000)
    page.evaluate("window.jupyterapp.commands.execute('notebook:run-all-cells')")


def open_and_run(page, address):
    page.goto(address)
    page.wait_for_function("window.jupyterapp && window.jupyterapp.restored")
    page.locator(".jp-Notebook .jp-CodeCell").wait_for()
    run_all(page)
    panel = page.locator(".rlhf-label")
    expect(panel).to_be_visible(timeout=90_000)
    return panel


def progress(panel, count, total=8):
    expect(panel.get_by_role("status")).to_have_text(f"{count} of {total} answered")


def answers(work):
    """Of the lines on the disk, pair by pair: what was pressed."""
    return [
        json.loads(line)["answer"] for line in (work / "answers.jsonl").read_text().splitlines()
    ]


def cells(page):
    return page.locator(".jp-Notebook .jp-Cell").count()


def picture(page, panel, name):
    if PICTURES:
        panel.screenshot(path=Path(PICTURES) / f"{name}.png")
        page.screenshot(path=Path(PICTURES) / f"{name}-page.png")


def kill_kernel(page, work):
    os.kill(int((work / "kernel.pid").read_text()), signal.SIGKILL)
    (work / "kernel.pid").unlink()
    # JupyterLab says that it starts the kernel again
    page.locator(".jp-Dialog").get_by_role("button", name="Ok").click()


def test_answers_survive_a_killed_kernel(tmp_path):
    work = tmp_path / "work"
    with jupyterlab(tmp_path) as address, chromium() as page:
        panel = open_and_run(page, address)
        progress(panel, 0)
        expect(panel.get_by_text(SCRIPT)).to_be_visible()
        assert page.title() != "taken over"
        expect(panel.locator("script, .rlhf-text b")).to_have_count(0)
        picture(page, panel, "light")

        panel.get_by_role("button", name="A is better").click()
        progress(panel, 1)
        assert answers(work) == ["a"]
        before = cells(page)
        for key, count in [("b", 2), ("ArrowLeft", 3), ("u", 2), ("t", 3)]:
            page.keyboard.press(key)
            progress(panel, count)
        assert answers(work) == ["a", "b", "a", "undo", "tie"]
        # a key of the notebook's own (x: cut the cell) does nothing here, nor did a and b above
        page.keyboard.press("x")

        kill_kernel(page, work)
        run_all(page)
        progress(panel, 3)
        expect(panel.get_by_text("Prompt 3", exact=True)).to_be_visible()
        panel.get_by_text("Prompt 3", exact=True).click()
        for key, count in [("s", 4), ("ArrowRight", 5), ("B", 6), ("a", 7), ("t", 8)]:
            page.keyboard.press(key)
            progress(panel, count)
        expect(panel.get_by_text("All pairs are answered")).to_be_visible()
        assert answers(work)[5:] == ["skip", "b", "b", "a", "tie"]
        picture(page, panel, "done")
        page.keyboard.press("u")
        progress(panel, 7)
        assert cells(page) == before


def test_a_press_too_many_and_a_closed_tab_spoil_nothing(tmp_path):
    work = tmp_path / "work"
    with jupyterlab(tmp_path, "JupyterLab Dark") as address, chromium((900, 900)) as page:
        panel = open_and_run(page, address)
        picture(page, panel, "dark")
        # faster than the kernel can answer
        panel.evaluate("""(panel) => {
            for (const name of ["a", "a", "b"]) panel.querySelector("button.rlhf-" + name).click();
        }""")
        progress(panel, 1)
        panel.get_by_text("Prompt 1", exact=True).click()
        page.keyboard.down("b")
        progress(panel, 2)
        # held down: the keyboard repeats it
        page.keyboard.down("b")
        page.keyboard.up("b")
        # time for a press too many to arrive
        page.wait_for_timeout(1000)
        assert answers(work) == ["a", "b"]
        # Enter and the space bar press the button that has the focus
        panel.get_by_role("button", name="Tie").focus()
        page.keyboard.press("Enter")
        progress(panel, 3)
        page.keyboard.press("Space")
        progress(panel, 4)
        assert answers(work) == ["a", "b", "tie", "tie"]
        # a closed tab, and another
        other = page.context.new_page()
        page.close()
        panel = open_and_run(other, address)
        progress(panel, 4)
        panel.get_by_role("button", name="B is better").click()
        progress(panel, 5)
