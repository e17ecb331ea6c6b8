"""Open the built book in headless Chromium, with the network off, and check what only a browser shows.

    python tests/browser.py _build/html

On every page: no error on the console, no request that leaves the machine, every equation typeset; nothing scrolls
sideways on a desk, and on a phone only code, tables and equations do, by themselves; axe-core finds nothing serious,
light or dark. In every figure made by `explore`: each slider, moved by the arrow keys, changes picture and alternative
text. With SCREENSHOTS=folder, pictures of every page for people to look at: as wide as a desk and a phone, light and
dark, sliders moved.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

from axe_core_python.base import AXE_SCRIPT
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

SIZES = {"desk": (1280, 900), "monitor": (1440, 900), "phone": (390, 844)}


def open_browser(profile, logs=("browser", "performance")):
    options = webdriver.ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    for argument in (
        "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
        " --disable-background-timer-throttling --disable-renderer-backgrounding"
        " --disable-backgrounding-occluded-windows"
        " --disable-component-update --disable-sync --disable-dev-shm-usage --hide-scrollbars"
    ).split():
        options.add_argument(argument)
    options.add_argument("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1")
    options.add_argument(f"--user-data-dir={profile}")
    options.set_capability("goog:loggingPrefs", dict.fromkeys(logs, "ALL"))
    service = webdriver.ChromeService("/usr/bin/chromedriver")  # Debian's: nothing is downloaded
    browser = webdriver.Chrome(options=options, service=service)
    browser.set_script_timeout(60)
    return browser


def visit(browser, page):
    """Load a page and wait for its equations."""
    browser.get(page.as_uri())
    browser.execute_async_script(
        """const done = arguments[0];
        const ready = () => window.MathJax?.startup?.promise ? MathJax.startup.promise.then(() => done()) : done();
        document.readyState === "complete" ? ready() : addEventListener("load", ready);"""
    )


def faults_of_logs(browser):
    """Console errors, and requests to anything but files, data in the page itself, and the browser's own pages."""
    for entry in browser.get_log("browser"):
        if entry["level"] == "SEVERE":
            yield f"console: {entry['message']}"
    for entry in browser.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            url = message["params"]["request"]["url"]
            if not url.startswith(("file:", "data:", "blob:", "chrome:", "chrome-untrusted:", "about:")):
                yield f"request: {url}"


def faults_of_math(browser):
    """Equations that MathJax left as TeX or could not read."""
    raw = browser.execute_script(
        r"""const math = [...document.querySelectorAll(".math")].filter(m => !m.querySelector("mjx-container"));
        const broken = [...document.querySelectorAll("mjx-merror")];
        const text = document.querySelector("article").cloneNode(true);
        text.querySelectorAll("pre, code, script, mjx-container").forEach(node => node.remove());
        const left = text.textContent.match(/\\\(|\\\[|\\begin\{|\$\$|\\frac|\\mathbb/g) || [];
        return [...math.map(m => m.textContent), ...broken.map(m => m.textContent), ...left];"""
    )
    return [f"not typeset: {tex}" for tex in raw]


def faults_of_sliders(browser):
    """Sliders whose picture does not move with the arrow keys, or that lack a name or an alternative text."""
    for box in browser.find_elements(By.CSS_SELECTOR, ".zo-explore"):
        picture = box.find_element(By.TAG_NAME, "img")
        for slider in box.find_elements(By.CSS_SELECTOR, "input[type=range]"):
            name = slider.get_attribute("aria-label")
            if slider.get_attribute("max") == "0":
                continue  # one value only: nothing to move
            before = picture.get_attribute("src"), picture.get_attribute("alt"), slider.get_attribute("aria-valuetext")
            slider.send_keys(Keys.ARROW_RIGHT)
            after = picture.get_attribute("src"), picture.get_attribute("alt"), slider.get_attribute("aria-valuetext")
            for what, old, new in zip(("picture", "alternative text", "value"), before, after, strict=True):
                if not new or old == new:
                    yield f"slider {name!r}: the {what} did not change"
            if not browser.execute_script("return arguments[0].naturalWidth", picture):
                yield f"slider {name!r}: a picture that the browser cannot read"


def faults_of_pictures(browser):
    """Pictures without an alternative text, or that did not load."""
    for picture in browser.find_elements(By.CSS_SELECTOR, "article img"):
        if not picture.get_attribute("alt"):
            yield f"no alternative text: {picture.get_attribute('src')[:80]}"
        browser.execute_async_script("arguments[0].decode().finally(arguments[1])", picture)
        if not browser.execute_script("return arguments[0].naturalWidth", picture):
            yield f"not loaded: {picture.get_attribute('src')[:80]}"


def faults_of_width(browser, size):
    """Content that scrolls sideways: the page itself, on a desk also what is in it, be it folded away."""
    set_window(browser, size)
    found = browser.execute_script(
        """document.querySelectorAll("details").forEach(e => e.open = true);
        document.querySelectorAll(".toggle-hidden").forEach(e => e.classList.remove("toggle-hidden"));
        const over = e => e.scrollWidth - e.clientWidth;
        const parts = [...document.querySelectorAll("article :is(pre, table, div.math, mjx-container[display=true])")];
        const edge = document.querySelector("article").getBoundingClientRect().right;
        const wide = parts.filter(e => over(e) > 1 || e.getBoundingClientRect().right > edge + 1);
        const shadow = e => getComputedStyle(e).backgroundImage != "none" || !e.matches("mjx-container");
        return [over(document.scrollingElement), wide.filter(e => !shadow(e)).length,
                wide.map(e => `${over(e)} pixels: ${e.textContent.trim().slice(0, 60)}`)];"""
    )
    page, bare, parts = found
    if page > 1:
        yield f"the page is {page} pixels too wide for a {size}"
    if bare:
        yield f"{bare} equations scroll without a visible edge"
    if size != "phone":
        yield from (f"too wide for a {size}, {part}" for part in parts)


def faults_for_readers(browser):
    """What axe-core calls serious or critical, light and dark. To save time, what repeats is taken out of the page."""
    browser.execute_script(
        """const seen = new Set();
        for (const word of document.querySelectorAll("article :is(pre span, code, code span, em, strong)")) {
            const place = word.closest(".admonition, .proof, table, pre, p, dt");
            const kind = word.tagName + word.className + place?.className;
            if (seen.has(kind)) word.replaceWith(...word.childNodes); else seen.add(kind);
        }
        document.querySelectorAll("mjx-container").forEach(e => e.replaceWith("x"));
        document.querySelectorAll("dl.py ~ dl.py ~ dl.py, .page-toc li ~ li ~ li").forEach(e => e.remove());
        document.normalize();
        document.head.insertAdjacentHTML("beforeend", "<style>* { transition: none !important }</style>");"""
    )
    browser.execute_script(AXE_SCRIPT)
    for theme, rules in (("light", "{rules: {region: {enabled: false}}}"), ("dark", "{runOnly: ['color-contrast']}")):
        yield from browser.execute_async_script(
            f"""document.documentElement.dataset.theme = "{theme}";
            axe.run(document, {rules}).then(result => arguments[0](result.violations.flatMap(found =>
                ["serious", "critical"].includes(found.impact) ? found.nodes.map(
                    node => `{theme}, ${{found.id}}: ${{node.html.slice(0, 200)}} ${{node.failureSummary}}`) : [])));"""
        )


def set_window(browser, size, height=None):
    width, default = SIZES[size]
    metrics = {"width": width, "height": height or default, "deviceScaleFactor": 1, "mobile": size == "phone"}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def shoot(browser, folder, name, size):
    """The whole page as one picture, in a window as high as the page."""
    height = browser.execute_script(
        """document.activeElement.blur();
        scrollTo({top: 0, left: 0, behavior: "instant"});
        return document.scrollingElement.scrollHeight;"""
    )
    set_window(browser, size, min(height, 16000))
    browser.save_screenshot(str(folder / f"{name}-{size}.png"))
    set_window(browser, size)


def main(site):
    folder = os.environ.get("SCREENSHOTS")
    if folder:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
    made_by_sphinx = {"index", "genindex", "prf-prf", "py-modindex", "search"}
    pages = [page for page in sorted(site.glob("*.html")) if page.stem not in made_by_sphinx]
    if not pages:
        sys.exit(f"no pages in {site}")
    faults, sliders, equations = [], 0, 0
    with tempfile.TemporaryDirectory() as profile:
        browser = open_browser(profile)
        try:
            for page in pages:
                set_window(browser, "desk")
                visit(browser, page)
                found = [*faults_of_pictures(browser), *faults_of_math(browser), *faults_of_sliders(browser)]
                sliders += len(browser.find_elements(By.CSS_SELECTOR, ".zo-explore input"))
                equations += len(browser.find_elements(By.CSS_SELECTOR, "mjx-container"))
                if folder:
                    shoot(browser, folder, page.stem, "desk")
                    shoot(browser, folder, page.stem, "monitor")
                    set_window(browser, "desk")
                    browser.execute_script("document.documentElement.dataset.theme = 'dark'")
                    shoot(browser, folder, f"{page.stem}-dark", "desk")
                for size in ("desk", "monitor"):
                    found += faults_of_width(browser, size)
                found += faults_for_readers(browser)
                set_window(browser, "phone")
                visit(browser, page)
                found += faults_of_width(browser, "phone")
                if folder:
                    shoot(browser, folder, page.stem, "phone")
                found += faults_of_logs(browser)
                faults += [f"{page.name}: {fault}" for fault in found]
        finally:
            browser.quit()
    print(*faults, sep="\n")
    print(f"{len(pages)} pages, {equations} equations, {sliders} sliders in Chromium: {len(faults)} faults")
    return 1 if faults or not sliders or not equations else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve()))
