"""Imports go one way, and the package says in pyproject.toml what it needs."""

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import build_equations
import pytest
import tomllib

ROOT = Path(__file__).resolve().parents[1]
MATHEMATICS = set(build_equations.MATHEMATICS)
# A module may import its own layer and those below.
LAYERS = [
    MATHEMATICS,
    {"settings", "checkpoint", "costs"},
    {"models", "rollout", "worlds"},
    {"preferences", "rewards"},
    {"algorithms"},
    {"scale_out"},
    {"book"},
]
OURS = ("rlhf_helpers", "experiments", "benchmarks")
MODULES = sorted((ROOT / "rlhf_helpers").rglob("*.py"))


def imported(path):
    """Full names of the modules that a file imports anywhere."""
    package = ".".join(path.relative_to(ROOT).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package if node.level else node.module
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def part(module):
    """The file or folder of the package that a module belongs to: rlhf_helpers.worlds.mdp is in
    worlds."""
    return [*module.split("."), ""][1]


def layer(name):
    # What validates arguments lies under everything; a name that stands nowhere has to be given its
    # place above.
    if name.startswith("_"):
        return 0
    return next(i for i, names in enumerate(LAYERS) if name in names)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path):
    own = part(".".join(path.relative_to(ROOT).with_suffix("").parts))
    known = {name for names in LAYERS for name in names} | {
        p.stem for p in MODULES if p.stem.startswith("_")
    }
    if own == "__init__":
        return
    for module in imported(path):
        if module.startswith("rlhf_helpers.") and part(module) in known:
            assert layer(part(module)) <= layer(own), f"{path.name} imports {module}"
    if own in MATHEMATICS or own.startswith("_"):
        outside = {module.split(".")[0] for module in imported(path)} - set(sys.stdlib_module_names)
        assert outside <= {"torch", "rlhf_helpers"}


OTHERS = sorted(p for folder in ("experiments", "benchmarks") for p in (ROOT / folder).glob("*.py"))


def of_others(path):
    """(place, dotted name) of everything that a file takes from a module of this repository."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    modules = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(OURS):
            for alias in node.names:
                modules[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                yield node.lineno, f"{node.module}.{alias.name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            name = modules.get(node.value.id)
            if name is not None and is_module(name):
                yield node.lineno, f"{name}.{node.attr}"


def is_module(name):
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


@pytest.mark.parametrize("path", MODULES + OTHERS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_name_that_a_second_file_uses_has_no_underscore(path):
    """A private module may be shared; a private name within one may not."""
    private = [
        f"line {line}: {name}"
        for line, name in of_others(path)
        if name.rpartition(".")[2].startswith("_") and not is_module(name)
    ]
    assert not private, "rename it without underscore, or move it to where both may reach it"


@pytest.mark.parametrize("path", OTHERS, ids=lambda path: str(path.relative_to(ROOT)))
def test_experiments_and_benchmarks_name_only_what_exists(path):
    """They run for hours and seldom, so a name that a move left behind would be found late."""
    for line, name in of_others(path):
        module, _, attribute = name.rpartition(".")
        if not is_module(name):
            assert hasattr(importlib.import_module(module), attribute), f"line {line}: {name}"


def test_importing_the_package_loads_no_framework():
    code = (
        "import sys, rlhf_helpers; sys.exit(bool({'torch', 'transformers', 'matplotlib'} &"
        " set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_every_import_is_a_declared_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    needs = project["dependencies"] + [need for extra in extras for need in extra]
    declared = {re.match(r"[\w-]+", need)[0].lower() for need in needs}
    outside = {module.split(".")[0] for path in MODULES for module in imported(path)}
    assert {
        name.lower() for name in outside - set(sys.stdlib_module_names) - {"rlhf_helpers"}
    } <= declared
    assert all(re.fullmatch(r"[\w-]+>=[\d.]+", need) for need in needs), "lower bounds only"
