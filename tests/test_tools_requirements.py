"""requirements.txt is complete on every system: what it names, and all that those need, at one
version each."""

import importlib.metadata
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib

import pytest
import set_repo
from nbrun import ROOT
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

# Those that run where what is pinned is not installed do not carry this.
pins = pytest.mark.pins

LINES = [
    line
    for line in (ROOT / "requirements.txt").read_text().splitlines()
    if not line.startswith("#")
]


def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def applies(need, system):
    return need.marker is None or need.marker.evaluate({"extra": "", **system})


def pinned(system):
    """Name and version of what is pinned on a system: {} is this one."""
    lines = [need for need in map(Requirement, LINES) if applies(need, system)]
    return {canonical(need.name): str(need.specifier).removeprefix("==") for need in lines}


PINS = pinned({})
SYSTEMS = {
    "linux": {"platform_system": "Linux", "os_name": "posix", "platform_machine": "x86_64"},
    "darwin": {"platform_system": "Darwin", "os_name": "posix", "platform_machine": "arm64"},
    "win32": {"platform_system": "Windows", "os_name": "nt", "platform_machine": "AMD64"},
}


def test_every_line_is_one_public_version():
    line_of_one = r'[\w.-]+==[\w.]+(; sys_platform == "(darwin|win32)")?'
    assert not [line for line in LINES if not re.fullmatch(line_of_one, line)]
    # torch brings the accelerator libraries of the machine at hand; pinning them would break every
    # other machine.
    assert not [name for name in PINS if re.match(r"nvidia|cuda|triton", name)]
    assert "ipywidgets" not in PINS


@pins
@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13", "3.14"])
@pytest.mark.parametrize("platform", SYSTEMS)
def test_what_the_pins_need_is_pinned(platform, python):
    """Oracle: what the installed packages say that they need on that system."""
    version = {"python_version": python, "python_full_version": f"{python}.4"}
    system = {"sys_platform": platform, **SYSTEMS[platform], **version}
    there, missing = pinned(system), set()
    # what is pinned for another system only is not installed here; it needs nothing
    for name in PINS:
        for need in map(Requirement, importlib.metadata.requires(name) or []):
            known = canonical(need.name)
            if not applies(need, system) or re.match(r"nvidia|cuda|triton", known):
                continue
            if not need.specifier.contains(there.get(known, "")):
                missing.add(f"{name} needs {need}")
    assert not missing


@pins
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


@pins
def test_lower_bounds_are_not_above_the_pins_nor_below_what_others_need():
    """Oracle: what the pinned packages themselves ask of each other."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for line in [*project["dependencies"], *extras["lm"]]:
        own = Requirement(line)
        name = canonical(own.name)
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


@pins
def test_what_runs_is_what_is_pinned():
    installed = {name: importlib.metadata.version(name).split("+")[0] for name in PINS}
    assert installed == PINS


BUILD = "import sys; from setuptools.build_meta import build_sdist; build_sdist(sys.argv[1])"


def test_the_source_distribution_holds_every_file(tmp_path):
    """Oracle: git's list of files. Built in a copy, since setuptools adds files of its own."""
    command = ["git", "ls-files"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a checkout")
    tracked = {"MANIFEST.in", *listed.stdout.splitlines()}
    names = sorted(name for name in tracked if (ROOT / name).exists())
    source = tmp_path / "source"
    for name in names:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    subprocess.run([sys.executable, "-c", BUILD, tmp_path], cwd=source, check=True)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert not set(names) - held
