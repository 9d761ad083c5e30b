"""Recorded sweeps belong to the code that is here now."""

import importlib
import json
import math
import time

import pytest
from nbrun import ROOT

from rlhf_helpers import settings
from rlhf_helpers.book import notebook, recorded_sweep

FOLDER = ROOT / "rlhf_helpers" / "assets" / "results"
FILES = sorted(FOLDER.glob("*.json"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_settings_in_the_file_are_those_of_the_code(path, monkeypatch):
    monkeypatch.delenv("RLHF_SCALE", raising=False)
    script = importlib.import_module(f"experiments.{path.stem}")
    record = json.loads(path.read_text())
    wanted = json.loads(json.dumps(script.settings_of(settings.load())))
    assert record["settings"] == wanted, "run `make results`"
    assert record["command"] == "make results"
    assert record["machine"]


def test_the_sweep_of_chapter_05_has_every_run():
    record = json.loads((FOLDER / "sft_lora.json").read_text())
    results, asked = record["results"], record["settings"]
    for name in ("response", "all"):
        curves = results[name]["held_out"]
        assert len(curves) == len(asked["seeds"]) >= 3
        assert all(len(curve) == len(results["steps"]) for curve in curves)
        assert all(math.isfinite(value) for curve in curves for value in curve)
    runs = len(asked["sweep_seeds"])
    for name in ("full", "lora"):
        lengths = [len(ends) for ends in results[f"{name}_by_rate"]]
        assert lengths == [runs] * len(asked[f"{name}_rates"])
    for ends in results["by_rank"].values():
        assert [len(values) for values in ends] == [runs] * len(asked["ranks"])


def test_sweeps_are_for_the_scale_they_were_recorded_at(monkeypatch):
    monkeypatch.setenv("RLHF_SCALE", "tiny")
    assert recorded_sweep("sft_lora", settings.load())["steps"]
    monkeypatch.setenv("RLHF_SCALE", "gpt2")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert recorded_sweep("sft_lora", settings.load()) is None


def test_a_recorded_sweep_says_what_made_it(tmp_path, monkeypatch):
    """Oracle: the file, read as JSON; floats come back to the bit."""
    monkeypatch.setattr(notebook, "__file__", str(tmp_path / "book" / "notebook.py"))
    (tmp_path / "assets").mkdir()
    notebook.record_sweep("00_some", time.perf_counter() - 5.2, {"seeds": [0]}, {"x": [0.1, 1e-17]})
    record = json.loads((tmp_path / "assets" / "results" / "00_some.json").read_text())
    assert record["results"] == {"x": [0.1, 1e-17]}
    assert (record["settings"], record["command"]) == ({"seeds": [0]}, "make results")
    assert record["seconds"] == 5
    assert record["machine"].endswith("one thread")
