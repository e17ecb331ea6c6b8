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
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

RUN_ALL = """
const done = arguments[arguments.length - 1];
const {commands} = window.jupyterapp;
commands.execute("notebook:run-all-cells").then(() => done(null), error => done(String(error)));
"""


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start_lab(folder):
    """JupyterLab on a folder: its process and its address."""
    port, token = free_port(), secrets.token_hex(16)
    options = f"--no-browser --ip=127.0.0.1 --port={port} --IdentityProvider.token={token} --LabApp.expose_app_in_browser=True"
    log = open(folder / "lab.log", "wb")
    command = [sys.executable, "-m", "jupyterlab", "--allow-root", f"--ServerApp.root_dir={folder}", *options.split()]
    process = subprocess.Popen(command, stdout=log, stderr=log)
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


def faults_of_chapter(browser, address, chapter):
    """Run it, then move each of its sliders; yields what is wrong, and last the number of sliders."""
    browser.get(address.format(f"lab/tree/{chapter}"))
    wait = WebDriverWait(browser, 240, poll_frequency=0.5)
    wait.until(lambda b: b.execute_script("return window.jupyterapp?.shell?.currentWidget?.sessionContext?.isReady"))
    failed = browser.execute_async_script(RUN_ALL)
    if failed:
        yield f"{chapter}: {failed}"
    for error in browser.find_elements(By.CSS_SELECTOR, "[data-mime-type='application/vnd.jupyter.stderr']"):
        yield f"{chapter}: {error.text[:200]}"
    # The lab renders a cell when it comes near the window.
    total = browser.execute_script(
        "return window.jupyterapp.shell.currentWidget.content.widgets.filter("
        "w => w.model.sharedModel.getSource().includes('\\nexplore(')).length"
    )
    sliders = 0
    for box in browser.execute_script(
        """const notebook = window.jupyterapp.shell.currentWidget.content;
        return notebook.widgets.map((w, k) => [w.model.sharedModel.getSource(), k])
            .filter(([source]) => source.includes("\\nexplore(")).map(([, k]) => k);"""
    ):
        browser.execute_async_script(
            """const [k, done] = [arguments[0], arguments[arguments.length - 1]];
            const notebook = window.jupyterapp.shell.currentWidget.content;
            notebook.activeCellIndex = k;
            notebook.scrollToItem(k, "center").then(() => setTimeout(done, 500));""",
            box,
        )
        cell = browser.find_element(By.CSS_SELECTOR, ".jp-Notebook .jp-Cell.jp-mod-active")
        wait.until(lambda b, cell=cell: cell.find_elements(By.CSS_SELECTOR, ".noUi-handle"))
        for slider in cell.find_elements(By.CSS_SELECTOR, ".noUi-handle"):
            picture = cell.find_element(By.CSS_SELECTOR, ".widget-html img")
            before = picture.get_attribute("src")
            slider.send_keys(Keys.ARROW_RIGHT)
            try:
                WebDriverWait(browser, 30).until(
                    lambda b, cell=cell, before=before: cell.find_element(
                        By.CSS_SELECTOR, ".widget-html img"
                    ).get_attribute("src")
                    != before
                )
            except Exception as error:
                yield f"{chapter}: a slider does not move its picture ({type(error).__name__})"
            sliders += 1
    if not total or not sliders:
        yield f"{chapter}: no slider found"
    print(f"{chapter}: {sliders} live sliders moved")


def main(chapters):
    faults = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for chapter in chapters:
            shutil.copy(chapter, folder)
        process, address = start_lab(folder)
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
    print("\n".join(faults))
    sys.exit(bool(faults))


if __name__ == "__main__":
    main(sys.argv[1:])
