"""requirements.txt is complete: what it names, and all that those need, at one version each."""

import importlib.metadata
import re
import tomllib

import set_repo
from nbrun import ROOT
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

LINES = [
    line
    for line in (ROOT / "requirements.txt").read_text().splitlines()
    if not line.startswith("#")
]
PINS = {
    re.sub(r"[-_.]+", "-", name).lower(): version
    for name, version in (line.split("==") for line in LINES)
}


def test_every_line_is_one_public_version():
    assert not [line for line in LINES if not re.fullmatch(r"[\w.-]+==[\w.]+", line)]
    # torch brings the accelerator libraries of the machine at hand; pinning them would break every
    # other machine.
    assert not [name for name in PINS if re.match(r"nvidia|cuda|triton", name)]
    assert "ipywidgets" not in PINS


def test_what_the_pins_need_is_pinned():
    missing = set()
    for name in PINS:
        for line in importlib.metadata.requires(name) or []:
            need = Requirement(line)
            known = re.sub(r"[-_.]+", "-", need.name).lower()
            wanted = need.marker is None or need.marker.evaluate({"extra": ""})
            if wanted and known not in PINS and not re.match(r"nvidia|cuda|triton", known):
                missing.add(f"{name} needs {known}")
    assert not missing


def test_the_pins_are_for_the_oldest_python_that_is_promised():
    """3.11.2 is Debian 12's own; make, README and pyproject.toml ask for no more than 3.11."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == ">=3.11"
    needs = {name: importlib.metadata.metadata(name)["Requires-Python"] for name in PINS}
    assert not {
        name: need
        for name, need in needs.items()
        if need and not {"3.11.0", "3.11.2"} <= set(SpecifierSet(need).filter(["3.11.0", "3.11.2"]))
    }


def test_lower_bounds_are_not_above_the_pins_nor_below_what_others_need():
    """Oracle: what the pinned packages themselves ask of each other."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for line in [*project["dependencies"], *extras["lm"]]:
        own = Requirement(line)
        name = re.sub(r"[-_.]+", "-", own.name).lower()
        assert own.specifier.contains(PINS[name]), f"{line}, and the pin is {PINS[name]}"
    trl = [Requirement(line) for line in importlib.metadata.requires("trl")]
    bounds = {need.name: need.specifier for need in trl if need.marker is None}
    for line in extras["lm"]:
        own = Requirement(line)
        lowest = str(own.specifier).removeprefix(">=")
        if own.name in bounds:
            assert bounds[own.name].contains(lowest), f"{line}, and trl needs {bounds[own.name]}"


def test_the_package_says_where_it_comes_from_and_under_which_licences():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    home = (set_repo.repository()["url"], f"https://{set_repo.pages_host(set_repo.name_of())}")
    assert {"Homepage", "Source", "Issues"} <= set(project["urls"])
    assert all(url.startswith(home) for url in project["urls"].values())
    assert project["classifiers"]
    assert project["keywords"]
    assert sorted(path.name for path in ROOT.glob("LICENSE*")) == project["license-files"]


def test_what_runs_is_what_is_pinned():
    installed = {name: importlib.metadata.version(name).split("+")[0] for name in PINS}
    assert installed == PINS
