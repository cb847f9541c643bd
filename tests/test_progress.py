"""A bar where somebody looks, a file under the grid runner, silence elsewhere."""

import json
import os
import pty
import subprocess
import sys
import termios

import pytest

from kdnb.progress import FRONT_ENDS, is_watched, track

LOOP = "from kdnb.progress import track\nfor _ in track(range(3), desc='squares'): pass\n"


@pytest.fixture
def progress_file(tmp_path, monkeypatch):
    path = tmp_path / "progress.json"
    monkeypatch.setenv("KDNB_PROGRESS", str(path))
    return path


def test_a_pipe_sees_nothing():
    done = subprocess.run([sys.executable, "-c", LOOP], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_a_terminal_sees_a_bar():
    here, there = pty.openpty()
    termios.tcsetwinsize(there, (24, 80))
    subprocess.run([sys.executable, "-c", LOOP], stderr=there, check=True)
    os.close(there)
    shown = os.read(here, 10_000).decode()
    assert "squares: 100%" in shown
    assert "3/3" in shown


@pytest.mark.parametrize(("rank", "shown"), [("0", True), ("1", False)])
def test_of_processes_that_train_together_the_first_shows_a_bar(progress_file, monkeypatch, rank, shown):
    monkeypatch.setenv("RANK", rank)
    assert list(track(range(3))) == [0, 1, 2]
    assert progress_file.exists() == shown


def test_file_says_where_the_loop_is(progress_file):
    with track(total=10, desc="fit", unit="step") as bar:
        first = json.loads(progress_file.read_text())
        bar.update(4)
        bar.refresh()
        middle = json.loads(progress_file.read_text())
    assert set(first) == {"desc", "n", "total", "unit", "rate", "eta_s", "at"}
    assert (first["n"], first["eta_s"]) == (0, None)
    assert (middle["desc"], middle["n"], middle["total"], middle["unit"]) == ("fit", 4, 10, "step")
    assert middle["eta_s"] == pytest.approx(6 / middle["rate"])


def test_file_is_written_at_most_twice_a_second(progress_file, monkeypatch):
    from kdnb.progress import FileBar

    shown = []
    monkeypatch.setattr(FileBar, "display", lambda self, msg=None, pos=None: shown.append(self.n) or True)
    assert list(track(range(100_000))) == list(range(100_000))  # far less than half a second
    assert len(shown) <= 3  # at the start, at the end, and one for a slow machine
    assert shown[-1] == 100_000


def test_a_lost_folder_costs_only_the_display(progress_file, monkeypatch):
    monkeypatch.setenv("KDNB_PROGRESS", str(progress_file.parent / "gone" / "progress.json"))
    assert list(track([1, 2])) == [1, 2]


def test_no_file_is_left_half_written(progress_file):
    list(track(range(5)))
    assert [p.name for p in progress_file.parent.iterdir()] == ["progress.json"]


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_a_kernel_is_watched_only_with_a_front_end(front_end, monkeypatch):
    for name in FRONT_ENDS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(sys.modules, "ipykernel.zmqshell", object())
    assert not is_watched()
    monkeypatch.setenv(front_end, "x")
    assert is_watched()
