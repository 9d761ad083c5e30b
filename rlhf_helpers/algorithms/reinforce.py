"""REINFORCE on a Gaussian bandit: the policy gradient in its barest form, many independent runs at
once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_helpers._validate import check_seed, finite, floats, has, in_range, integers, one_of
from rlhf_helpers.advantages import leave_one_out_advantages
from rlhf_helpers.losses import policy_gradient_loss
from rlhf_helpers.worlds.bandits import GaussianBandit

BASELINES = ("none", "running_mean", "leave_one_out")


@dataclass(frozen=True)
class Config:
    """Settings of a run.

    Args:
        steps: updates.
        batch_size: pulls per update; "leave_one_out" needs at least 2.
        learning_rate: of plain gradient ascent on the logits.
        baseline: what is subtracted from a reward: "none", "running_mean" (of all rewards before
            this batch; the first batch has none before it and moves nothing) or "leave_one_out"
            (the mean of the other rewards of the batch).
        seed: of the actions and the noise.
    """

    steps: int = 1000
    batch_size: int = 1
    learning_rate: float = 0.1
    baseline: str = "running_mean"
    seed: int = 0


class Metrics(NamedTuple):
    """One update of R runs with N pulls each. `expected_reward` is exact and belongs to the policy
    that pulled."""

    step: int
    actions: Tensor  # [R, N]
    rewards: Tensor  # [R, N]
    expected_reward: Tensor  # [R]


def update(logits: Tensor, actions: Tensor, advantages: Tensor, learning_rate: float) -> None:
    """One step of gradient ascent on logits [R, K], in place. actions, advantages: [R, N]."""
    _check_update(logits, actions, advantages, learning_rate)
    log_probs = logits.log_softmax(-1).gather(-1, actions)
    # the loss is a mean over all runs; a run on its own would see R times that gradient
    loss = policy_gradient_loss(log_probs, advantages) * len(logits)
    (gradient,) = torch.autograd.grad(loss, logits)
    with torch.no_grad():
        logits -= learning_rate * gradient


def train(logits: Tensor, bandit: GaussianBandit, config: Config) -> Iterator[Metrics]:
    """Train softmax policies by REINFORCE; the caller plots, logs and stops.

    Args:
        logits: [R, K], one policy per run, changed in place.
        bandit: with means [K] or [R, K].
        config: the settings.
    Yields: Metrics, one per update.
    Raises: ValueError on logits that are not [R, K], an unknown baseline, a small batch.
    """
    _check(logits, bandit, config)
    logits.requires_grad_()
    generator = torch.Generator().manual_seed(config.seed)
    means = bandit.means.expand_as(logits)
    bandit = GaussianBandit(means, bandit.noise_std)
    reward_sum = torch.zeros_like(means[:, :1])
    for step in range(config.steps):
        probs = logits.detach().softmax(-1)
        expected = (probs * means).sum(-1)
        actions = torch.multinomial(probs, config.batch_size, replacement=True, generator=generator)
        rewards = bandit.pull(actions, generator)
        if config.baseline == "leave_one_out":
            advantages = leave_one_out_advantages(rewards.flatten(), config.batch_size)
            advantages = advantages.view_as(rewards)
        elif config.baseline == "running_mean":
            pulls = step * config.batch_size
            advantages = rewards - reward_sum / pulls if pulls else torch.zeros_like(rewards)
        else:
            advantages = rewards
        update(logits, actions, advantages, config.learning_rate)
        reward_sum = reward_sum + rewards.sum(-1, keepdim=True)
        yield Metrics(step, actions, rewards, expected)


def _check_update(
    logits: Tensor, actions: Tensor, advantages: Tensor, learning_rate: float
) -> None:
    floats(logits=logits, advantages=advantages)
    integers(actions=actions)
    in_range(learning_rate, "learning_rate", 0.0)
    if logits.dim() != 2 or not logits.requires_grad:
        raise ValueError(
            f"logits has shape {tuple(logits.shape)} and requires_grad={logits.requires_grad};"
            " pass [runs, arms], after logits.requires_grad_()"
        )
    for name, given in {"actions": actions, "advantages": advantages}.items():
        if given.dim() != 2 or len(given) != len(logits):
            raise ValueError(f"{name} has shape {tuple(given.shape)}; pass [{len(logits)}, pulls]")
    if actions.numel() and (actions.min() < 0 or actions.max() >= logits.shape[1]):
        raise ValueError(f"actions holds an arm outside [0, {logits.shape[1]})")


def _check(logits: Tensor, bandit: GaussianBandit, config: Config) -> None:
    floats(logits=logits)
    finite(logits, "logits")
    has(bandit, "bandit", "a GaussianBandit", "means", "noise_std")
    has(config, "config", "a reinforce.Config", *Config.__dataclass_fields__)
    check_seed(config.seed)
    if logits.dim() != 2 or logits.shape[-1] != bandit.means.shape[-1]:
        raise ValueError(
            f"logits has shape {tuple(logits.shape)}; pass [runs, {bandit.means.shape[-1]} arms]"
        )
    if bandit.means.dim() == 2 and len(bandit.means) != len(logits):
        raise ValueError(
            f"bandit has {len(bandit.means)} rows of means, logits {len(logits)} rows; make them"
            " equal"
        )
    one_of(config.baseline, BASELINES, "baseline")
    in_range(config.steps, "steps", 1)
    in_range(config.batch_size, "batch_size", 2 if config.baseline == "leave_one_out" else 1)
    in_range(config.learning_rate, "learning_rate", 0.0, open_low=True)
