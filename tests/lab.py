"""Run chapters in JupyterLab, in headless Chromium, and move their sliders: there is a kernel, so they are alive.

    python tests/lab.py book/01_black_box.ipynb book/02_gradient_from_values.ipynb

Of each chapter: no cell fails, and each slider, moved by the arrow key, makes the kernel draw another picture.
Settings, workspaces and kernels of the user who runs this play no part.
"""

import os
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

# The panel is found by its path: the lab's currentWidget is set by focus events, which a window in the back never gets.
PANEL = """
const path = arguments[0], shell = window.jupyterapp?.shell;
const panel = shell && [...shell.widgets("main")].find(panel => panel.context?.path === path);
"""
READY = (
    PANEL
    + """
return panel?.sessionContext.isReady && panel.sessionContext.session?.kernel?.status === "idle";
"""
)
STATE = (
    PANEL
    + """
const session = panel?.sessionContext;
return JSON.stringify({page: document.title, ready: session?.isReady, kernel: session?.session?.kernel?.status,
    dialog: document.querySelector(".jp-Dialog")?.innerText, focus: document.hasFocus(),
    open: shell && [...shell.widgets("main")].map(panel => panel.context?.path ?? panel.id)});
"""
)
PICTURE, TRACEBACK = ".widget-html img", ".widget-html pre"
# The driver gives each command two minutes, so none of them waits long: runs are started, then asked after.
RUN_ALL = """
window.outcome = null;
window.jupyterapp.commands.execute("notebook:run-all-cells")
    .then(succeeded => {outcome = succeeded ? "done" : "a cell failed"}, error => {outcome = String(error)});
"""
FIND = (
    PANEL
    + """
return panel.content.widgets.map((cell, k) => [k, cell.model.sharedModel.getSource()])
    .filter(([k, source]) => /^explore[(]/m.test(source)).map(([k]) => k);
"""
)
# The lab renders a cell when it comes near the window.
SCROLL = (
    PANEL
    + """
panel.content.activeCellIndex = arguments[1];
panel.content.scrollToItem(arguments[1], "center");
"""
)


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start_lab(folder, home):
    """JupyterLab on a folder, with all that it remembers in the folder `home`: its process and its address."""
    port, token = free_port(), secrets.token_hex(16)
    options = f"--no-browser --allow-root --ip=127.0.0.1 --port={port} --LabApp.expose_app_in_browser=True"
    options += f" --IdentityProvider.token={token} --ServerApp.root_dir={folder}"
    # jupyter's folders are told one by one: what a user has set, saved or installed would be found before ours
    places = {f"JUPYTER_{kind}_DIR": str(home / kind.lower()) for kind in ("CONFIG", "DATA", "RUNTIME")}
    places |= {"IPYTHONDIR": str(home / "ipython"), "JUPYTER_PREFER_ENV_PATH": "1"}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JUPYTER")} | places
    log = open(home / "lab.log", "wb")
    command = [sys.executable, "-m", "jupyterlab", *options.split()]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)
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
    sys.exit((home / "lab.log").read_text())


def find(browser, selector):
    """Elements of the active cell; the lab may draw a cell anew, so they are looked up each time."""
    return browser.find_elements(By.CSS_SELECTOR, f".jp-Notebook .jp-Cell.jp-mod-active {selector}")


def drawn(browser, chapter, k):
    """The handles of the sliders in cell k, once its picture is there."""
    browser.execute_script(SCROLL, chapter, k)
    return find(browser, PICTURE) and find(browser, ".noUi-handle")


def faults_of_chapter(browser, address, chapter):
    """Run it, then move each of its sliders; yields what is wrong."""
    wait = WebDriverWait(browser, 120, ignored_exceptions=[IndexError, StaleElementReferenceException])
    for attempt in ("first", "second"):
        try:
            browser.get(address.format(f"lab/workspaces/{Path(chapter).stem}-{attempt}/tree/{chapter}"))
            wait.until(lambda b: b.execute_script(READY, chapter))
            break
        except TimeoutException:
            print(f"{chapter}: not open after 120 s ({attempt} attempt); {browser.execute_script(STATE, chapter)}")
    else:
        yield f"{chapter}: JupyterLab does not open it"
        return
    browser.execute_script(RUN_ALL)
    try:
        outcome = WebDriverWait(browser, 900).until(lambda b: b.execute_script("return window.outcome"))
    except TimeoutException:
        outcome = f"not run through after 900 s; {browser.execute_script(STATE, chapter)}"
    if outcome != "done":
        yield f"{chapter}: {outcome}"
        return
    sliders = 0
    for k in browser.execute_script(FIND, chapter):
        try:
            handles = wait.until(lambda b, k=k: drawn(b, chapter, k))
        except TimeoutException:
            yield f"{chapter}: no picture with sliders in cell {k}"
            continue
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
        process, address = start_lab(book, folder)
        browser = open_browser(folder / "profile", logs=())
        browser.set_page_load_timeout(60)
        browser.execute_cdp_cmd("Emulation.setFocusEmulationEnabled", {"enabled": True})
        browser.set_window_size(1400, 1000)
        try:
            for chapter in chapters:
                faults += faults_of_chapter(browser, address, Path(chapter).name)
        finally:
            browser.quit()
            process.terminate()
            process.wait(20)
        if any("does not open" in fault for fault in faults):
            print((folder / "lab.log").read_text())
    print("\n".join(faults) or f"{len(chapters)} chapters in JupyterLab: 0 faults")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main([Path(argument).resolve() for argument in sys.argv[1:]] or sys.exit(__doc__))
