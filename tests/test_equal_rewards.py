"""Rewards that are all equal teach nothing, also where floats do not hold them: no weight moves,
and the group is sampled again."""

import pytest
import torch

from rlhf_helpers import models, settings
from rlhf_helpers.algorithms import grpo, ppo

PROMPTS = ["1+1=", "2+2=", "3+4="]
SMALL = {"iterations": 2, "prompts": 2, "samples_per_prompt": 8, "max_new_tokens": 4}


def equal_rewards(prompts, completions, **_):
    return [0.7] * len(completions)


def weights(policy):
    return [weight.detach().clone() for weight in policy.parameters()]


def same(before, policy):
    pairs = zip(before, policy.parameters(), strict=True)
    return all(torch.equal(old, new) for old, new in pairs)


@pytest.mark.parametrize("scale", grpo.SCALES)
@pytest.mark.parametrize("constant_groups", grpo.CONSTANT_GROUPS)
def test_grpo_moves_no_weight_and_samples_again(scale, constant_groups):
    """Oracle: the weights before, bit for bit; with "resample" every round is taken."""
    policy, tokenizer = models.load(settings.TINY_ARITHMETIC)
    before = weights(policy)
    config = grpo.Config(
        **SMALL, scale=scale, constant_groups=constant_groups, rounds=3, learning_rate=1e-2
    )
    sampled = [one.sampled for one in grpo.train(policy, tokenizer, PROMPTS, equal_rewards, config)]
    assert same(before, policy)
    rounds = 3 if constant_groups == "resample" else 1
    assert sampled == [16 * rounds] * 2


@pytest.mark.parametrize("whiten", [False, True])
def test_ppo_against_the_group_moves_no_weight(whiten):
    """Oracle: the weights before, bit for bit."""
    policy, tokenizer = models.load(settings.TINY_ARITHMETIC)
    before = weights(policy)
    config = ppo.Config(
        **SMALL,
        baseline="group",
        whiten=whiten,
        kl_coefficient=0.0,
        missing_end_penalty=0.0,
        learning_rate=1e-2,
        mini_batches=2,
    )
    list(ppo.train(policy, tokenizer, PROMPTS, equal_rewards, config))
    assert same(before, policy)
