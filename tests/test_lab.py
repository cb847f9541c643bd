"""JupyterLab opens the start notebook, runs it from a fresh kernel, and shows its charts; every notebook is one that runs anywhere."""

import json
import os
import re
import secrets
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from selenium.webdriver.support.ui import WebDriverWait

from kdnb.grid import end_tree

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if not any(part.startswith((".", "_")) for part in p.relative_to(ROOT).parts))
EAGER = {"@jupyterlab/notebook-extension/tracker.jupyterlab-settings": {"windowingMode": "none"}}  # cells off the screen are drawn, too


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_every_notebook_is_plain_python_with_a_kernel_that_resolves(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert (notebook["metadata"]["kernelspec"]["name"], notebook["metadata"]["kernelspec"]["language"]) == ("python3", "python")
    code = ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]
    assert not [line for source in code for line in source.splitlines() if re.match(r"\s*(%|!|get_ipython\()", line)]
    assert all(c["execution_count"] is None for c in notebook["cells"] if c["cell_type"] == "code")  # no trace of the order in which somebody ran it


def make_lab():
    "What `make lab` types: program, options, notebook."
    done = subprocess.run(["make", "--no-print-directory", "-n", "-o", ".venv/.ready", "lab"], cwd=ROOT, capture_output=True, text=True, check=True)
    return shlex.split(done.stdout.splitlines()[-1])


def test_make_lab_opens_the_start_notebook():
    program, *_, notebook = make_lab()
    assert (Path(program).name, notebook) == ("jupyter-lab", "nbs/start.ipynb")


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "Address of a JupyterLab on a copy of the start notebook."
    folder = tmp_path_factory.mktemp("lab")
    (folder / "root" / "nbs").mkdir(parents=True)
    shutil.copy(ROOT / "nbs" / "start.ipynb", folder / "root" / "nbs" / "start.ipynb")
    (folder / "root" / "reports").symlink_to(ROOT / "reports")
    for name, settings in EAGER.items():
        file = folder / "settings" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(settings))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex(16)
    places = {"JUPYTERLAB_SETTINGS_DIR": "settings", "JUPYTERLAB_WORKSPACES_DIR": "workspaces", "JUPYTER_CONFIG_DIR": "config", "JUPYTER_DATA_DIR": "data", "JUPYTER_RUNTIME_DIR": "runtime", "IPYTHONDIR": "ipython"}
    environment = {**os.environ, **{name: str(folder / place) for name, place in places.items()}, "PYTHONPATH": str(ROOT)}
    options = ["--no-browser", "--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0", f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={folder / 'root'}",
               "--expose-app-in-browser", *make_lab()[1:-1]]
    with open(folder / "log.txt", "wb") as log:
        server = subprocess.Popen([sys.executable, "-m", "jupyterlab", *options], cwd=folder / "root", env=environment, stdout=log, stderr=log)
    try:
        for _ in range(300):
            assert server.poll() is None, (folder / "log.txt").read_text()[-2000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/api?token={token}", timeout=5).close()
                break
            except OSError:
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/lab/tree/nbs/start.ipynb?token={token}"
    finally:
        end_tree(server.pid)
        server.wait()


OUTPUTS = "Array.from(document.querySelectorAll('.jp-OutputArea-output[class*=Vega]'))"
CELLS = "return (window.jupyterapp?.shell?.currentWidget?.content?.widgets || []).filter(c => c.model?.type === 'code').map(c => c.model.executionCount)"
DRAWN = f"""return {OUTPUTS}.filter(o => {{
  const size = o.querySelector('svg.marks, canvas.marks')?.getBoundingClientRect();
  return size?.width > 300 && size.height > 100;
}}).length"""
PICTURES = f"return {OUTPUTS}.map(o => o.querySelector('svg.marks, canvas.marks')).map(p => p.toDataURL ? p.toDataURL() : p.outerHTML)"


@pytest.mark.slow
@pytest.mark.browser
def test_lab_runs_the_start_notebook_and_shows_its_charts(lab, driver):
    charts = (ROOT / "nbs" / "start.ipynb").read_text().count('"application/vnd.vegalite.v5+json"')
    driver.get_log("browser"), driver.get_log("performance")
    driver.get(lab)
    wait = WebDriverWait(driver, 120)
    wait.until(lambda d: len(d.execute_script(CELLS)) > 5)
    wait.until(lambda d: d.execute_script(DRAWN) == charts == 3)  # as saved, before anything runs
    driver.execute_script("window.jupyterapp.shell.currentWidget.content.widgets.forEach(c => c.model.clearExecution?.())")
    wait.until(lambda d: d.execute_script(DRAWN) == 0)

    idle = "return window.jupyterapp.shell.currentWidget.sessionContext.session?.kernel?.status === 'idle'"
    wait.until(lambda d: d.execute_script(idle))  # before that, running a cell does nothing
    driver.execute_script("window.jupyterapp.commands.execute('notebook:run-all-cells')")
    wait.until(lambda d: (found := d.execute_script(CELLS)) == list(range(1, len(found) + 1)))  # the kernel was fresh
    assert driver.find_elements("css selector", "[data-mime-type='application/vnd.jupyter.error'], .jp-Dialog") == []
    wait.until(lambda d: d.execute_script(DRAWN) == charts)

    before = driver.execute_script(PICTURES)
    driver.execute_script(f"const s = {OUTPUTS}[1].querySelector('input[type=range]'); s.value = 9; s.dispatchEvent(new Event('input'))")
    driver.execute_script(f"{OUTPUTS}[2].querySelectorAll('input[type=radio]')[4].click()")
    wait.until(lambda d: [a == b for a, b in zip(before, d.execute_script(PICTURES), strict=True)] == [True, False, False])

    messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    asked = {m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"}
    home = lab[: lab.index("/lab")]
    assert [url for url in asked if not url.startswith((home, home.replace("http", "ws"), "data:", "blob:", "chrome:"))] == []
    assert [e["message"] for e in driver.get_log("browser") if e["level"] == "SEVERE"] == []
