"""What samples from a policy and judges its responses: every loop and every evaluation comes
here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase as Tokenizer

from rlhf_helpers import conversations, models, rewards
from rlhf_helpers._validate import (
    check_each,
    check_model,
    check_seed,
    check_some,
    check_tokenizer,
    has,
    in_range,
    true_or_false,
)
from rlhf_helpers.algorithms.sft import check_lengths
from rlhf_helpers.logprobs import completion_log_probs
from rlhf_helpers.rollout import Rollout, end_tokens, ended, sample, texts_of, write
from rlhf_helpers.worlds import arithmetic


class Responses(NamedTuple):
    """Completions of a policy and what a judge said of them; samples of one prompt are
    neighbours."""

    rollout: Rollout
    texts: list[str]  # N; one without an end is a `models.Cut`
    scores: Tensor  # [N], float32, on the policy's device
    ended: Tensor  # [N], whether it came to an end token


@torch.no_grad()
def respond(
    policy: nn.Module,
    tokenizer: Tokenizer,
    prompts: Sequence[conversations.Prompt],
    reward: rewards.Reward,
    generator: torch.Generator,
    samples_per_prompt: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    columns: Mapping[str, Sequence] | None = None,
) -> Responses:
    """Sample completions of each prompt, a text or a conversation, and score them.

    Raises: ValueError as `rewards.score`.
    """
    group, device = samples_per_prompt, next(policy.parameters()).device
    ends = end_tokens(policy, tokenizer)
    rollout = sample(
        policy,
        *models.encode_prompts(tokenizer, prompts, device),
        max_new_tokens,
        eos_token_id=ends,
        pad_token_id=tokenizer.pad_token_id,
        temperature=temperature,
        samples_per_prompt=group,
        generator=generator,
    )
    whole = ended(rollout, ends)
    texts = texts_of(rollout, tokenizer, whole)
    repeated = {k: [x for x in v for _ in range(group)] for k, v in (columns or {}).items()}
    scores = rewards.score(reward, [p for p in prompts for _ in range(group)], texts, **repeated)
    return Responses(rollout, texts, scores.to(device, torch.float32), whole)


def check_prompt_lengths(
    policy: nn.Module,
    tokenizer: Tokenizer,
    prompts: Sequence[conversations.Prompt],
    max_new_tokens: int,
) -> None:
    """Refuse prompts that are too long, before anything is sampled.

    Raises: ValueError, naming the prompt, if one and a longest completion do not fit the model's
        context together. Called before the first step, for a prompt may come up late.
    """
    lengths = [len(ids) + max_new_tokens for ids in models.prompt_ids(tokenizer, prompts)]
    check_lengths(
        policy, lengths, "prompts", f"lower max_new_tokens={max_new_tokens} or shorten the prompt"
    )


class Evaluation(NamedTuple):
    """A policy's samples on some prompts, N in all; samples of one prompt are neighbours."""

    texts: list[str]
    scores: dict[str, Tensor]  # [N] for each judge
    kl: Tensor  # [N], log π − log π_ref summed over tokens; its mean estimates KL(π‖π_ref), nats


@torch.no_grad()
def evaluate(
    policy: nn.Module,
    reference: nn.Module,
    tokenizer: Tokenizer,
    prompts: Sequence[conversations.Prompt],
    judges: Mapping[str, rewards.Reward],
    config: Any,
    seed: int = 0,
) -> Evaluation:
    """Sample from a policy as in training, and judge; nothing is learned.

    Args:
        policy, reference: causal language models; for a LoRA policy, another copy as reference.
        prompts: texts or conversations, best some that were never trained on.
        judges: reward functions by name.
        config: samples_per_prompt, max_new_tokens and temperature are used, of `ppo.Config` or
            another.
        seed: of the sampling.
    """
    check_model(policy, "policy")
    check_model(reference, "reference")
    check_tokenizer(tokenizer)
    wanted = ("samples_per_prompt", "max_new_tokens", "temperature")
    has(config, "config", "settings, such as ppo.Config()", *wanted)
    has(judges, "judges", "a dictionary of reward functions", "items")
    for name, judge in judges.items():
        rewards.check_reward(judge, f"judges[{name!r}]")
    check_seed(seed)
    device, ends = next(policy.parameters()).device, end_tokens(policy, tokenizer)
    rollout = sample(
        policy,
        *models.encode_prompts(tokenizer, prompts, device),
        config.max_new_tokens,
        eos_token_id=ends,
        pad_token_id=tokenizer.pad_token_id,
        temperature=config.temperature,
        samples_per_prompt=config.samples_per_prompt,
        generator=torch.Generator(device).manual_seed(seed),
    )
    mask = rollout.completion_mask
    ref_log_probs = completion_log_probs(
        reference,
        rollout.tokens,
        rollout.attention_mask,
        mask.shape[1],
        config.temperature,
        samples_per_prompt=config.samples_per_prompt,
    )
    texts = texts_of(rollout, tokenizer, ended(rollout, ends))
    repeated = [prompt for prompt in prompts for _ in range(config.samples_per_prompt)]
    scores = {name: rewards.score(judge, repeated, texts) for name, judge in judges.items()}
    return Evaluation(texts, scores, (rollout.log_probs - ref_log_probs).sum(1).double().cpu())


def solve(
    policy: nn.Module,
    tokenizer: Tokenizer,
    problems: Sequence[arithmetic.Problem],
    samples: int,
    max_new_tokens: int,
    seed: int = 0,
    greedy: bool = False,
) -> Tensor:
    """Which of a policy's samples solve the problems: [problems, samples], True where right, for
    `arithmetic.pass_at_k`. Greedy takes the likeliest token each time, so one sample is enough."""
    check_model(policy, "policy")
    check_each(problems, "problems", "a Problem", "prompt", "answer")
    check_some(problems, "problems", "Problem")
    in_range(samples, "samples", 1)
    check_seed(seed)
    true_or_false(greedy, "greedy")
    device = next(policy.parameters()).device
    texts = write(
        policy,
        tokenizer,
        [one.prompt for one in problems],
        max_new_tokens,
        samples_per_prompt=samples,
        top_k=1 if greedy else 0,
        generator=torch.Generator(device).manual_seed(seed),
    )
    answers = [one.answer for one in problems for _ in range(samples)]
    right = arithmetic.exact([], texts, answers)
    return torch.tensor(right).view(len(problems), samples) == 1.0
