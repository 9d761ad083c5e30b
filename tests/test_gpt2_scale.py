"""Notebooks with a language model run from top to bottom at scale gpt2, offline, from a hub cache
on disk.

The models under the real names are small and random, so only that every cell runs is checked here.
"""

import json
import os

import fake_hub
import nbrun
import pytest

NOTEBOOKS = [p for p in nbrun.find_notebooks() if nbrun.read(p).metadata["needs_model"]]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    fake_hub.make(folder)
    return folder


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_from_a_hub_cache(path, hub, monkeypatch):
    for name in [name for name in os.environ if name.startswith("HF_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HOME", str(hub))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("RLHF_SCALE", "gpt2")
    notebook, _, _ = nbrun.execute(path)  # raises at the first cell that fails
    printed = json.dumps([cell.get("outputs", []) for cell in notebook.cells])
    assert "scale gpt2" in printed
