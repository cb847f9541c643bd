"""Commands: one manner of help, mistakes, silence and exit statuses."""

import os
import signal
import subprocess
import sys

import pytest

from kdnb import cli

COMMANDS = {"kdnb_run": "kdnb.grid:main", "kdnb_report": "kdnb.grid:report_main", "kdnb_plan": "kdnb.plan:main", "kdnb_site": "kdnb.site:main", "kdnb_check": "kdnb.check:main"}


def run(name, *args, **options):
    module, _, function = COMMANDS[name].partition(":")
    return subprocess.run([sys.executable, "-c", f"import sys; from {module} import {function} as main; sys.exit(main())", *args], capture_output=True, text=True, **options)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_an_example_and_the_exit_statuses_and_loads_nothing_heavy(name):
    module, _, function = COMMANDS[name].partition(":")
    code = f"import sys\nfrom {module} import {function} as main\ntry: main(['--help'])\nexcept SystemExit: print([m for m in ('torch', 'pandas', 'altair', 'nbconvert', 'transformers') if m in sys.modules], file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "[]\n"
    assert f"\nexample:\n  {name} " in done.stdout
    for said in ("-q, --quiet", "--debug", "exit status:\n  0  ", "  2    bad input; nothing was done\n", "  130  interrupted\n"):
        assert said in done.stdout, said


@pytest.mark.parametrize("name", COMMANDS)
def test_a_mistake_is_one_line_on_stderr(name, tmp_path):
    mistake = "readme" if name == "kdnb_site" else "no-such-file"  # there is no project here
    for args in (["--loud", "x"], [mistake]):
        done = run(name, *args, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.count("\n") == 1
        assert done.stderr.startswith(f"{name}: ")
    done = run(name, mistake, "--debug", cwd=tmp_path)
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_the_commands_are_those_that_are_installed():
    from configparser import ConfigParser
    from pathlib import Path

    config = ConfigParser()
    config.read(Path(__file__).parent.parent / "settings.ini")
    installed = dict(line.split("=") for line in config["DEFAULT"]["console_scripts"].split())
    assert installed == COMMANDS


def made(do, *argv):
    parser = cli.parser("kdnb_try", "Try.", "kdnb_try", "Notes.", {0: "tried"})
    return cli.run_command(parser, do, argv, interrupted="stopped")


def fail(error):
    def do(args):
        raise error
    return do


@pytest.mark.parametrize(("do", "status", "said"), [
    (lambda args: [], 0, ""),
    (lambda args: ["a: failed", "b: failed"], 1, "a: failed\nb: failed\n"),
    (fail(ValueError("x must be 1\ny must be 2")), 2, "kdnb_try: x must be 1\nkdnb_try: y must be 2\n"),
    (fail(OSError("disk full\nmore")), 1, "kdnb_try: OSError: disk full\n"),
    (fail(RuntimeError()), 1, "kdnb_try: RuntimeError\n"),
    (fail(KeyboardInterrupt()), 130, "kdnb_try: stopped\n"),
    (lambda args: os.kill(os.getpid(), signal.SIGTERM), 130, "kdnb_try: stopped\n"),
])
def test_statuses(do, status, said, capsys):
    before = signal.getsignal(signal.SIGTERM)
    assert made(do) == status
    assert capsys.readouterr() == ("", said)
    assert signal.getsignal(signal.SIGTERM) is before


def test_debug_shows_the_traceback():
    with pytest.raises(OSError, match="disk full"):
        made(fail(OSError("disk full")), "--debug")
