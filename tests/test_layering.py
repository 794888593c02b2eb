"""What the package promises about itself: which module may import which, and what is exported."""

import ast
import inspect
import pathlib
import re
import subprocess
import sys

import pytest

import ef21_jax


PACKAGE = pathlib.Path(ef21_jax.__file__).parent
README = PACKAGE.parent / "README.md"

# A module may import from those listed before it, and from nothing else of ours.
ORDER = [
    "_dtypes",
    "_tables",
    "_settings",
    "_grouping",
    "_random",
    "_packing",
    "_blocks",
    "_codes",
    "_positions",
    "_messages",
    "_block_messages",
    "_conventions",
    "_polar",
    "_lp",
    "_geometry",
    "_compressors",
    "_quantizers",
    "_sparse",
    "_low_rank",
    "_sharp",
    "_norms",
    "_matrix_norms",
    "_layers",
    "_axes",
    "_feedback",
    "_distributed",
    "_grouped",
    "_invariant",
    "_routing",
    "_optimizers",
    "ledger",
    "__init__",
]
# `distribute` knows no compressor and no norm, and a compressor never communicates.
FORBIDDEN = {
    "_distributed": {
        "_compressors",
        "_feedback",
        "_low_rank",
        "_matrix_norms",
        "_norms",
        "_polar",
        "_quantizers",
        "_sharp",
        "_sparse",
    },
    "_compressors": {"_axes", "_matrix_norms", "_norms"},
    "_feedback": {"_axes", "_matrix_norms", "_norms"},
}
MODULES = sorted(PACKAGE.glob("*.py"))


def own_imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            yield from [node.module] if node.module else [alias.name for alias in node.names]


def outer_imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_modules_import_only_what_lies_below(path):
    below = set(ORDER[: ORDER.index(path.stem)])
    assert set(own_imports(path)) <= below - FORBIDDEN.get(path.stem, set())


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_the_library_needs_only_jax_and_optax_and_nothing_private(path):
    outer = set(outer_imports(path))
    roots = {name.split(".")[0] for name in outer}
    # NumPy, for constants, is what jax itself stands on.
    assert roots - set(sys.stdlib_module_names) <= {"jax", "optax", "numpy"}
    assert not {name for name in outer if "._" in name}


def public():
    return {name: value for name, value in vars(ef21_jax).items() if not name.startswith("_")}


@pytest.mark.parametrize("name", sorted(public()))
def test_every_export_has_a_docstring(name):
    value = public()[name]
    if inspect.ismodule(value) or inspect.isclass(value) or inspect.isfunction(value):
        assert inspect.getdoc(value)


def test_importing_brings_no_extra_and_draws_nothing():
    code = (
        "import sys, ef21_jax; "
        "print(sorted({'flax', 'chex', 'matplotlib', 'tyro', 'tqdm'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert result.stdout.strip() == "[]"
    assert not result.stderr.strip()


def python_blocks():
    return re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


def test_the_readmes_examples_run_as_they_stand():
    blocks = python_blocks()
    assert blocks
    scope = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), scope)
