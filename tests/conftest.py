"""Shape annotations are enforced in every test: jaxtyping's hook instruments kdnb before it is imported."""

from browser import driver as driver  # the fixture of every browser test
from jaxtyping import install_import_hook

# An int will do where a float is asked for (PEP 484).
hook = install_import_hook("kdnb", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")


def pytest_terminal_summary(terminalreporter, config):
    """What `make chaos` injected and what survived it, as a table for the log."""
    rows = [row for done in terminalreporter.stats.get("passed", []) for name, row in done.user_properties if name == "figures"]
    if rows and config.option.markexpr != "not chaos":
        terminalreporter.write_line("\n| fault | injected | survived | same numbers |\n|---|---|---|---|")
        for row in rows:
            terminalreporter.write_line(f"| {' | '.join(map(str, row))} |")
