"""Run chapters in JupyterLab, in headless Chromium, and move their sliders: there is a kernel, so they are alive.

    python tests/lab.py book/01_black_box.ipynb book/02_gradient_from_values.ipynb

Of each chapter: no cell fails, and each slider, moved by the arrow key, makes the kernel draw another picture.
"""

import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from browser import open_browser
from selenium.common.exceptions import StaleElementReferenceException, TimeoutException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

NOTEBOOK = "const notebook = window.jupyterapp.shell.currentWidget.content; "
READY = """
const opened = window.jupyterapp?.shell?.currentWidget;
return opened?.context?.path === arguments[0] && opened.sessionContext.isReady
    && opened.sessionContext.session?.kernel?.status === "idle";
"""
PICTURE, TRACEBACK = ".widget-html img", ".widget-html pre"
RUN_ALL = """
const done = arguments[0];
window.jupyterapp.commands.execute("notebook:run-all-cells")
    .then(succeeded => done(succeeded ? null : "a cell failed"), error => done(String(error)));
"""
FIND = (
    NOTEBOOK
    + """
return notebook.widgets.map((cell, k) => [k, cell.model.sharedModel.getSource()])
    .filter(([k, source]) => /^explore[(]/m.test(source)).map(([k]) => k);
"""
)
# The lab renders a cell when it comes near the window.
SCROLL = (
    NOTEBOOK
    + """
const [k, done] = arguments;
notebook.activeCellIndex = k;
notebook.scrollToItem(k, "center").then(() => setTimeout(done, 500));
"""
)


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start_lab(folder):
    """JupyterLab on a folder: its process and its address."""
    port, token = free_port(), secrets.token_hex(16)
    options = f"--no-browser --allow-root --ip=127.0.0.1 --port={port} --LabApp.expose_app_in_browser=True"
    options += f" --IdentityProvider.token={token} --ServerApp.root_dir={folder}"
    log = open(folder / "lab.log", "wb")
    process = subprocess.Popen([sys.executable, "-m", "jupyterlab", *options.split()], stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}/{{}}?token={token}"
    for _ in range(240):
        try:
            urllib.request.urlopen(address.format("api/status"))
            return process, address
        except OSError:
            if process.poll() is not None:
                break
            time.sleep(0.25)
    process.kill()
    sys.exit((folder / "lab.log").read_text())


def find(browser, selector):
    """Elements of the active cell; the lab may draw a cell anew, so they are looked up each time."""
    return browser.find_elements(By.CSS_SELECTOR, f".jp-Notebook .jp-Cell.jp-mod-active {selector}")


def faults_of_chapter(browser, address, chapter):
    """Run it, then move each of its sliders; yields what is wrong."""
    browser.get(address.format(f"lab/workspaces/{Path(chapter).stem}/tree/{chapter}"))
    wait = WebDriverWait(browser, 120, ignored_exceptions=[IndexError, StaleElementReferenceException])
    wait.until(lambda b: b.execute_script(READY, chapter))
    failed = browser.execute_async_script(RUN_ALL)
    if failed:
        yield f"{chapter}: {failed}"
        return
    sliders = 0
    for k in browser.execute_script(FIND):
        browser.execute_async_script(SCROLL, k)
        handles = wait.until(lambda b: find(b, PICTURE) and find(b, ".noUi-handle"))
        for which in range(len(handles)):
            before = find(browser, PICTURE)[0].get_attribute("src")
            find(browser, ".noUi-handle")[which].send_keys(Keys.ARROW_RIGHT)
            try:
                wait.until(
                    lambda b, before=before: find(b, TRACEBACK) or find(b, PICTURE)[0].get_attribute("src") != before
                )
            except TimeoutException:
                yield f"{chapter}: a slider does not move its picture"
            if find(browser, TRACEBACK):
                yield f"{chapter}: a slider fails: {find(browser, TRACEBACK)[0].text.splitlines()[-1]}"
                break
            sliders += 1
    if not sliders:
        yield f"{chapter}: no slider found"
    print(f"{chapter}: {sliders} live sliders moved")


def main(chapters):
    faults = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        book = folder / "book"  # a copy: what is run is saved
        shutil.copytree(Path(chapters[0]).parent, book)
        process, address = start_lab(book)
        browser = open_browser(folder / "profile")
        browser.set_script_timeout(300)
        browser.set_window_size(1400, 1000)
        try:
            for chapter in chapters:
                faults += faults_of_chapter(browser, address, Path(chapter).name)
        finally:
            browser.quit()
            process.terminate()
            process.wait(20)
    print("\n".join(faults) or f"{len(chapters)} chapters in JupyterLab: 0 faults")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main([Path(argument).resolve() for argument in sys.argv[1:]] or sys.exit(__doc__))
