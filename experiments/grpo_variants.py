"""Record variants of grpo: rlhf_helpers/assets/results/grpo_variants.json.

Samples of an older policy, or of one in half precision. With the
names of some parts (lag, precision), these alone are made, and printed.
"""

import copy
from dataclasses import asdict, replace
from functools import partial

import torch

from experiments.grpo import columns_of, config_of, rate
from experiments.grpo_more import (
    FEW_SEEDS,
    FREE,
    PROBLEMS,
    SHORT,
    record,
)
from rlhf_helpers.algorithms import grpo, sampling
from rlhf_helpers.algorithms._loop import prompt_indices, set_learning_rate
from rlhf_helpers.book import shipped
from rlhf_helpers.logprobs import completion_log_probs
from rlhf_helpers.worlds import arithmetic

LAGS = [16, 4]  # iterations from the policy that sampled to the one that is trained
MOST = 2.0  # the largest ratio that a truncated weight may have
# what is done about the difference between the policy that sampled and the one that is trained
CORRECTIONS = ["ignored", "clipped", "truncated"]


def short_config(run, seed=0, **change):
    return replace(config_of(run, seed), iterations=SHORT, **change)


def settings_of(run):
    """What a run depends on besides its seed; a test holds the file to it."""
    return {
        "config": asdict(short_config(run)),
        "few_seeds": FEW_SEEDS,
        "problems": PROBLEMS,
        "lags": LAGS,
        "most": MOST,
        "corrections": CORRECTIONS,
    }


# --- the policy that samples is not the one that is trained --------------------------------------


def batch_of(sampler, state, config, prompts, answers):
    """A batch with the sampler's own log-probabilities."""
    how = (config.samples_per_prompt, config.max_new_tokens, config.temperature)
    found = sampling.respond(
        sampler, state.tokenizer, prompts, arithmetic.exact, state.sampling, *how, answers
    )
    tokens, attention_mask, mask, log_probs, _ = found.rollout
    scores, count = found.scores, len(found.texts)
    advantages = grpo.advantages_of(scores, config)
    logs = (log_probs.float(), None, scores, advantages, found.ended, count)
    return grpo.Batch(tokens, attention_mask, mask, *logs)


@torch.no_grad()
def log_probs_now(state, batch, config):
    where = (batch.tokens, batch.attention_mask, batch.mask.shape[1])
    group = config.samples_per_prompt
    return completion_log_probs(
        state.policy, *where, config.temperature, samples_per_prompt=group
    ).masked_fill(~batch.mask, 0.0)


def corrected(batch, now, correction):
    """The batch as the loss gets it: with the ratio to the sampler, with none, or with a weight on
    each token that is the ratio, cut off above and without a gradient."""
    if correction == "clipped":
        return batch
    if correction == "ignored":
        return batch._replace(old_log_probs=now)
    weights = (now - batch.old_log_probs).exp().clamp(max=MOST)
    return batch._replace(old_log_probs=now, advantages=batch.advantages[:, None] * weights)


def apart(batch, now):
    """How far the sampler is from the policy that is trained: of the ratio of each token."""
    log_ratio = (now - batch.old_log_probs)[batch.mask]
    return {
        "mean": log_ratio.abs().mean().item(),
        "most": log_ratio.abs().max().item(),
        "outside": ((log_ratio.exp() - 1).abs() > 0.2).double().mean().item(),
    }


def apart_run(run, seed, lag=0, correction="ignored", half=False):
    """GRPO on samples of the policy as it was `lag` iterations ago, or of its copy in half
    precision."""
    policy, tokenizer = shipped.adder(run)
    config = short_config(run, seed, **(FREE if correction != "clipped" else {}))
    pool = arithmetic.problems(3, "train")
    state, sampler = grpo.start(policy, tokenizer, config), copy.deepcopy(policy)
    sampler = sampler.bfloat16() if half else sampler
    past, rewards, told = [], [], []
    for index in range(config.iterations):
        set_learning_rate(state.optimizer, index, config.iterations, config.warm_up)
        past = [*past, copy.deepcopy(policy.state_dict())][-1 - lag :]
        sampler.load_state_dict(past[0])
        chosen = [pool[i] for i in prompt_indices(len(pool), index, config)]
        batch = batch_of(sampler, state, config, *columns_of(chosen))
        rewards.append(round(batch.rewards.mean().item(), 4))
        now = log_probs_now(state, batch, config)
        told.append({name: round(x, 5) for name, x in apart(batch, now).items()})
        grpo.step(state, corrected(batch, now, correction), config)
    found = {name: [one[name] for one in told] for name in told[0]}
    end = {"seed": seed, "rate": rate(policy, tokenizer, problems=PROBLEMS), "reward": rewards}
    return end | {"lowest": min(rewards[10:]), "apart": found}


# --- all -----------------------------------------------------------------------------------------


def tasks(run, found):
    """Where each result goes, and what makes it, as in `grpo_more`."""
    for seed in FEW_SEEDS:
        yield ("lag", "0", "ignored", seed), partial(apart_run, run, seed)
    for correction in ("ignored", "truncated"):
        for seed in FEW_SEEDS:
            place = ("precision", correction, seed)
            yield place, partial(apart_run, run, seed, 0, correction, half=True)
    for lag in LAGS:
        for correction in CORRECTIONS:
            for seed in FEW_SEEDS:
                place = ("lag", str(lag), correction, seed)
                yield place, partial(apart_run, run, seed, lag, correction)


def main():
    record("grpo_variants", tasks, settings_of)


if __name__ == "__main__":
    main()
