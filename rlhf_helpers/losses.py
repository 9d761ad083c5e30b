"""The losses: scalars to minimise, from log-probabilities, advantages and masks."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_helpers._validate import as_mask, finite, in_range, same_shape
from rlhf_helpers.kl import kl_estimate
from rlhf_helpers.logprobs import masked_mean


class PolicyLoss(NamedTuple):
    """A policy loss and the two numbers to watch beside it (they carry no gradient)."""

    loss: Tensor
    clip_fraction: Tensor
    approx_kl: Tensor


def policy_gradient_loss(
    log_probs: Tensor, advantages: Tensor, mask: Tensor | None = None
) -> Tensor:
    """The loss whose gradient is minus the policy-gradient estimate: −mean(A · log π(a)).

    Equation: eq:policy-gradient

    Its value means nothing; its gradient does. Advantages are treated as constants.

    Args:
        log_probs: log π(a) of the sampled actions, any shape, nats.
        advantages: the same shape (plain rewards are the advantages of a zero baseline).
        mask: the same shape; 1 or True counts; None counts all.
    Returns: a scalar.
    Raises: ValueError on unequal shapes, an empty mask, a counted advantage that is not finite.
    Source: Williams 1992, "Simple Statistical Gradient-Following Algorithms for Connectionist
        Reinforcement Learning", section 4 (REINFORCE).
    """
    same_shape(log_probs=log_probs, advantages=advantages)
    mask = as_mask(mask, log_probs)
    finite(advantages, "advantages", mask)
    log_probs = log_probs.masked_fill(~mask, 0.0)
    return -masked_mean(advantages.detach() * log_probs, mask)


def ppo_clip_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    clip: float = 0.2,
    clip_high: float | None = None,
    dual_clip: float | None = None,
) -> PolicyLoss:
    """PPO's clipped objective, negated: −mean(min(ρ·A, clip(ρ, 1 − ε, 1 + ε)·A)) with the ratio ρ
    = π(a)/π_old(a).

    Equation: eq:ppo-clip, eq:dual-clip

    The minimum is the pessimistic of the two. Clipping removes the incentive to move further; it
    does not hold the ratio inside the interval. For A < 0 and a large ratio nothing is clipped,
    unless `dual_clip` bounds it.

    Args:
        log_probs: log π(a) under the policy being trained, any shape, nats.
        old_log_probs: log π_old(a) under the policy that sampled, the same shape; a constant.
        advantages: the same shape; constants.
        mask: the same shape; 1 or True counts; None counts all.
        clip: ε, > 0 (and the lower bound is 1 − ε); math.inf turns clipping off.
        clip_high: another ε for the upper bound 1 + ε; None means `clip`.
        dual_clip: c > 1: for A < 0 the term is max(min(ρ·A, clip(ρ)·A), c·A); None turns it off.
    Returns: PolicyLoss(loss, clip_fraction, approx_kl), scalars. clip_fraction is the share of
        entries whose gradient the clip has cut (ρ > 1 + ε with A > 0, or ρ < 1 − ε with A < 0);
        approx_kl is the mean of ρ − 1 − log ρ.
    Raises: ValueError on unequal shapes, an empty mask, a counted advantage that is not finite,
        clip ≤ 0, clip_high ≤ 0, dual_clip ≤ 1.
    Source: Schulman et al. 2017, "Proximal Policy Optimization Algorithms", equation 7; dual clip:
        Ye et al. 2020, "Mastering Complex Control in MOBA Games with Deep Reinforcement Learning";
        clip_high: Yu et al. 2025, "DAPO", section 3.1.
    """
    clip_high = clip if clip_high is None else clip_high
    in_range(clip, "clip", 0.0, open_low=True)
    in_range(clip_high, "clip_high", 0.0, open_low=True)
    same_shape(log_probs=log_probs, old_log_probs=old_log_probs, advantages=advantages)
    mask = as_mask(mask, log_probs)
    finite(advantages, "advantages", mask)
    advantages = advantages.detach().masked_fill(~mask, 0.0)
    log_ratio = (log_probs - old_log_probs.detach()).masked_fill(~mask, 0.0)
    # past this the exponential overflows, and 0 · inf would turn a finite loss or gradient into NaN
    log_ratio = log_ratio.clamp(max=0.99 * math.log(torch.finfo(log_ratio.dtype).max))

    ratio = log_ratio.exp()
    clipped_ratio = ratio.clamp(1.0 - clip, 1.0 + clip_high)
    objective = torch.minimum(ratio * advantages, clipped_ratio * advantages)
    if dual_clip is not None:
        in_range(dual_clip, "dual_clip", 1.0, open_low=True)
        objective = torch.where(
            advantages < 0, torch.maximum(objective, dual_clip * advantages), objective
        )
    loss = -masked_mean(objective, mask)

    with torch.no_grad():
        cut = ((ratio > 1.0 + clip_high) & (advantages > 0)) | (
            (ratio < 1.0 - clip) & (advantages < 0)
        )
        clip_fraction = masked_mean(cut.to(ratio.dtype), mask)
        # KL(π_old‖π) from actions that π_old sampled
        approx_kl = masked_mean(kl_estimate(torch.zeros_like(log_ratio), log_ratio, "k3"), mask)
    return PolicyLoss(loss, clip_fraction, approx_kl)


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor | None = None,
    clip: float | None = None,
) -> Tensor:
    """Half the squared error of the value function, optionally the worse of the moved and the
    clipped prediction.

    Equation: eq:value-loss

    Args:
        values: V(s_t) being trained, any shape.
        old_values: V(s_t) at the rollout, the same shape; a constant.
        returns: the targets, the same shape; constants.
        mask: the same shape; 1 or True counts; None counts all.
        clip: how far V may move from old_values, in units of the return, > 0; None turns it off.
    Returns: a scalar.
    Raises: ValueError on unequal shapes, an empty mask, a counted return that is not finite, clip
        ≤ 0.
    Source: Huang et al. 2022, "The 37 Implementation Details of PPO", core detail 9; the clip goes
        back to OpenAI Baselines.
    """
    same_shape(values=values, old_values=old_values, returns=returns)
    mask = as_mask(mask, values)
    finite(returns, "returns", mask)
    values = values.masked_fill(~mask, 0.0)
    returns = returns.detach().masked_fill(~mask, 0.0)
    error = (values - returns).square()
    if clip is not None:
        in_range(clip, "clip", 0.0, open_low=True)
        old_values = old_values.detach().masked_fill(~mask, 0.0)
        moved = old_values + (values - old_values).clamp(-clip, clip)
        error = torch.maximum(error, (moved - returns).square())
    return 0.5 * masked_mean(error, mask)
