"""What one chapter makes and a later one uses."""

import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlhf_helpers import models, preferences, settings
from rlhf_helpers.algorithms import reward_model as rm
from rlhf_helpers.algorithms import sft
from rlhf_helpers.book import shipped
from rlhf_helpers.worlds import arithmetic, reviews


def test_pairs_are_as_many_as_asked_for_and_repeat():
    """Oracle: the count, and the same call again; labels are shares of five people."""
    run = settings.load()
    pairs = shipped.preference_pairs(run, seed=3, count=20)
    assert len(pairs) == 20
    assert pairs == shipped.preference_pairs(run, seed=3, count=20)
    assert {round(5 * one.preference, 6) for one in pairs} <= {0, 1, 2, 3, 4, 5}


def test_the_shipped_reward_model_knows_what_is_good():
    """Oracle: the true quality of held-out responses that it was never shown, and the noise
    ceiling."""
    run = settings.load()
    model = shipped.reward_model(run)
    policy, tokenizer = models.load(run.model)
    openings = reviews.openings("validation", 150)
    pairs = preferences.sample_pairs(
        policy, tokenizer, openings, 48, torch.Generator().manual_seed(5)
    )
    people = preferences.crowd(run.annotator_temperature, 1)
    p = preferences.choice_probabilities(*pairs, reviews.quality, people)[:, 0]
    gaps = rm.score_gaps(model, tokenizer, rm.labelled(*pairs, p[:, 0]))
    way = (rm.accuracy(gaps.double(), p[:, 0]) - 0.5) / (preferences.ceiling(p) - 0.5)
    assert way > 0.85
    assert not model.training


def test_the_model_that_adds_is_read_or_made(monkeypatch):
    """Oracle: the shipped weights; and elsewhere a model whose demonstrations have become
    likelier."""
    run = settings.load()
    found, _ = shipped.adder(run)
    stored, _ = models.load(run.arithmetic_model)
    assert models.weights_digest(found) == models.weights_digest(stored)
    # the language model of scale tiny stands in for GPT-2
    monkeypatch.setattr(shipped, "DEMONSTRATIONS", 320)
    policy, tokenizer = shipped.adder(replace(run, arithmetic_model=""))
    before, _ = models.load(run.model)
    pairs = arithmetic.demonstrations(100, seed=1)
    now, then = (sft.cross_entropy(one, tokenizer, pairs) for one in (policy, before))
    assert now < then - 0.5
    assert not policy.training


@pytest.mark.parametrize("name", ["score.weight", "transformer.h.1.ln_1.weight"])
def test_a_shipped_reward_model_that_is_not_whole_is_refused(tmp_path, name):
    """Oracle: the whole folder is read, and gives the scores of the shipped one."""
    run = settings.load()
    folder = shutil.copytree(run.reward_model, tmp_path / "reward")
    mine = replace(run, reward_model=str(folder))
    _, tokenizer = models.load(run.model)
    found, expected = (
        rm.scores(shipped.reward_model(each), tokenizer, ["A film"], [" good"])
        for each in (mine, run)
    )
    assert torch.equal(found, expected)
    weights = load_file(folder / "model.safetensors")
    del weights[name]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"no trained weights for {name}"):
        shipped.reward_model(mine)
