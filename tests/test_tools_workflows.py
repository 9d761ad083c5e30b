"""What runs elsewhere: rights of the workflows, versions and systems that are tried, the order of
the check in Colab's image."""

import os
import re
import subprocess
import sys

import pytest
import versions
import yaml
from nbrun import ROOT

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
each_workflow = pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)


def jobs(path):
    """(job, its rights) of a workflow."""
    workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
    for job in workflow["jobs"].values():
        yield job, job.get("permissions", workflow["permissions"])


@each_workflow
def test_no_job_that_runs_a_command_may_write(path):
    """What is installed and run there was written by others."""
    for job, rights in jobs(path):
        if any("run" in step or "setup-" in step.get("uses", "") for step in job["steps"]):
            assert rights == {"contents": "read"}


@each_workflow
def test_a_checkout_leaves_no_credentials(path):
    for job, _ in jobs(path):
        for step in job["steps"]:
            if step.get("uses", "").startswith("actions/checkout"):
                assert step["with"]["persist-credentials"] is False


@each_workflow
def test_actions_are_pinned_by_commit_and_say_which_version_that_is(path):
    lines = [line for line in path.read_text().splitlines() if "uses:" in line]
    pinned = re.compile(r"uses: [\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+$")
    assert not [line for line in lines if not pinned.search(line)]


def tried(name):
    """(set, what, system) of each run of tools/versions.py in a workflow, and what starts it."""
    text = (ROOT / ".github" / "workflows" / f"{name}.yml").read_text(encoding="utf-8")
    workflow = yaml.safe_load(text)
    (job,) = workflow["jobs"].values()
    matrix = job["strategy"]["matrix"]
    rows = matrix.get("include") or [{"what": what} for what in matrix["what"]]
    found = set()
    for row in rows:

        def fill(text, row=row):
            return re.sub(r"\$\{\{ matrix\.(\w+) \}\}", lambda name: row[name[1]], text)

        command = fill(job["steps"][-1]["run"]).split()
        assert command[:2] == ["python", "tools/versions.py"]
        found.add((*command[2:], fill(job["runs-on"])))
    # YAML takes the word on for a truth value
    return found, set(workflow[True])


def test_all_sets_of_versions_are_tried_and_the_newest_by_the_clock():
    """Oracle: the sets that the tool knows, and three systems."""
    every, starts = tried("versions")
    assert starts == {"push", "pull_request"}
    newest, starts = tried("newest")
    assert "schedule" in starts
    assert not {"push", "pull_request"} & starts
    assert {(one, what) for one, what, _ in newest} == {("newest", what) for what in versions.WHAT}
    rest = set(versions.SETS) - {"newest"}
    assert {(one, what) for one, what, _ in every} == {(o, w) for o in rest for w in versions.WHAT}
    systems = {system for _, what, system in every if what == "tests"}
    assert systems == {"ubuntu-latest", "windows-latest", "macos-latest"}


# A program that writes down how it was called instead of doing it; the test says which call fails.
PYTHON = """#!/bin/sh
case "$1" in -c) exec {python} "$@" ;; esac
echo "$@" >> "$CALLS"
case "$*" in *"$FAILS"*) exit 1 ;; esac
"""


@pytest.mark.skipif(os.name == "nt", reason="a shell script, for a container with Linux")
@pytest.mark.parametrize("fails", ["/reader", "/newest", "-m pytest", "nothing"])
def test_the_check_in_colab_comes_as_a_reader_first_and_tells_all_failures(fails, tmp_path):
    """Oracle: the calls in their order; the package is installed by the notebooks alone, and
    nothing is upgraded, before they have run as a reader would run them; a failure hides none that
    comes after."""
    program = tmp_path / "python3"
    program.write_text(PYTHON.format(python=sys.executable))
    program.chmod(0o755)
    calls = tmp_path / "calls"
    path = f"{tmp_path}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "CALLS": str(calls), "FAILS": fails}
    run = subprocess.run(["bash", ROOT / ".ci" / "colab"], env=environment, capture_output=True)
    lines = calls.read_text().splitlines()
    lines = [line for line in lines if not line.startswith("-m pip list")]
    upgrades = [i for i, line in enumerate(lines) if "--upgrade" in line]
    runs = [i for i, line in enumerate(lines) if line.startswith("tools/as_reader.py _build/")]
    package = [i for i, line in enumerate(lines) if line == "-m pip install -q .[lm]"]
    tests = [i for i, line in enumerate(lines) if line.startswith("-m pytest")]
    assert runs[0] < package[0] < upgrades[0] < runs[1] < tests[0]
    assert len(runs) == 2
    assert "install -q nbclient pyyaml" in lines[0]
    assert "pytest" in lines[tests[0] - 1], "what the tests need"
    upgraded = lines[upgrades[0]].split()
    assert {"transformers", "numpy", "trl", "choix"} <= set(upgraded)
    assert "torch" not in upgraded
    assert (run.returncode == 0) == (fails == "nothing")
