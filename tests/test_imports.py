"""Imports go one way, and the package says in pyproject.toml what it needs."""

import ast
import importlib.metadata
import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import build_equations
import nbrun
import pytest

ROOT = Path(__file__).resolve().parents[1]
MATHEMATICS = set(build_equations.MATHEMATICS)
# A module may import its own layer and those below.
LAYERS = [
    MATHEMATICS,
    {"settings", "checkpoint", "costs"},
    {"models", "rollout", "worlds", "conversations"},
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


def in_code_cells(path):
    """Full names of the modules that the code of a notebook imports."""
    for cell in nbrun.read(path).cells:
        if cell.cell_type == "code":
            tree = ast.parse(re.sub(r"^(\s*)[%!].*", r"\1pass", cell.source, flags=re.M))
            for node in ast.walk(tree):
                if isinstance(node, ast.Import):
                    yield from (alias.name for alias in node.names)
                elif isinstance(node, ast.ImportFrom):
                    yield node.module


def needs(*extras):
    """Requirements of the package, with those of some extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    more = [project["optional-dependencies"][extra] for extra in extras]
    return project["dependencies"] + [need for extra in more for need in extra]


def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(*extras):
    """Names that can be imported with these extras: what the required packages hold themselves."""
    wanted = {
        re.sub(r"[-_.]+", "-", re.match(r"[\w-]+", need)[0]).lower() for need in needs(*extras)
    }
    owners = importlib.metadata.packages_distributions()
    return {"rlhf_helpers"} | {
        name for name, packages in owners.items() if wanted & set(map(canonical, packages))
    }


def outside(modules):
    return {module.split(".")[0] for module in modules} - set(sys.stdlib_module_names)


def test_every_import_is_a_declared_dependency():
    found = outside(module for path in MODULES for module in imported(path)) - {"ipywidgets"}
    assert found <= declared("lm")
    assert "ipywidgets>=7.7" in needs("labelling")
    every = needs("lm", "labelling")
    assert all(re.fullmatch(r"[\w-]+>=[\d.]+", need) for need in every), "lower bounds only"


@pytest.mark.parametrize("path", nbrun.find_notebooks(), ids=lambda path: path.stem)
def test_every_import_of_a_notebook_comes_with_what_its_set_up_cell_installs(path):
    """In Colab there is the package and what it declares, nothing else that could be relied on."""
    extras = ["lm"] if nbrun.read(path).metadata["needs_model"] else []
    assert outside(in_code_cells(path)) <= declared(*extras)


BLOCKED = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {names}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocked())
"""


def test_chapters_without_a_language_model_need_no_package_for_one():
    """Oracle: their imports, in a process in which those packages cannot be found."""
    chapters = [p for p in nbrun.find_notebooks() if not nbrun.read(p).metadata["needs_model"]]
    assert len(chapters) >= 3
    lines = {f"import {name}" for path in chapters for name in in_code_cells(path)}
    code = BLOCKED.format(names=declared("lm") - declared()) + "\n".join(sorted(lines))
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
