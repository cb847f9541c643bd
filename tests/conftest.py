"""Shape annotations are enforced in every test: jaxtyping's hook instruments kdnb before it is imported."""

from browser import driver as driver  # the fixture of every browser test
from jaxtyping import install_import_hook

hook = install_import_hook("kdnb", "beartype.beartype")
