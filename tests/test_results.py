"""Recorded sweeps belong to the code that is here now."""

import json
import math
import time
from dataclasses import asdict, dataclass

import pytest
import recorded

from rlhf_helpers import settings
from rlhf_helpers.algorithms import ppo
from rlhf_helpers.book import notebook, recorded_sweep

FILES = sorted(recorded.FOLDER.glob("*.json"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_recorded_settings_are_those_of_the_code(path, monkeypatch):
    monkeypatch.delenv("RLHF_SCALE", raising=False)
    found = recorded.problems(path.stem)
    assert not found, f"{'; '.join(found)}: run `make results CHAPTER={path.stem}`"
    record = json.loads(path.read_text())
    assert record["command"].startswith("make results")
    assert record["machine"]


@dataclass(frozen=True)
class WithOneMore(ppo.Config):
    neutral: float = 0.0


def test_a_new_setting_with_a_default_is_no_difference():
    """Oracle: the settings of PPO as they are, and with one more field."""
    before = {"config": asdict(ppo.Config()), "seeds": [0, 1]}
    after = {"config": asdict(WithOneMore()), "seeds": [0, 1], "more": {"a": 1}}
    assert recorded.differences(before, after) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": {"lam": 0.9}}, "config.lam was recorded as 0.95; the code has 0.9"),
        ({"config": {}}, "config.lam was recorded as 0.95; the code has no such setting"),
        ({"config": None}, "config was recorded as {'lam': 0.95}; the code has None"),
        ({"seeds": [0]}, "seeds was recorded as [0, 1]; the code has [0]"),
    ],
)
def test_a_recorded_setting_that_changed_is_named(change, message):
    before = {"config": {"lam": 0.95}, "seeds": [0, 1]}
    assert recorded.differences(before, before | change) == [message]


def test_the_sweep_of_sft_lora_has_every_run():
    record = json.loads((recorded.FOLDER / "sft_lora.json").read_text())
    results, asked = record["results"], record["settings"]
    tuning, seeds = asked["tuning_seeds"], asked["seeds"]
    assert len(results["curves"]) == len(seeds)
    assert {len(curve) for curve in results["curves"]} == {len(results["steps"])}
    for what in ("all weights", "all tokens", *asked["adapters"]):
        rates = asked["lora_rates" if what in asked["adapters"] else "full_rates"]
        rows = [results["runs"][f"{what}, rate {rate:g}"] for rate in rates]
        assert all(row["seeds"][: len(tuning)] == tuning for row in rows)
        best = min(rows, key=lambda row: sum(row["nats_validation"][: len(tuning)]))
        assert best["seeds"] == seeds
    for passes in asked["passes"][1:]:
        row = results["runs"][
            f"all weights, {passes} passes, rate {asked['config']['learning_rate']:g}"
        ]
        assert row["seeds"] == seeds
    for row in results["runs"].values():
        values = [value for name, ends in row.items() if "_" in name for value in ends]
        assert len(values) == 5 * len(row["seeds"])
        assert all(map(math.isfinite, values))


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
    notebook.record_sweep("some", time.perf_counter() - 5.2, {"seeds": [0]}, {"x": [0.1, 1e-17]})
    record = json.loads((tmp_path / "assets" / "results" / "some.json").read_text())
    assert record["results"] == {"x": [0.1, 1e-17]}
    assert (record["settings"], record["command"]) == ({"seeds": [0]}, "make results CHAPTER=some")
    assert record["seconds"] == 5
    assert record["machine"].endswith("one thread")
