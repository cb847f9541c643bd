"""A headless Chromium for the tests that look at pages, and what must hold for every page."""

import json
import shutil
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

MISSING = "Chromium is missing; install it: apt-get install -y --no-install-recommends chromium chromium-driver fonts-dejavu-core"


@pytest.fixture(scope="session")
def driver(tmp_path_factory):
    "Debian's Chromium with every host name unresolvable."
    chromium, chromedriver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and chromedriver):
        pytest.skip(MISSING)
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    flags = "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking disable-component-update disable-sync disable-dev-shm-usage"
    for flag in [f"--{f}" for f in flags.split()] + ["--window-size=1280,1600", "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1"]:
        options.add_argument(flag)
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('chromium')}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(chromedriver))
    browser.execute_cdp_cmd("Emulation.setFocusEmulationEnabled", {"enabled": True})  # as a window that somebody sits at; without, JupyterLab may find no current notebook
    yield browser
    browser.quit()


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@contextmanager
def served_folder(folder):
    "Address of a folder on a server of this machine."
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(folder))) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@contextmanager
def telephone(driver):
    "The window of a telephone."
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True})
    try:
        yield
    finally:
        driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def wait(driver, script, *arguments):
    "What a script returns once it is true of anything."
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(driver, 20, poll_frequency=0.05).until(lambda d: d.execute_script(script, *arguments))


def open_page(driver, address, base="file:"):
    "Load a page and wait until its charts are drawn; its console errors and its requests to other places than `base` (the browser's own new tab aside)."
    driver.get("about:blank")  # what the page before says while it is left is not this page's
    driver.get_log("browser"), driver.get_log("performance")
    driver.get(address)
    wait(driver, "return document.readyState === 'complete' && (document.querySelector('figure.chart') === null || document.documentElement.dataset.ready === 'yes')")
    messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    errors = [entry["message"] for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]
    return errors, [url for url in asked if not url.startswith(("data:", "blob:", "chrome:", "about:", base))]


def check_page(driver, address, charts=0, formulas=0, base="file:"):
    "Every chart drawn, every formula rendered, no console error, no request elsewhere, nothing wider than the window."
    errors, requests = open_page(driver, address, base)
    count = "return document.querySelectorAll(arguments[0]).length"
    assert requests == [], f"requests to other places: {requests}"
    assert errors == [], f"console errors: {errors}"
    assert driver.execute_script(count, "figure.chart") == charts
    assert driver.execute_script(count, "figure.chart.drawn svg.marks") == charts
    assert driver.execute_script(count, ".katex") == formulas
    assert driver.execute_script(count, ".katex-error") == 0
    assert driver.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")


CONTRAST = """
const parse = (text) => { const n = text.match(/[\\d.]+/g).map(Number); return (text.startsWith("color(") ? [n[0] * 255, n[1] * 255, n[2] * 255, n[3] ?? 1] : [n[0], n[1], n[2], n[3] ?? 1]); };
const light = (rgb) => { const [r, g, b] = rgb.map((v) => { v /= 255; return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; }); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
const over = (top, under) => [0, 1, 2].map((i) => top[i] * top[3] + under[i] * (1 - top[3]));
const ground = (el) => { const own = el ? parse(getComputedStyle(el).backgroundColor) : [255, 255, 255, 1]; return own[3] >= 1 ? own.slice(0, 3) : over(own, ground(el.parentElement)); };
const found = new Map();
const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walk.nextNode()) {
  const el = walk.currentNode.parentElement;
  if (!walk.currentNode.textContent.trim() || el.closest("svg, script, style, .katex, .visually-hidden, .skip") || !el.checkVisibility({ opacityProperty: true, visibilityProperty: true })) continue;
  const style = getComputedStyle(el), under = ground(el);
  const [a, b] = [light(over(parse(style.color), under)), light(under)].sort((x, y) => y - x);
  const ratio = (a + 0.05) / (b + 0.05), size = parseFloat(style.fontSize);
  if (ratio < (size >= 24 || (size >= 18.66 && style.fontWeight >= 700) ? 3 : 4.5)) found.set(el.tagName + "." + el.className, ratio.toFixed(2) + " " + walk.currentNode.textContent.trim().slice(0, 30));
}
return [...found].map(([k, v]) => k + " " + v);
"""


def faint(driver):
    "Texts of the page whose contrast with their ground is below WCAG 2.2 AA (1.4.3): 4.5, or 3 if large."
    return driver.execute_script(CONTRAST)
