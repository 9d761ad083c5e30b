"""How far one policy is from another: exact KL, its estimates from samples, and a controller for
its coefficient.

Everywhere KL means KL(π‖π_ref), in nats, with samples from π; the log-ratio is log π − log π_ref.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rlhf_helpers._validate import as_float, in_range, one_of, same_shape

KL_KINDS = ("k1", "k2", "k3", "abs")


def kl_estimate(log_probs: Tensor, ref_log_probs: Tensor, kind: str = "k3") -> Tensor:
    """Per-token estimate of KL(π‖π_ref) from tokens sampled from π.

    Equation: eq:kl-estimators

    With d = log π(a|s) − log π_ref(a|s): k1 = d, k2 = d²/2, k3 = exp(−d) − 1 + d, abs = |d|. For
    samples from π, k1 and k3 are unbiased; k2 and abs are not. The gradient of an estimate is
    another matter than its value: in the loss, k1 has expected gradient zero, k2 that of
    KL(π‖π_ref), k3 that of KL(π_ref‖π).

    Args:
        log_probs, ref_log_probs: [..., T], nats, of the same sampled tokens.
        kind: "k1", "k2", "k3" or "abs".
    Returns: [..., T], nats; float32 or, for float64 log-probabilities, float64.
    Raises: ValueError on an unknown kind or unequal shapes.
    Source: Schulman 2020, "Approximating KL Divergence".
    """
    one_of(kind, KL_KINDS, "kind")
    same_shape(log_probs=log_probs, ref_log_probs=ref_log_probs)
    d = as_float(log_probs) - as_float(ref_log_probs)
    if kind == "k1":
        return d
    if kind == "k2":
        return 0.5 * d.square()
    if kind == "abs":
        return d.abs()
    return _ratio_minus_one_minus_log(-d)


def _ratio_minus_one_minus_log(log_ratio: Tensor) -> Tensor:
    """exp(x) − 1 − x for a log-ratio x, exact also where x is tiny and the terms cancel; never
    negative."""
    # below the fourth root of the precision the dropped terms of the series are smaller than
    # rounding
    small = log_ratio.detach().abs() < torch.finfo(log_ratio.dtype).eps ** 0.25
    near = torch.where(small, log_ratio, torch.zeros_like(log_ratio))
    far = torch.where(small, torch.ones_like(log_ratio), log_ratio)
    series = near.square() * (0.5 + near * (1 / 6 + near * (1 / 24 + near / 120)))
    return torch.where(small, series, torch.expm1(far) - far)


def exact_kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """KL(softmax(logits)‖softmax(ref_logits)) at each position, by summing over the whole
    vocabulary.

    Equation: eq:kl

    Args:
        logits, ref_logits: [N, T, V] (any leading shape works). −inf means probability zero.
    Returns: [N, T], nats, ≥ 0 up to rounding; +inf where π gives mass to what π_ref cannot
        produce. Float32 or, for float64 logits, float64.
    Raises: ValueError on unequal shapes, or without a vocabulary.
    Source: Kullback and Leibler 1951, "On Information and Sufficiency".
    """
    same_shape(logits=logits, ref_logits=ref_logits)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(
            f"logits has shape {tuple(logits.shape)}; the last dimension must be the vocabulary"
        )
    log_probs, ref_log_probs = (as_float(x).log_softmax(-1) for x in (logits, ref_logits))
    probs = log_probs.exp()
    impossible = probs == 0
    log_ratio = log_probs.masked_fill(impossible, 0.0) - ref_log_probs.masked_fill(impossible, 0.0)
    return (probs * log_ratio).sum(-1)


class AdaptiveKLController:
    """Raises the KL coefficient when the measured KL is above its target, lowers it when it is
    below.

    Equation: eq:adaptive-kl

    The relative error is clipped to ±0.2, so one surprising batch cannot throw the coefficient.

    Args:
        coefficient: the starting value of β, > 0.
        target: the KL to hold, in nats (a sequence's sum over its tokens, averaged over
            sequences), > 0.
        horizon: how many samples it takes to react, > 0.
    Raises: ValueError on a value that is not positive.
    Source: Ziegler et al. 2019, "Fine-Tuning Language Models from Human Preferences", section 2.2.
    """

    def __init__(
        self, coefficient: float = 0.2, target: float = 6.0, horizon: int = 10_000
    ) -> None:
        in_range(coefficient, "coefficient", 0.0, open_low=True)
        in_range(target, "target", 0.0, open_low=True)
        in_range(horizon, "horizon", 0.0, open_low=True)
        self.coefficient = float(coefficient)
        self.target = float(target)
        self.horizon = float(horizon)

    def update(self, kl: float, num_steps: int) -> float:
        """Move the coefficient after `num_steps` samples whose mean KL was `kl` nats; returns the
        new coefficient.

        Raises: ValueError if kl is NaN or infinite, or num_steps is no whole number in [1, horizon
            / 0.2), beyond which one update could turn the coefficient negative; the coefficient
            then stays as it was.
        """
        in_range(kl, "kl", -math.inf)
        in_range(num_steps, "num_steps", 1)
        if not num_steps < self.horizon / 0.2:
            raise ValueError(
                f"num_steps={num_steps} must lie in [1, {self.horizon / 0.2:g}); raise horizon"
            )
        error = min(max(float(kl) / self.target - 1.0, -0.2), 0.2)
        self.coefficient *= 1.0 + error * int(num_steps) / self.horizon
        return self.coefficient
