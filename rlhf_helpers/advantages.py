"""From rewards to advantages: how much better each action was than expected.

Advantages and returns are targets: they never carry a gradient. The reward of a sequence sits on
its last real token, and the value after the last real token is 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_helpers._validate import (
    all_equal,
    as_float,
    as_mask,
    finite,
    in_range,
    one_of,
    same_shape,
    tensors,
)

ADVANTAGE_SCALES = ("group", "batch", "none")


@torch.no_grad()
def discounted_returns(rewards: Tensor, mask: Tensor, gamma: float = 1.0) -> Tensor:
    """Sum of discounted rewards from each token to the end of its sequence.

    Equation: eq:returns

    Args:
        rewards: [N, T].
        mask: [N, T]; 1 or True counts. What stands where it is 0 is ignored.
        gamma: discount, in [0, 1].
    Returns: [N, T]; 0 where the mask is 0; in float32 for rewards in half precision.
    Raises: ValueError on other or unequal shapes, a mask that is empty or not of 0 and 1, a reward
        that counts and is not finite, gamma outside [0, 1].
    Source: Sutton and Barto 2018, "Reinforcement Learning", equation 3.8.
    """
    in_range(gamma, "gamma", 0.0, 1.0)
    mask = _checked_mask(mask, rewards)
    rewards = as_float(rewards)
    finite(rewards, "rewards", mask)
    rewards = rewards.masked_fill(~mask, 0.0)
    return _backward_sum(rewards, mask, gamma)


@torch.no_grad()
def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation, and the returns that the value function is trained on.

    Equation: eq:gae

    λ = 0 is the one-step TD error (biased by the values, little variance); λ = 1 is the return
    minus the value (unbiased, most variance).

    Args:
        rewards: [N, T].
        values: [N, T], V(s_t) before token t. The value after the last real token is taken as 0.
        mask: [N, T]; 1 or True counts. What stands where it is 0 is ignored.
        gamma: discount, in [0, 1].
        lam: λ, in [0, 1].
    Returns: (advantages, returns), each [N, T], 0 where the mask is 0; returns = advantages +
        values. In float32 for numbers in half precision.
    Raises: ValueError on other or unequal shapes, a mask that is empty or not of 0 and 1, a counted
        reward or value that is not finite, gamma or lam outside [0, 1].
    Source: Schulman et al. 2016, "High-Dimensional Continuous Control Using GAE", equation 16.
    """
    in_range(gamma, "gamma", 0.0, 1.0)
    in_range(lam, "lam", 0.0, 1.0)
    same_shape(rewards=rewards, values=values)
    mask = _checked_mask(mask, rewards)
    rewards, values = as_float(rewards), as_float(values)
    finite(rewards, "rewards", mask)
    finite(values, "values", mask)
    rewards = rewards.masked_fill(~mask, 0.0)
    values = values.masked_fill(~mask, 0.0)
    next_values = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
    td_errors = rewards + gamma * next_values - values
    advantages = _backward_sum(td_errors, mask, gamma * lam)
    return advantages, advantages + values


def _checked_mask(mask: Tensor, rewards: Tensor) -> Tensor:
    tensors(rewards=rewards)
    if rewards.dim() != 2:
        raise ValueError(f"rewards has shape {tuple(rewards.shape)}; pass [sequences, tokens]")
    return as_mask(mask, rewards)


def _backward_sum(terms: Tensor, mask: Tensor, decay: float) -> Tensor:
    """Σ_l decay^l · terms[t + l] along the last dimension, restarted and zero where the mask is
    0."""
    sums = torch.zeros_like(terms)
    running = torch.zeros_like(terms[:, 0])
    for t in reversed(range(terms.shape[1])):
        running = (terms[:, t] + decay * running) * mask[:, t]
        sums[:, t] = running
    return sums


@torch.no_grad()
def group_relative_advantages(
    rewards: Tensor, group_size: int, scale: str = "group", eps: float = 1e-4
) -> Tensor:
    """Reward minus the mean of its group (the samples of one prompt), divided by a standard
    deviation.

    Equation: eq:group-advantages

    Args:
        rewards: [N], the samples of one prompt next to each other.
        group_size: samples per prompt; divides N.
        scale: "group" divides by the group's standard deviation, "batch" by that of all raw
            rewards, "none" by 1. Both are unbiased (n − 1). The mean that is subtracted is always
            the group's.
        eps: added to the standard deviation, ≥ 0.
    Returns: [N]; exactly 0 in a group whose rewards are all equal; in float32 for rewards in half
        precision.
    Raises: ValueError on a shape other than [N], a group size that does not divide N or is below
        2, an unknown scale, eps < 0, a reward that is not finite.
    Source: Shao et al. 2024, "DeepSeekMath", section 4.1.2; "none" is Liu et al. 2025,
        "Understanding R1-Zero-Like Training", section 3.
    """
    one_of(scale, ADVANTAGE_SCALES, "scale")
    in_range(eps, "eps", 0.0)
    grouped = _grouped(rewards, group_size)
    centred = grouped - grouped.mean(dim=1, keepdim=True)
    if scale == "group":
        centred = centred / (grouped.std(dim=1, keepdim=True) + eps)
    elif scale == "batch":
        centred = centred / (grouped.std() + eps)
    # rounding of the mean would otherwise leave a residue that a zero standard deviation blows up
    return centred.masked_fill(all_equal(grouped), 0.0).reshape(-1)


@torch.no_grad()
def leave_one_out_advantages(rewards: Tensor, group_size: int) -> Tensor:
    """Reward minus the mean reward of the other samples of its group.

    Equation: eq:leave-one-out

    The baseline of a sample does not contain the sample itself, so the policy gradient stays
    unbiased.

    Args:
        rewards: [N], the samples of one prompt next to each other.
        group_size: samples per prompt, at least 2; divides N.
    Returns: [N]; exactly 0 in a group whose rewards are all equal; in float32 for rewards in half
        precision.
    Raises: ValueError on a shape other than [N], a group size that does not divide N or is below
        2, a reward that is not finite.
    Source: Kool, van Hoof and Welling 2019, "Buy 4 REINFORCE Samples, Get a Baseline for Free!".
    """
    grouped = _grouped(rewards, group_size)
    others = (grouped.sum(dim=1, keepdim=True) - grouped) / (group_size - 1)
    # rounding would otherwise leave a residue, of which an optimizer like Adam makes full steps
    return (grouped - others).masked_fill(all_equal(grouped), 0.0).reshape(-1)


def _grouped(rewards: Tensor, group_size: int) -> Tensor:
    tensors(rewards=rewards)
    if rewards.dim() != 1 or rewards.numel() == 0:
        raise ValueError(
            f"rewards has shape {tuple(rewards.shape)}; pass a non-empty [N], one reward a sample"
        )
    in_range(group_size, "group_size", 2)  # one sample has no other to compare with
    if rewards.numel() % group_size:
        raise ValueError(
            f"group_size={group_size} does not divide the number of rewards, {rewards.numel()}"
        )
    rewards = as_float(rewards)
    finite(rewards, "rewards")
    return rewards.reshape(-1, group_size)
