"""A headless Chromium for the tests that look at pages, and what must hold for every page."""

import json
import shutil

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
    yield browser
    browser.quit()


def open_page(driver, address, base="file:"):
    "Load a page and wait until its charts are drawn; its console errors and its requests to other places than `base` (the browser's own new tab aside)."
    from selenium.webdriver.support.ui import WebDriverWait

    driver.get_log("browser"), driver.get_log("performance")
    driver.get(address)
    WebDriverWait(driver, 20).until(lambda d: d.execute_script("return document.readyState") == "complete")
    if driver.execute_script("return document.querySelector('figure.chart') !== null"):
        WebDriverWait(driver, 20).until(lambda d: d.execute_script("return document.documentElement.dataset.ready === 'yes'"))
    messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    errors = [entry["message"] for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]
    return errors, [url for url in asked if not url.startswith(("data:", "blob:", "chrome:", base))]


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
