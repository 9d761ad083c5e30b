"""The two scales, and that asking for them costs nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import rlhf_helpers
from rlhf_helpers import settings
from rlhf_helpers.algorithms import dpo, grpo, ppo, reward_model, sft


def test_tiny_is_the_default_and_needs_nothing_from_outside(monkeypatch):
    """Oracle: the specification: a folder of the package, the made-up world, the CPU."""
    monkeypatch.delenv("RLHF_SCALE", raising=False)
    chosen = settings.load()
    assert (chosen.scale, chosen.device, chosen.world) == ("tiny", "cpu", "reviews")
    package = Path(rlhf_helpers.__file__).parent
    assert Path(chosen.model) == package / "assets" / "tiny-gpt2"


@pytest.mark.parametrize(("gpu", "device"), [(True, "cuda"), (False, "cpu")])
def test_gpt2_uses_the_gpu_where_there_is_one(monkeypatch, gpu, device):
    """Oracle: the specification, for both answers that torch can give."""
    monkeypatch.setenv("RLHF_SCALE", "gpt2")
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    chosen = settings.load()
    assert (chosen.scale, chosen.device) == ("gpt2", device)
    assert (chosen.model, chosen.world) == ("gpt2", "imdb")


def test_an_unknown_scale_is_refused_with_the_known_ones(monkeypatch):
    """Oracle: the specification."""
    monkeypatch.setenv("RLHF_SCALE", "large")
    with pytest.raises(ValueError, match="'large' is unknown; use one of 'tiny', 'gpt2'"):
        settings.load()


def test_settings_of_scale_tiny_load_no_framework():
    """Oracle: what a fresh interpreter has imported."""
    code = (
        "import sys; from rlhf_helpers import settings; settings.load(); "
        "sys.exit(bool({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    )
    environment = {k: v for k, v in os.environ.items() if k != "RLHF_SCALE"}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0


TABLES = {
    "sft": (sft.AT_SCALE, sft.Config),
    "sft, adapter": (sft.LORA_AT_SCALE, sft.Config),
    "reward_model": (reward_model.AT_SCALE, reward_model.Config),
    "ppo": (ppo.AT_SCALE, ppo.Config),
    "dpo": (dpo.AT_SCALE, dpo.Config),
    "grpo": (grpo.AT_SCALE, grpo.Config),
}


@pytest.mark.parametrize("name", TABLES)
def test_every_scale_has_settings_and_each_makes_a_config(name):
    """Oracle: the known scales; and the dataclass itself, which refuses a name it does not have."""
    table, config = TABLES[name]
    assert set(table) == set(settings.SCALES)
    for changes in table.values():
        made = config(**changes)
        assert {field: getattr(made, field) for field in changes} == changes


def test_every_scale_has_a_number_of_examples():
    assert set(sft.EXAMPLES) == set(settings.SCALES)


def test_a_completion_is_as_long_in_training_as_in_the_scale(monkeypatch):
    """Oracle: the scale's own length; two homes of one number must agree."""
    for scale in settings.SCALES:
        monkeypatch.setenv("RLHF_SCALE", scale)
        for algorithm in (ppo, dpo):
            found = algorithm.Config(**algorithm.AT_SCALE[scale])
            assert found.max_new_tokens == settings.load().max_new_tokens
