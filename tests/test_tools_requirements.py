"""requirements.txt is complete: what it names, and all that those need, at one version each."""

import importlib.metadata
import re

from nbrun import ROOT
from packaging.requirements import Requirement

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


def test_what_runs_is_what_is_pinned():
    installed = {name: importlib.metadata.version(name).split("+")[0] for name in PINS}
    assert installed == PINS
