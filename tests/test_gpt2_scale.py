"""Notebooks with a language model run from top to bottom at scale gpt2, offline, from a hub cache
on disk.

The models under the real names are small and random, so no number means anything. What is checked
is that every cell runs and says something, that nothing is claimed that was not measured, and that
texts stay texts: the reviews there hold what would be an element, a role or a formula on a page.
"""

import json
import os
import re

import fake_hub
import nbrun
import pytest

NOTEBOOKS = [p for p in nbrun.find_notebooks() if nbrun.read(p).metadata["needs_model"]]

HOSTILE = [
    "near <script>alert(1)</script>",
    "at {download}`../secret`",
    "for $5 or $6, **so** _so_",
]

# Whole runs of the loops take minutes and show nothing more here than short ones.
SHORT = """
from rlhf_helpers.algorithms import dpo, grpo, ppo, sft
ppo.AT_SCALE["gpt2"] |= {"iterations": 8, "max_new_tokens": 16}
grpo.AT_SCALE["gpt2"] |= {"iterations": 8}
dpo.AT_SCALE["gpt2"] |= {"max_new_tokens": 16}
sft.EXAMPLES["gpt2"] = 400
"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fake_hub, "PLACES", [*HOSTILE, *fake_hub.PLACES[:2]])
        fake_hub.make(folder)
    return folder


@pytest.fixture
def short_runs(tmp_path, monkeypatch):
    """Every kernel shortens the runs before its first cell."""
    startup = tmp_path / "profile_default" / "startup"
    startup.mkdir(parents=True)
    (startup / "short.py").write_text(SHORT, encoding="utf-8")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))


@pytest.mark.usefixtures("short_runs")
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
    for now, stored in zip(notebook.cells, nbrun.read(path).cells, strict=True):
        assert now.get("outputs") or not stored.get("outputs"), now.source
        for output in now.get("outputs", []):
            shown = output.get("data", {}).get("text/markdown", "")
            if not shown.startswith("`rlhf_helpers/"):  # printed code
                assert not re.search(r"<script|</|\{download|\$5|\*\*so|_so_", shown), shown
            for line in output.get("text", "").splitlines():
                assert not re.match("[✓✗].*recorded", line), line
