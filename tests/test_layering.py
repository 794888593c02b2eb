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
    "_collectives",
    "_settings",
    "_axes",
    "_placement",
    "_state",
    "_spmd",
    "_order",
    "_grouping",
    "_random",
    "_packing",
    "_blocks",
    "_codes",
    "_positions",
    "_polar",
    "_messages",
    "_guard",
    "_wire",
    "_links",
    "_topologies",
    "_block_messages",
    "_matrix_messages",
    "_conventions",
    "_lp",
    "_geometry",
    "_compressors",
    "_quantizers",
    "_sparse",
    "_low_rank",
    "_defaults",
    "_sharp",
    "_norms",
    "_matrix_norms",
    "_layers",
    "_repeatable",
    "_feedback",
    "_distributed",
    "_grouped",
    "_invariant",
    "_routing",
    "_optimizers",
    "ledger._steps",
    "ledger._traffic",
    "ledger._compiled",
    "ledger._audit",
    "ledger",
    "theory._checks",
    "theory._layers",
    "theory._numbers",
    "theory._muon_smooth",
    "theory._muon_smooth_noisy",
    "theory._muon_generalized",
    "theory._muon_generalized_noisy",
    "theory._normalized",
    "theory",
    "__init__",
]
# `distribute` knows no compressor and no norm, and a compressor never communicates.
FORBIDDEN = {
    "_distributed": {
        "_compressors",
        "_feedback",
        "_low_rank",
        "_defaults",
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
MODULES = sorted(PACKAGE.rglob("*.py"))


def name(path):
    """`theory._checks`; of a package its own name, and `__init__` of the outermost."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def own_imports(path):
    folders = path.relative_to(PACKAGE).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            package = folders[: len(folders) - (node.level - 1)]
            found = [node.module] if node.module else [alias.name for alias in node.names]
            yield from (".".join((*package, module)) for module in found)


def outer_imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_modules_import_only_what_lies_below(path):
    below = set(ORDER[: ORDER.index(name(path))])
    assert set(own_imports(path)) <= below - FORBIDDEN.get(name(path), set())


@pytest.mark.parametrize("path", sorted((PACKAGE / "theory").glob("*.py")), ids=name)
def test_theorems_know_nothing_of_the_methods(path):
    assert all(module.startswith("theory.") for module in own_imports(path))


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_the_library_needs_only_jax_and_optax_and_nothing_private(path):
    outer = set(outer_imports(path))
    roots = {name.split(".")[0] for name in outer}
    # NumPy, for constants, is what jax itself stands on.
    assert roots - set(sys.stdlib_module_names) <= {"jax", "optax", "numpy"}
    assert not {name for name in outer if "._" in name}


def public():
    return {
        f"{package.__name__}.{export}": value
        for package in (ef21_jax, ef21_jax.theory)
        for export, value in vars(package).items()
        if not export.startswith("_")
    }


@pytest.mark.parametrize("export", sorted(public()))
def test_every_export_has_a_docstring(export):
    value = public()[export]
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
