"""Other versions than the pinned ones: which, what the tests need there, and a reader in Colab."""

import importlib.metadata
import os
import re
import sys

import as_reader
import nbformat
import nbrun
import pytest
import versions
from packaging.requirements import Requirement
from test_imports import canonical, imported, outside

ROOT = versions.ROOT


def test_each_set_says_which_versions_it_takes():
    """Oracle: the two files, read as text."""
    bounds = re.findall(r'"([\w-]+)>=([\d.]+)"', (ROOT / "pyproject.toml").read_text("utf-8"))
    oldest = versions.constraints("oldest")
    assert set(oldest) < {f"{name}=={version}" for name, version in bounds}
    assert {"torch", "transformers"} < {line.partition("==")[0] for line in oldest}
    pinned = versions.constraints("pinned")
    assert "\n".join(pinned) + "\n" == (ROOT / "requirements.txt").read_text("utf-8")
    assert versions.constraints("newest") == []


def closure(needs):
    """Names of all packages that these requirements bring on this system."""
    found, left = set(), list(needs)
    while left:
        need = Requirement(left.pop())
        name = canonical(need.name)
        if name in found or (need.marker and not need.marker.evaluate({"extra": ""})):
            continue
        try:
            left += importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        found.add(name)
    return found


def test_the_tests_import_only_what_their_group_brings():
    """Oracle: what the installed packages say that they need. Elsewhere nothing else is there."""
    project = versions.project()
    needs = project["project"]["dependencies"] + project["dependency-groups"]["tests"]
    brought = closure(needs + project["project"]["optional-dependencies"]["lm"])
    owners = importlib.metadata.packages_distributions()
    folders = [ROOT / "tests", ROOT / "tools", ROOT / "book" / "_ext"]
    files = [path for folder in folders for path in folder.glob("*.py")]
    own = {path.stem for path in files} | {"rlhf_helpers", "experiments", "benchmarks"}
    names = outside(name for path in files for name in imported(path) if name) - own
    missing = {
        name for name in names if not brought & {canonical(owner) for owner in owners.get(name, ())}
    }
    # the oracle of one test, which is skipped without it; its wheels are not for every system
    assert missing <= {"torchrl"}


def plain(text):
    """Commands without the place of a program and without how much it says."""
    where = r"\.venv/Scripts/|\$\(BIN\)/|python (-X utf8 )?-m |-q+ |--disable-pip-version-check "
    return re.sub(where, "", text.replace("\\", "/").replace("$(1)", "."))


def test_the_commands_without_make_are_those_of_make():
    """Oracle: the Makefile."""
    blocks = (ROOT / "README.md").read_text("utf-8").split("```")
    (windows,) = (block.strip().splitlines() for block in blocks if "\\Scripts\\" in block)
    make = plain((ROOT / "Makefile").read_text("utf-8"))
    assert not [line for line in windows[1:] if plain(line) not in make]
    assert len(windows) > 5


SETUP = """import sys
if "google.colab" in sys.modules:
    %pip {command}  # git+https://github.com/some-one/a-book
"""
ALONE = """import os, google.colab
print(os.listdir("."), os.environ["RLHF_SCALE"])"""


@pytest.fixture
def book(tmp_path, monkeypatch):
    for name in ("PYTHONPATH", "IPYTHONDIR", "RLHF_SCALE"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    (tmp_path / "_toc.yml").write_text("")
    address = "repository:\n  url: https://github.com/some-one/a-book\n  branch: main\n"
    (tmp_path / "_config.yml").write_text(address)
    (tmp_path / "notebooks").mkdir()

    def write(**commands):
        for name, command in commands.items():
            cells = [SETUP.format(command=command), ALONE]
            nb = nbformat.v4.new_notebook(cells=list(map(nbformat.v4.new_code_cell, cells)))
            nbrun.write(nb, tmp_path / "notebooks" / f"{name}.ipynb")
        return tmp_path

    return write


def test_a_reader_has_colab_an_empty_folder_and_the_wheel(book, capsys):
    """Oracle: what a notebook sees there; and a failed installation, which IPython lets pass."""
    pytest.importorskip("pip")
    root = book(a="--version", b="no-such-command")
    wheel = root / "x.whl"
    assert as_reader.main(wheel, root / "reader", root) == 1
    assert capsys.readouterr().err.endswith("failed: b\n")
    nb = nbrun.read(root / "reader" / "a" / "a.ipynb")
    assert wheel.as_uri() in nb.cells[0].source
    assert "pip" in nb.cells[0].outputs[0].text
    assert nb.cells[-1].outputs[0].text == "['a.ipynb'] tiny\n"
    assert "google.colab" not in sys.modules


def test_a_notebook_that_installs_nothing_is_told(book):
    root = book(a="--version")
    config = (root / "_config.yml").read_text().replace("a-book", "another")
    (root / "_config.yml").write_text(config)
    with pytest.raises(ValueError, match=r"of a\.ipynb does not install git\+https://"):
        as_reader.main(root / "x.whl", root / "reader", root)
