"""The recorded sweeps of PPO hold every run that their settings name, and nothing that is no
number."""

import json
import math

import pytest
import recorded

from experiments import gpt2_sentiment_more as more
from experiments import gpt2_sentiment_ppo as script
from experiments import gpt2_sentiment_stages as stages
from rlhf_helpers import settings

MAIN, MORE, STAGES = (f"gpt2_sentiment_{name}" for name in ("ppo", "more", "stages"))


def record_of(name):
    return json.loads((recorded.FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def numbers(value):
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [number for one in value for number in numbers(one)]
    return [value] if isinstance(value, int | float) else []


@pytest.fixture(scope="module")
def results():
    return {**record_of(MAIN)["results"], **record_of(MORE)["results"]}


@pytest.mark.parametrize("name", [MAIN, MORE, STAGES])
def test_every_recorded_number_is_finite(name):
    found = numbers(record_of(name)["results"])
    assert len(found) > 100
    assert all(map(math.isfinite, found))


def test_every_key_is_one_of_the_script(results):
    assert list(results) == [*script.RESULTS, *more.RESULTS]


def test_prices_have_their_runs(results):
    assert results["prices"] == script.BETAS
    assert [len(runs) for runs in results["betas"]] == [len(script.SWEEP_SEEDS)] * len(script.BETAS)
    assert len(results["main"]) == len(script.SEEDS)


def test_rates_and_hard_settings_have_their_runs(results):
    rates = results["rates"]["REINFORCE"]
    assert list(rates) == [str(rate) for rate in more.REINFORCE_RATES]
    assert all(len(runs) == len(script.SWEEP_SEEDS) for runs in rates.values())
    assert list(results["hard"]) == list(more.HARD)
    for parts in results["hard"].values():
        assert list(parts) == list(more.PARTS)
        assert all(len(runs) == len(parts["all parts"]) for runs in parts.values())


def test_no_rate_of_reinforce_that_was_tried_is_better_than_the_one_compared(results):
    """Oracle: the reward less the price of its KL, which is what the runs maximise; a difference
    of a hundredth counts as none."""
    price = script.config_of(settings.load()).kl_coefficient

    def objective(runs):
        ends = [run["end"] for run in runs[: len(script.SWEEP_SEEDS)]]
        return sum(end["reward"] - price * end["kl"] for end in ends) / len(ends)

    best = objective(results["others"]["REINFORCE with baseline"])
    assert all(objective(runs) < best + 0.01 for runs in results["rates"]["REINFORCE"].values())


def test_the_three_stages_have_their_runs():
    results = record_of(STAGES)["results"]
    assert len(results["runs"]) == len(stages.SEEDS)
    assert len(results["without a reward model"]) == len(stages.CONTROL_SEEDS)
    for run in results["runs"]:
        assert {"pretrained", "sft", *stages.ANNOTATORS} <= set(run)
        shares = [run["sft"]["followed"], *run["sft"]["by_stars"], run["sft"]["followed_new"]]
        assert all(0.0 <= share <= 1.0 for share in shares)
