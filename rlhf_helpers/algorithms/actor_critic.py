"""A policy and a critic that are tables, trained on a language that can be listed, many independent
runs at once: what does it matter how the reward of a text is shared out over its tokens?

The objective is E[r] − β·KL(π‖π_ref). Each token pays the price of its own log-ratio, the last one
gets the reward of the text.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_helpers._validate import check_seed, has, in_range, one_of
from rlhf_helpers.advantages import gae, leave_one_out_advantages
from rlhf_helpers.worlds import enumerable
from rlhf_helpers.worlds.enumerable import Language

CREDITS = ("whole", "leave_one_out", "critic", "exact")


@dataclass(frozen=True)
class Config:
    """Settings of a run.

    Args:
        credit: what each token of a text is multiplied by. "whole" is what the text earned, less
            its price; "leave_one_out" subtracts the mean of the batch's other texts; "critic" is
            GAE with a table of values learned on the way; "exact" the advantages themselves.
        lam: λ of "critic", for advantages and value targets.
        beta: β, the price of a nat; 0 charges nothing.
        learning_rate: of the policy's logits, plain gradient ascent.
        critic_rate: the share of the way that a state's value moves, with each batch that meets
            it, to the mean of its targets there; in [0, 1].
        iterations: batches, with one step each.
        batch_size: texts in a batch.
        seed: of the texts.
    """

    credit: str = "critic"
    lam: float = 1.0
    beta: float = 1.0
    learning_rate: float = 4.0
    critic_rate: float = 0.3
    iterations: int = 200
    batch_size: int = 16
    seed: int = 0


def _check(config: Config, runs: int) -> None:
    has(config, "config", "an actor_critic.Config", *Config.__dataclass_fields__)
    one_of(config.credit, CREDITS, "credit")
    in_range(config.lam, "lam", 0.0, 1.0)
    in_range(config.beta, "beta", 0.0)
    in_range(config.learning_rate, "learning_rate", 0.0)
    in_range(config.critic_rate, "critic_rate", 0.0, 1.0)
    in_range(config.iterations, "iterations", 1)
    in_range(config.batch_size, "batch_size", 2)
    check_seed(config.seed)
    in_range(runs, "runs", 1)


def _text_log_probs(log_probs: Tensor, language: Language) -> Tensor:
    """Tables [R, S, V] -> log-probabilities of the texts [R, Y]."""
    chosen = log_probs[:, language.states, language.tokens]
    return chosen.masked_fill(~language.mask, 0.0).sum(2)


def _objective(
    of_texts: Tensor, reference: Tensor, rewards: Tensor, language: Language, beta: float
) -> Tensor:
    of_reference = enumerable.sequence_log_probs(reference, language)
    return (of_texts.exp() * (rewards - beta * (of_texts - of_reference))).sum(1)


def _credit(
    log_probs: Tensor,
    critic: Tensor,
    texts: Tensor,
    reference: Tensor,
    rewards: Tensor,
    language: Language,
    config: Config,
) -> tuple[Tensor, Tensor]:
    """(advantages, value targets) of the tokens of a batch, each [R, N, L]."""
    states, tokens, mask = (x[texts] for x in (language.states, language.tokens, language.mask))
    run = torch.arange(len(texts))[:, None, None]
    price = config.beta * (log_probs - reference)
    paid = -price[run, states, tokens] * mask
    last = mask.sum(2, keepdim=True) - 1
    paid.scatter_add_(2, last, rewards[texts].unsqueeze(2))
    if config.credit == "exact":
        advantage = _advantages(log_probs, rewards, language, -price)
        return advantage[run, states, tokens] * mask, torch.zeros_like(paid)
    if config.credit == "critic":
        flat = (-1, language.length)
        values = critic.gather(1, states.flatten(1)).view_as(paid)
        found = gae(paid.view(flat), values.view(flat), mask.view(flat), lam=config.lam)
        return found[0].view_as(paid), found[1].view_as(paid)
    total = paid.sum(2)
    if config.credit == "leave_one_out":
        total = leave_one_out_advantages(total.flatten(), config.batch_size).view_as(total)
    return total.unsqueeze(2) * mask, torch.zeros_like(paid)


def _advantages(
    log_probs: Tensor, rewards: Tensor, language: Language, token_rewards: Tensor
) -> Tensor:
    """Q − V of many policies at once, [R, S, V]: `enumerable.values`, with runs in front."""
    branches, runs = language.vocabulary - 1, len(log_probs)
    sizes = [branches**depth for depth in range(language.length)]
    ended = rewards[: language.num_states].split(sizes)
    later = rewards[language.num_states :].expand(runs, -1)
    probs, paid = log_probs.exp().split(sizes, dim=1), token_rewards.split(sizes, dim=1)
    levels = []
    for p, end, extra in zip(reversed(probs), reversed(ended), reversed(paid), strict=True):
        ending = end.expand(runs, -1).unsqueeze(2)
        q = extra + torch.cat([ending, later.reshape(runs, -1, branches)], dim=2)
        later = (p * q).sum(2)
        levels.insert(0, q - later.unsqueeze(2))
    return torch.cat(levels, dim=1)


def _policy_step(log_probs: Tensor, credit: Tensor, texts: Tensor, language: Language) -> Tensor:
    """The gradient of (1/N)·Σ credit·log π in the logits: in each state, the credit of the token
    chosen there, spread by 1[a = k] − π(k)."""
    count = language.vocabulary
    place = language.states[texts] * count + language.tokens[texts]
    sums = torch.zeros_like(log_probs).flatten(1)
    sums.scatter_add_(1, place.flatten(1), credit.flatten(1))
    sums = sums.view_as(log_probs) / texts.shape[1]
    return sums - log_probs.exp() * sums.sum(2, keepdim=True)


def _critic_step(critic: Tensor, targets: Tensor, texts: Tensor, language: Language) -> Tensor:
    """How far each value is from the mean of its targets; 0 where the batch does not come."""
    states, mask = language.states[texts].flatten(1), language.mask[texts].flatten(1)
    errors = (targets.flatten(1) - critic.gather(1, states)) * mask
    sums = torch.zeros_like(critic).scatter_add_(1, states, errors)
    visits = torch.zeros_like(critic).scatter_add_(1, states, mask.to(critic))
    return sums / visits.clamp(min=1)


def train(
    reference: Tensor, rewards: Tensor, language: Language, config: Config, runs: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Train `runs` policies, all from the reference, with critics from 0.

    Args:
        reference: [S, V], log-probabilities of the frozen reference.
        rewards: [Y], what each text earns.
        language: as `enumerable.language` returns it.
        config: settings.
        runs: R; with R = 1 the texts are those that one run of the same seed draws.
    Returns: (objective [R, iterations + 1], exact, before the first step and after each; logits
        [R, S, V] of the policies; values [R, S] of the critics).
    Raises: ValueError on a setting out of range, or what `enumerable.values` refuses.
    """
    _check(config, runs)
    enumerable.values(reference, rewards, language)
    generator = torch.Generator().manual_seed(config.seed)
    logits = reference.detach().repeat(runs, 1, 1)
    critic = reference.new_zeros(runs, language.num_states)
    curve = []
    for _ in range(config.iterations):
        log_probs = logits.log_softmax(-1)
        of_texts = _text_log_probs(log_probs, language)
        curve.append(_objective(of_texts, reference, rewards, language, config.beta))
        texts = torch.multinomial(of_texts.exp(), config.batch_size, True, generator=generator)
        credit, targets = _credit(log_probs, critic, texts, reference, rewards, language, config)
        logits = logits + config.learning_rate * _policy_step(log_probs, credit, texts, language)
        critic = critic + config.critic_rate * _critic_step(critic, targets, texts, language)
    of_texts = _text_log_probs(logits.log_softmax(-1), language)
    curve.append(_objective(of_texts, reference, rewards, language, config.beta))
    return torch.stack(curve, dim=1), logits, critic
