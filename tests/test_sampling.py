"""What samples and judges, beside the loops: which samples of a policy solve a problem, and that
what is too long is found before the first step."""

import copy

import pytest
import torch
from architectures import CONTEXT, build
from numbers_and_words import letters

from rlhf_helpers import models, settings
from rlhf_helpers.algorithms import dpo, grpo, ppo, reward_model, sampling, sft
from rlhf_helpers.algorithms.reward_model import Comparison
from rlhf_helpers.worlds import arithmetic


def test_what_solves_a_problem_is_told_by_its_last_term(monkeypatch):
    """Oracle: four texts by hand, two of each problem, one of which holds its answer elsewhere; and
    greedy takes the likeliest token alone."""
    asked = {}

    def written(policy, tokenizer, prompts, new, **how):
        asked.update(how, prompts=prompts)
        return ["95", "5+90=95", "1100", "5+105=110"]

    monkeypatch.setattr(sampling, "write", written)
    problems = [
        arithmetic.Problem("37+58=", "95", 3, (37, 58)),
        arithmetic.Problem("50+60=", "110", 3, (50, 60)),
    ]
    found = sampling.solve(build("gpt2"), None, problems, 2, 16)
    assert found.tolist() == [[True, True], [False, True]]
    assert (asked["prompts"], asked["samples_per_prompt"]) == (["37+58=", "50+60="], 2)
    assert asked["top_k"] == 0
    sampling.solve(build("gpt2"), None, problems, 2, 16, greedy=True)
    assert asked["top_k"] == 1


def test_the_seed_alone_decides_what_solves_a_problem():
    """Oracle: the same call from another global random state, and with another seed."""
    policy, tokenizer = models.load(settings.TINY_ARITHMETIC)
    some, found = arithmetic.sample(8, 2, "held_out"), []
    for state, seed in ((0, 1), (1, 1), (1, 2)):
        torch.manual_seed(state)
        found.append(sampling.solve(policy, tokenizer, some, 8, 8, seed=seed).tolist())
    assert found[0] == found[1] != found[2]


def ones(prompts, completions, **_):
    return [1.0] * len(prompts)


LONG = "a " * CONTEXT
PAIRS = [("a", "b")] * 9 + [("a", LONG)]
RANKED = [Comparison("a", ("b", "c"))] * 9 + [Comparison("a", ("b", LONG))]
ASKED = ["a"] * 9 + ["a " * (CONTEXT - 4)]  # with five more it is too long
FEW = {"prompts": 2, "max_new_tokens": 5}


def scorer(policy, tokenizer):
    return reward_model.load(policy, tokenizer)[0]


# (what the message names, the run); the last example of each kind of data is too long
TOO_LONG = {
    "sft": (r"pairs\[9\]", lambda p, t: sft.train(p, t, PAIRS, sft.Config(batch_size=2))),
    "sft, held out": (
        r"held_out\[9\]",
        lambda p, t: sft.train(p, t, PAIRS[:2], sft.Config(), PAIRS),
    ),
    "dpo": (
        r"data\[9\]",
        lambda p, t: dpo.train(p, t, dpo.encode(t, RANKED), dpo.Config(batch_size=2)),
    ),
    "dpo, held out": (
        r"held_out\[9\]",
        lambda p, t: dpo.train(
            p, t, dpo.encode(t, RANKED[:2]), dpo.Config(max_new_tokens=5), dpo.encode(t, RANKED)
        ),
    ),
    "dpo, room for an answer": (
        r"held_out\[1\].*lower max_new_tokens=5",
        lambda p, t: dpo.train(
            p,
            t,
            dpo.encode(t, RANKED[:2]),
            dpo.Config(max_new_tokens=5),
            dpo.encode(t, [RANKED[0], Comparison(ASKED[9], ("b", "c"))]),
        ),
    ),
    "online": (r"prompts\[9\]", lambda p, t: dpo.online(p, t, ASKED, ones, dpo.Config(**FEW))),
    "rejection": (
        r"prompts\[9\]",
        lambda p, t: iter(dpo.rejection_sampled(p, t, ASKED, ones, dpo.Config(**FEW))),
    ),
    "reward model": (
        r"data\[9\]",
        lambda p, t: reward_model.train(scorer(p, t), t, RANKED, reward_model.Config(batch_size=2)),
    ),
    "reward model, held out": (
        r"held_out\[9\]",
        lambda p, t: reward_model.train(scorer(p, t), t, RANKED[:2], reward_model.Config(), RANKED),
    ),
    "ppo": (
        r"prompts\[9\].*max_new_tokens=5",
        lambda p, t: ppo.train(p, t, ASKED, ones, ppo.Config(mini_batches=1, **FEW)),
    ),
    "ppo, ptx": (
        r"ptx pairs\[9\]",
        lambda p, t: ppo.train(
            p,
            t,
            ["a"],
            ones,
            ppo.Config(mini_batches=1, ptx_coefficient=1.0, **FEW),
            ptx=PAIRS,
        ),
    ),
    "grpo": (
        r"prompts\[9\].*max_new_tokens=5",
        lambda p, t: grpo.train(p, t, ASKED, ones, grpo.Config(**FEW)),
    ),
}


@pytest.mark.parametrize("case", TOO_LONG)
def test_what_is_too_long_is_named_before_the_first_step(case):
    """Oracle: the model's context; not one step, and the weights as they were."""
    policy = build("gpt2")
    before = copy.deepcopy(policy.state_dict())
    message, run = TOO_LONG[case]
    with pytest.raises(ValueError, match=message):
        next(run(policy, letters()))
    assert all(torch.equal(before[name], value) for name, value in policy.state_dict().items())


def test_what_just_fits_is_trained_on():
    policy, longest = build("gpt2"), "a " * (CONTEXT - 2)
    assert len(list(sft.train(policy, letters(), [("a", longest)], sft.Config()))) == 1
    asked, config = ["a " * (CONTEXT - 5)], grpo.Config(iterations=1, **FEW)
    assert len(list(grpo.train(policy, letters(), asked, ones, config))) == 1
