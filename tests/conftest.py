"""Shape annotations are enforced in every test: jaxtyping's hook instruments kdnb before it is imported."""

from browser import driver as driver  # the fixture of every browser test
from jaxtyping import install_import_hook

# An int will do where a float is asked for (PEP 484).
hook = install_import_hook("kdnb", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")
