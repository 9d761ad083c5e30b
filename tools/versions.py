"""Try the book with other versions than the pinned ones.  usage: versions.py SET WHAT

SET is oldest (the lower bounds of pyproject.toml), pinned (requirements.txt) or newest (what the
package index has today). WHAT is tests (the fast ones, of this checkout) or notebooks (as a reader
in Colab meets them). Python is the one that runs this; the environment is made anew in
_build/versions.
"""

import os
import shutil
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SETS = ("oldest", "pinned", "newest")
WHAT = ("tests", "notebooks")
FAST = "not slow and not pages and not pins"
# What runs a notebook; all that it needs besides, its own set-up cell has to install.
RUNS_NOTEBOOKS = ("ipykernel", "nbclient", "pyyaml")


def project(root=ROOT):
    return tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))


def constraints(which, root=ROOT):
    """The lines of a constraints file that makes pip choose these versions."""
    if which == "pinned":
        return (root / "requirements.txt").read_text(encoding="utf-8").splitlines()
    needs = project(root)["project"]
    bounds = needs["dependencies"] + needs["optional-dependencies"]["lm"]
    return [need.replace(">=", "==") for need in bounds] if which == "oldest" else []


def build_wheel(python, folder, root=ROOT):
    """Build from a copy: what setuptools leaves in a checkout gets into later wheels."""
    source = folder / "source"
    skip = shutil.ignore_patterns(".*", "_build", "build", "*.egg-info", "__pycache__")
    shutil.copytree(root, source, ignore=skip)
    call(python, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, source)
    return next(folder.glob("*.whl"))


def call(*command, check=True):
    return subprocess.run(list(map(str, command)), cwd=ROOT, check=check).returncode


def main(which, what):
    folder = ROOT / "_build" / "versions" / f"{which}-{what}"
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder / "venv", with_pip=True)
    python = folder / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
    chosen = folder / "constraints.txt"
    chosen.write_text("\n".join(constraints(which)), encoding="utf-8")
    # so that it also holds for what a notebook installs
    os.environ["PIP_CONSTRAINT"] = chosen.as_uri()
    os.environ["PIP_DISABLE_PIP_VERSION_CHECK"] = "1"
    if what == "notebooks":
        call(python, "-m", "pip", "install", "-q", *RUNS_NOTEBOOKS)
        wheel = build_wheel(python, folder)
        return call(python, "tools/as_reader.py", wheel, folder / "notebooks", check=False)
    # what the tests read is UTF-8, which Windows takes for granted only from Python 3.15 on
    os.environ["PYTHONUTF8"] = "1"
    tools = project()["dependency-groups"]["tests"]
    call(python, "-m", "pip", "install", "-q", "-e", ".[lm]", *tools)
    return call(python, "-m", "pytest", "tests", "-m", FAST, check=False)


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in SETS or sys.argv[2] not in WHAT:
        sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))
