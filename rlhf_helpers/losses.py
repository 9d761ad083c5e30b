"""The losses: scalars to minimise, from log-probabilities, advantages and masks, or from the scores
of responses that were compared.

Half precision is computed in float32, and so is the loss. A mask holds booleans, or 1 for what
counts and 0 for what does not; other numbers are refused.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf_helpers._validate import (
    as_float,
    as_mask,
    finite,
    in_range,
    one_of,
    same_shape,
    tensors,
    true_or_false,
    zero_or_one,
)
from rlhf_helpers.kl import kl_estimate
from rlhf_helpers.logprobs import masked_mean

DPO_VARIANTS = ("sigmoid", "robust", "ipo", "hinge")
GRPO_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo")
IMPORTANCE = ("token", "sequence")


class PolicyLoss(NamedTuple):
    """A policy loss and the two numbers to watch beside it (they carry no gradient)."""

    loss: Tensor
    clip_fraction: Tensor
    approx_kl: Tensor


class PreferenceLoss(NamedTuple):
    """A loss on pairs and the implicit rewards of the two sides, [N] each (without a gradient)."""

    loss: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor


def policy_gradient_loss(
    log_probs: Tensor, advantages: Tensor, mask: Tensor | None = None
) -> Tensor:
    """The loss whose gradient is minus the policy-gradient estimate: −mean(A · log π(a)).

    Equation: eq:policy-gradient

    Only its gradient has a meaning. Advantages are treated as constants.

    Args:
        log_probs: log π(a) of the sampled actions, any shape, nats.
        advantages: the same shape (plain rewards are the advantages of a zero baseline).
        mask: the same shape; 1 or True counts; None counts all.
    Returns: a scalar.
    Raises: ValueError on unequal shapes, a mask that is empty or not of 0 and 1, a counted
        advantage that is not finite.
    Source: Williams 1992, "Simple Statistical Gradient-Following Algorithms for Connectionist
        Reinforcement Learning", section 4 (REINFORCE).
    """
    same_shape(log_probs=log_probs, advantages=advantages)
    mask = as_mask(mask, log_probs)
    finite(advantages, "advantages", mask)
    log_probs = as_float(log_probs).masked_fill(~mask, 0.0)
    return -masked_mean(as_float(advantages).detach() * log_probs, mask)


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
        approx_kl is the mean of ρ − 1 − log ρ. A ratio that would overflow counts as the largest
        that does not; its gradient goes on.
    Raises: ValueError on unequal shapes, a mask that is empty or not of 0 and 1, a counted
        advantage that is not finite, clip ≤ 0, clip_high ≤ 0, dual_clip ≤ 1.
    Source: Schulman et al. 2017, "Proximal Policy Optimization Algorithms", equation 7; dual clip:
        Ye et al. 2020, "Mastering Complex Control in MOBA Games with Deep Reinforcement Learning";
        clip_high: Yu et al. 2025, "DAPO", section 3.1.
    """
    clip_high = clip if clip_high is None else clip_high
    in_range(clip, "clip", 0.0, open_low=True, infinite=True)
    in_range(clip_high, "clip_high", 0.0, open_low=True, infinite=True)
    same_shape(log_probs=log_probs, old_log_probs=old_log_probs, advantages=advantages)
    mask = as_mask(mask, log_probs)
    finite(advantages, "advantages", mask)
    advantages = as_float(advantages).detach().masked_fill(~mask, 0.0)
    log_ratio = as_float(log_probs) - as_float(old_log_probs).detach()
    log_ratio = _bounded(log_ratio.masked_fill(~mask, 0.0))

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


def _bounded(log_ratio: Tensor) -> Tensor:
    """The log-ratio, held where its exponential is finite: 0 · inf would turn a finite loss or
    gradient into NaN. Its gradient is not held."""
    most = torch.finfo(log_ratio.dtype).max
    highest = 0.99 * math.log(most)
    log_ratio = log_ratio.clamp(max=most)
    held = highest + (log_ratio - log_ratio.detach())
    return torch.where(log_ratio > highest, held, log_ratio)


def grpo_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip: float = 0.2,
    clip_high: float | None = None,
    ref_log_probs: Tensor | None = None,
    beta: float = 0.0,
    loss_type: str = "grpo",
    importance: str = "token",
    max_completion_length: int | None = None,
    bias_correct_kl: bool = False,
) -> PolicyLoss:
    """The clipped loss of PPO, with an advantage for each sequence, a choice of how tokens are
    weighed, and the KL to a reference in the loss.

    Equation: eq:grpo-loss

    A weight on a token is a factor of its advantage, so this is `ppo_clip_loss` with other
    advantages. "grpo" takes the mean over the tokens of each sequence, then over sequences: a token
    of a long sequence counts less. "bnpo" and "dapo" take the mean over all tokens of the batch
    (they differ where a batch is split over micro-batches or processes). "dr_grpo" divides the sum
    by N times a constant length.

    Args:
        log_probs: log π(a) under the policy being trained, [N, T], nats.
        old_log_probs: log π_old(a) under the policy that sampled, [N, T]; a constant.
        advantages: [N], or [N, T]; constants.
        mask: [N, T]; 1 or True counts.
        clip, clip_high: as in `ppo_clip_loss`.
        ref_log_probs: log π_ref(a), [N, T]; needed if beta > 0; a constant.
        beta: β ≥ 0 of the KL term, the estimate k3 of each token.
        loss_type: "grpo", "bnpo", "dr_grpo" or "dapo".
        importance: "token" for the ratio of each token, "sequence" for that of the whole sequence
            to the power of one over its length.
        max_completion_length: the constant length of "dr_grpo"; None means T.
        bias_correct_kl: multiply k3 by the ratio, which makes its gradient that of KL(π‖π_ref).
    Returns: PolicyLoss as `ppo_clip_loss`; the loss contains the KL term.
    Raises: ValueError on other or unequal shapes, a mask that is empty or not of 0 and 1, a counted
        advantage that is not finite, settings out of range, an unknown loss_type or importance,
        beta > 0 without ref_log_probs.
    Source: Shao et al. 2024, "DeepSeekMath", equation 3; "dr_grpo": Liu et al. 2025, "Understanding
        R1-Zero-Like Training", section 3; "dapo": Yu et al. 2025, "DAPO", section 3; "sequence":
        Zheng et al. 2025, "Group Sequence Policy Optimization", equation 7; bias correction:
        DeepSeek-AI 2025, "DeepSeek-V3.2", equation 7. Normalised as in TRL 1.16.
    """
    one_of(loss_type, GRPO_TYPES, "loss_type")
    one_of(importance, IMPORTANCE, "importance")
    in_range(beta, "beta", 0.0)
    true_or_false(bias_correct_kl, "bias_correct_kl")
    same_shape(log_probs=log_probs, old_log_probs=old_log_probs, ref_log_probs=ref_log_probs)
    if log_probs.dim() != 2:
        raise ValueError(f"log_probs has shape {tuple(log_probs.shape)}; pass [sequences, tokens]")
    mask = as_mask(mask, log_probs)
    advantages = _by_token(advantages, log_probs)
    lengths = mask.sum(1, keepdim=True).clamp(min=1)
    # what stands under the mask would reach the gradient through the log-ratios
    parts = (log_probs, old_log_probs.detach())
    log_probs, old_log_probs = (as_float(x).masked_fill(~mask, 0.0) for x in parts)
    log_ratio = log_probs - old_log_probs
    if importance == "sequence":
        log_ratio = (log_ratio.sum(1, keepdim=True) / lengths).expand_as(mask)
    weights = torch.ones_like(log_ratio)
    if loss_type == "grpo":
        weights = weights * mask.sum() / (len(mask) * lengths)
    elif loss_type == "dr_grpo":
        constant = mask.shape[1] if max_completion_length is None else max_completion_length
        in_range(constant, "max_completion_length", 1)
        weights = weights * mask.sum() / (len(mask) * constant)
    zero = torch.zeros_like(log_ratio)
    found = ppo_clip_loss(log_ratio, zero, weights * advantages, mask, clip, clip_high)
    if beta == 0.0:
        return found
    if ref_log_probs is None:
        raise ValueError("beta is above 0, so ref_log_probs is needed; pass it, or beta=0.0")
    ref_log_probs = as_float(ref_log_probs).detach().masked_fill(~mask, 0.0)
    kl = kl_estimate(log_probs, ref_log_probs)
    if bias_correct_kl:
        log_product = ref_log_probs - old_log_probs  # exact, and without a gradient
        if importance == "sequence":
            log_product = log_ratio + ref_log_probs - log_probs
        kl = _corrected_kl(log_probs, ref_log_probs, log_ratio, log_product)
    return found._replace(loss=found.loss + beta * masked_mean(weights * kl, mask))


def _corrected_kl(
    log_probs: Tensor, ref_log_probs: Tensor, log_ratio: Tensor, log_product: Tensor
) -> Tensor:
    """The estimate k3 of each token times the ratio ρ, also where k3 overflows and ρ is 0.

    With d = log π_ref − log π it is ρ·(e^d − 1 − d) = ρ·e^d − ρ·(1 + d); the logarithm of ρ·e^d is
    `log_product`.
    """
    d = ref_log_probs - log_probs
    ratio = _bounded(log_ratio).exp()
    far = d.detach() > 20.0  # where nothing cancels any more
    near = kl_estimate(log_probs, torch.where(far, log_probs, ref_log_probs)) * ratio
    product = torch.where(far, log_product, 0.0).exp()
    return torch.where(far, product - ratio * (1.0 + d), near)


def _by_token(advantages: Tensor, like: Tensor) -> Tensor:
    """Advantages [N] or [N, T] as [N, T]."""
    tensors(advantages=advantages)
    if advantages.shape == like.shape[:1]:
        return advantages[:, None].expand_as(like)
    if advantages.shape != like.shape:
        raise ValueError(
            f"advantages has shape {tuple(advantages.shape)}; pass {tuple(like.shape[:1])} or "
            f"{tuple(like.shape)}"
        )
    return advantages


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
    Raises: ValueError on unequal shapes, a mask that is empty or not of 0 and 1, a counted return
        that is not finite, clip ≤ 0.
    Source: Huang et al. 2022, "The 37 Implementation Details of PPO", core detail 9; the clip goes
        back to OpenAI Baselines.
    """
    same_shape(values=values, old_values=old_values, returns=returns)
    mask = as_mask(mask, values)
    finite(returns, "returns", mask)
    values = as_float(values).masked_fill(~mask, 0.0)
    returns = as_float(returns).detach().masked_fill(~mask, 0.0)
    error = (values - returns).square()
    if clip is not None:
        in_range(clip, "clip", 0.0, open_low=True)
        old_values = as_float(old_values).detach().masked_fill(~mask, 0.0)
        moved = old_values + (values - old_values).clamp(-clip, clip)
        error = torch.maximum(error, (moved - returns).square())
    return 0.5 * masked_mean(error, mask)


def bradley_terry_loss(
    chosen_scores: Tensor,
    rejected_scores: Tensor,
    margin: Tensor | float | None = None,
    preference: Tensor | float | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of the labels under P(chosen preferred) = σ(z), where z is the difference of
    the two scores, less the margin.

    Equation: eq:bradley-terry

    Only differences of scores matter: a constant added to all of them changes nothing. The score
    is a free number, not a log-probability of a language model.

    Args:
        chosen_scores: score of the response that was chosen, any shape.
        rejected_scores: score of the other one, the same shape.
        margin: how far apart the two scores should be at least; the same shape or one number;
            None means 0.
        preference: the label, P(chosen preferred) in [0, 1]; the same shape or one number; None
            means 1. A pair that was called equal has 0.5.
        weight: of each pair, ≥ 0, the same shape; None weighs all the same.
    Returns: a scalar, nats a pair.
    Raises: ValueError on unequal shapes, no pairs, a number that is not finite, a preference
        outside [0, 1], a weight below 0, weights that are all 0.
    Source: Bradley and Terry 1952, "Rank Analysis of Incomplete Block Designs"; as a loss:
        Ouyang et al. 2022, "Training language models to follow instructions with human feedback",
        section 3.5; margin: Touvron et al. 2023, "Llama 2", section 3.2.2.
    """
    same_shape(chosen_scores=chosen_scores, rejected_scores=rejected_scores, weight=weight)
    _check_scores(chosen_scores=chosen_scores, rejected_scores=rejected_scores)
    z = as_float(chosen_scores) - as_float(rejected_scores)
    if margin is not None:
        z = z - _label(margin, "margin", z)
    losses = -logsigmoid(z)
    if preference is not None:
        preference = _label(preference, "preference", z)
        in_range(preference.min().item(), "preference", 0.0, 1.0)
        in_range(preference.max().item(), "preference", 0.0, 1.0)
        losses = preference * losses - (1.0 - preference) * logsigmoid(-z)
    if weight is None:
        return losses.mean()
    weight = _label(weight, "weight", z)
    in_range(weight.min().item(), "weight", 0.0)
    in_range(weight.sum().item(), "sum of weight", 0.0, open_low=True)
    return (weight * losses).sum() / weight.sum()


def plackett_luce_loss(scores: Tensor) -> Tensor:
    """−log P(ranking): the first is chosen among all, the second among the rest, and so on, each
    with a probability proportional to the exponential of its score.

    Equation: eq:plackett-luce

    With two responses it is the Bradley-Terry loss.

    Args:
        scores: [N, K], N rankings of K ≥ 2 responses, best first.
    Returns: a scalar, nats a ranking (not a pair).
    Raises: ValueError on another shape, no rankings, a score that is not finite.
    Source: Plackett 1975, "The Analysis of Permutations"; Rafailov et al. 2023, "Direct Preference
        Optimization", appendix A.3.
    """
    tensors(scores=scores)
    if scores.dim() != 2 or scores.shape[1] < 2:
        raise ValueError(
            f"scores has shape {tuple(scores.shape)}; pass [N, K] with K ≥ 2, best first"
        )
    _check_scores(scores=scores)
    scores = as_float(scores)
    # logcumsumexp would do it in one call, but its gradient is off in the fifth digit for large
    # scores
    left = [scores[:, k:].logsumexp(1) for k in range(scores.shape[1])]
    return (torch.stack(left, 1) - scores).sum(1).mean()


def rao_kupper_loss(
    scores_a: Tensor, scores_b: Tensor, outcome: Tensor, threshold: Tensor | float
) -> Tensor:
    """−log P(outcome) when a comparison may end in a tie: the better one wins only if it is felt
    to be better by more than a threshold.

    Equation: eq:rao-kupper

    A win has the probability that Bradley-Terry gives with the threshold as margin; at threshold 0
    nothing ties and this is the Bradley-Terry loss. A tie is not half a win: it says that the
    scores are close.

    Args:
        scores_a: score of the first response, any shape.
        scores_b: score of the second, the same shape.
        outcome: 1 where the first won, 0 where the second won, 0.5 for a tie; the same shape.
        threshold: ζ ≥ 0, in units of score; a tensor of one number can be trained.
    Returns: a scalar, nats a comparison.
    Raises: ValueError on unequal shapes, no comparisons, a score that is not finite, another
        outcome, a negative threshold or more than one, a tie at threshold 0.
    Source: Rao and Kupper 1967, "Ties in Paired-Comparison Experiments: A Generalization of the
        Bradley-Terry Model".
    """
    same_shape(scores_a=scores_a, scores_b=scores_b, outcome=outcome)
    _check_scores(scores_a=scores_a, scores_b=scores_b)
    tensors(outcome=outcome)
    ties = outcome == 0.5
    if not (ties | (outcome == 0) | (outcome == 1)).all():
        raise ValueError("outcome must be 1 (the first won), 0 (the second) or 0.5 (a tie)")
    z = as_float(scores_a) - as_float(scores_b)
    if isinstance(threshold, Tensor) and threshold.numel() != 1:
        raise ValueError(f"threshold has shape {tuple(threshold.shape)}; pass one number")
    in_range(threshold.item() if isinstance(threshold, Tensor) else threshold, "threshold", 0.0)
    threshold = torch.as_tensor(threshold, dtype=z.dtype, device=z.device)
    if ties.any() and threshold == 0:
        raise ValueError("threshold=0 makes ties impossible, but outcome holds one; raise it")
    log_probs = (outcome >= 0.5) * logsigmoid(z - threshold)
    log_probs = log_probs + (outcome <= 0.5) * logsigmoid(-z - threshold)
    if ties.any():
        # log(e^2ζ − 1), which overflows where ζ is large
        log_probs = log_probs + ties * (2.0 * threshold + (-torch.expm1(-2.0 * threshold)).log())
    return -log_probs.mean()


def dpo_loss(
    chosen_log_probs: Tensor,
    rejected_log_probs: Tensor,
    ref_chosen_log_probs: Tensor,
    ref_rejected_log_probs: Tensor,
    beta: float = 0.1,
    variant: str = "sigmoid",
    label_smoothing: float | Tensor = 0.0,
) -> PreferenceLoss:
    """The loss of direct preference optimisation: the policy's log-ratio to the reference, times β,
    takes the place of a reward model's score.

    Equation: eq:dpo-loss, eq:ipo-loss

    "sigmoid" is the Bradley-Terry loss of those implicit rewards. "robust" is the combination of
    the loss of the label as it is and of the turned label whose mean over labels of which a share ε
    is wrong is the "sigmoid" loss of the right ones: ((1 − ε)·ℓ(z) − ε·ℓ(−z))/(1 − 2ε). "ipo" is
    the squared distance of the difference of log-ratios from 1/(2β), of whole sequences, as in the
    paper (TRL 1.16 divides by the lengths first). "hinge" is max(0, 1 − the difference of the
    implicit rewards).

    Args:
        chosen_log_probs, rejected_log_probs: log π(y|x), summed over the tokens of the response,
            [N], nats.
        ref_chosen_log_probs, ref_rejected_log_probs: the same under π_ref, [N]; constants.
        beta: β > 0. In "ipo" τ of the paper, in the others the price of a nat.
        variant: "sigmoid", "robust", "ipo" or "hinge".
        label_smoothing: share of the labels that are taken to be wrong, one number or one a pair,
            [N]. "sigmoid": in [0, 1]; up to ½ it makes the loss conservative; one a pair, it is
            1 − P(chosen preferred), where several people were asked. "robust": ε, in [0, ½).
    Returns: PreferenceLoss; the loss is a scalar, the mean over pairs.
    Raises: ValueError on other or unequal shapes (log-probabilities that are not summed, say), no
        pairs, a log-probability that is not finite, beta ≤ 0, an unknown variant, a label smoothing
        out of range or with "ipo" or "hinge".
    Source: Rafailov et al. 2023, "Direct Preference Optimization", equation 7; "ipo": Azar et al.
        2023, "A General Theoretical Paradigm to Understand Learning from Human Preferences",
        equation 17; "hinge": Liu et al. 2024, "Statistical Rejection Sampling Improves Preference
        Optimization" (RSO), section 3.3, after Zhao et al. 2023, "SLiC-HF", whose hinge is of
        log-probabilities without a reference; "robust": Chowdhury et al. 2024, "Provably Robust
        DPO"; label smoothing: Mitchell 2023, "A note on DPO with noisy preferences".
    """
    reference = {
        "ref_chosen_log_probs": ref_chosen_log_probs,
        "ref_rejected_log_probs": ref_rejected_log_probs,
    }
    _check_pairs(chosen_log_probs, rejected_log_probs, **reference)
    chosen_log_probs, rejected_log_probs = as_float(chosen_log_probs), as_float(rejected_log_probs)
    ref_chosen, ref_rejected = (as_float(each).detach() for each in reference.values())
    in_range(beta, "beta", 0.0, open_low=True)
    one_of(variant, DPO_VARIANTS, "variant")
    smoothing = _label(label_smoothing, "label_smoothing", chosen_log_probs)
    if variant in ("ipo", "hinge") and smoothing.any():
        raise ValueError(
            f'label_smoothing works with variant="sigmoid" and "robust", not {variant!r}'
        )
    chosen = beta * (chosen_log_probs - ref_chosen)
    rejected = beta * (rejected_log_probs - ref_rejected)
    difference = chosen - rejected
    if variant == "sigmoid":
        in_range(smoothing.min().item(), "label_smoothing", 0.0, 1.0)
        in_range(smoothing.max().item(), "label_smoothing", 0.0, 1.0)
        loss = bradley_terry_loss(chosen, rejected, preference=1.0 - smoothing)
    elif variant == "robust":
        in_range(smoothing.min().item(), "label_smoothing", 0.0)
        in_range(0.5 - smoothing.max().item(), "½ − label_smoothing", 0.0, open_low=True)
        right, wrong = -logsigmoid(difference), -logsigmoid(-difference)
        loss = (((1.0 - smoothing) * right - smoothing * wrong) / (1.0 - 2.0 * smoothing)).mean()
    elif variant == "ipo":
        loss = (difference / beta - 0.5 / beta).square().mean()
    else:
        loss = (1.0 - difference).relu().mean()
    return PreferenceLoss(loss, chosen.detach(), rejected.detach())


def simpo_loss(
    chosen_log_probs: Tensor,
    rejected_log_probs: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    beta: float = 2.0,
    gamma: float = 0.5,
) -> Tensor:
    """Preference loss without a reference: the score of a response is β times its mean
    log-probability a token, and the chosen one should be ahead by γ.

    Equation: eq:simpo-loss

    Args:
        chosen_log_probs, rejected_log_probs: log π(y|x), summed over the tokens, [N], nats.
        chosen_lengths, rejected_lengths: how many tokens those are, [N], ≥ 1.
        beta: β > 0.
        gamma: γ, how far ahead the chosen one should be, in units of the score (not of β, as in
            some code).
    Returns: a scalar, nats a pair.
    Raises: ValueError on other or unequal shapes, no pairs, a log-probability that is not finite, a
        length below 1, beta ≤ 0, a gamma that is not finite.
    Source: Meng et al. 2024, "SimPO: Simple Preference Optimization with a Reference-Free Reward",
        equation 6.
    """
    lengths = {"chosen_lengths": chosen_lengths, "rejected_lengths": rejected_lengths}
    _check_pairs(chosen_log_probs, rejected_log_probs, **lengths)
    in_range(beta, "beta", 0.0, open_low=True)
    in_range(gamma, "gamma", -math.inf)
    for name, values in lengths.items():
        in_range(values.min().item(), name, 1.0)
    chosen = beta * as_float(chosen_log_probs) / chosen_lengths
    rejected = beta * as_float(rejected_log_probs) / rejected_lengths
    return bradley_terry_loss(chosen, rejected, margin=gamma)


def kto_loss(
    log_probs: Tensor, ref_log_probs: Tensor, desirable: Tensor, kl: Tensor | float, beta: float
) -> Tensor:
    """Loss for single responses that were called good or bad, without a partner: the implicit
    reward of a good one should be above β·KL, that of a bad one below.

    Equation: eq:kto-loss

    Args:
        log_probs: log π(y|x), summed over the tokens of the response, [N], nats.
        ref_log_probs: the same under π_ref, [N]; constants.
        desirable: [N], True (or 1) where the response was called good.
        kl: z₀ ≥ 0, what a log-ratio is measured from, one number; a constant. In the paper an
            estimate of KL(π‖π_ref): the mean log-ratio of responses to other prompts, 0 at least.
        beta: β > 0.
    Returns: a scalar, the mean of 1 − σ(±(β·log-ratio − β·kl)); between 0 and 1.
    Raises: ValueError on other or unequal shapes, no responses, a log-probability that is not
        finite, a desirable that is not 0 or 1, kl < 0, beta ≤ 0.
    Source: Ethayarajh et al. 2024, "KTO: Model Alignment as Prospect Theoretic Optimization",
        equation 8, with both weights 1.
    """
    same_shape(log_probs=log_probs, ref_log_probs=ref_log_probs, desirable=desirable)
    if log_probs.dim() != 1:
        raise ValueError(
            f"log_probs has shape {tuple(log_probs.shape)}; pass [N], summed over the tokens of"
            " each response"
        )
    _check_scores(log_probs=log_probs, ref_log_probs=ref_log_probs)
    good = zero_or_one(desirable, "desirable")
    in_range(beta, "beta", 0.0, open_low=True)
    kl = _label(kl, "kl", as_float(log_probs))
    in_range(kl.min().item(), "kl", 0.0)
    above = beta * (as_float(log_probs) - as_float(ref_log_probs).detach() - kl)
    return torch.where(good, torch.sigmoid(-above), torch.sigmoid(above)).mean()


def _check_pairs(chosen_log_probs: Tensor, rejected_log_probs: Tensor, **others: Tensor) -> None:
    log_probs = {"chosen_log_probs": chosen_log_probs, "rejected_log_probs": rejected_log_probs}
    same_shape(**log_probs, **others)
    if chosen_log_probs.dim() != 1:
        raise ValueError(
            f"chosen_log_probs has shape {tuple(chosen_log_probs.shape)}; pass [N], summed over the"
            " tokens of each response"
        )
    _check_scores(**log_probs, **others)


def _check_scores(**scores: Tensor) -> None:
    tensors(**scores)
    for name, values in scores.items():
        if values.numel() == 0:
            raise ValueError(f"{name} is empty; pass at least one")
        finite(values, name)


def _label(value: Tensor | float, name: str, like: Tensor) -> Tensor:
    """A constant of the shape of `like`, from one such or from one number."""
    if isinstance(value, Tensor):
        tensors(**{name: value})
    else:
        in_range(value, name, -math.inf)
    value = torch.as_tensor(value, dtype=like.dtype, device=like.device).detach()
    value = value.expand_as(like) if value.dim() == 0 else value
    if value.shape != like.shape:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}, the scores {tuple(like.shape)}; make them"
            " equal"
        )
    finite(value, name)
    return value
