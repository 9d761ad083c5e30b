"""Checks of the exercises of dpo_derivation."""

from __future__ import annotations

import math

from torch import Tensor

from rlhf_helpers.book.checks.judge import Function, judge, judge_number, vector


def check_best_policy(answer: Function) -> None:
    """Exercise 1: answer(ref_probs [Y], rewards [Y], beta) -> probabilities of the best policy,
    [Y]."""

    def right(ref: Tensor, rewards: Tensor, beta: float) -> Tensor:
        return (ref.log() + rewards / beta).softmax(0)

    judge(
        answer,
        right,
        [
            (vector([0.5, 0.25, 0.25]), vector([1.0, 0.0, 2.0]), 1.0),
            (vector([0.7, 0.1, 0.2]), vector([-1.0, 0.5, 0.0]), 0.5),
        ],
        {
            "these do not sum to 1: divide by the sum.": lambda ref, r, b: ref * (r / b).exp(),
            "the reference is missing: this is the softmax of the rewards alone.": (
                lambda ref, r, b: (r / b).softmax(0)
            ),
            "the rewards are multiplied by beta; a high price must make them count less.": (
                lambda ref, r, b: right(ref, r, 1 / b)
            ),
            "beta is missing.": lambda ref, r, b: right(ref, r, 1.0),
            "the probabilities of the reference were added to the exponent; their logarithms "
            "belong there.": lambda ref, r, b: (ref + r / b).softmax(0),
        },
    )


def check_hidden_reward(answer: Function) -> None:
    """Exercise 2: answer(ref_probs [Y], best_probs [Y], beta) -> rewards [Y] whose mean under the
    reference is 0."""

    def raw(ref: Tensor, best: Tensor, beta: float) -> Tensor:
        return beta * (best.log() - ref.log())

    def right(ref: Tensor, best: Tensor, beta: float) -> Tensor:
        reward = raw(ref, best, beta)
        return reward - ref @ reward

    judge(
        answer,
        right,
        [
            (vector([0.5, 0.25, 0.25]), vector([0.4, 0.1, 0.5]), 1.0),
            (vector([0.7, 0.1, 0.2]), vector([0.2, 0.5, 0.3]), 0.5),
        ],
        {
            "right up to a constant: now shift it so that the reference earns 0 on average.": raw,
            "shifted by the plain mean; the reference's mean weighs each response by its "
            "probability.": lambda ref, best, b: raw(ref, best, b) - raw(ref, best, b).mean(),
            "shifted so that the best policy earns 0; it is the reference that should.": (
                lambda ref, best, b: raw(ref, best, b) - best @ raw(ref, best, b)
            ),
            "the sign is turned round: what became more likely was rewarded.": (
                lambda ref, best, b: -right(ref, best, b)
            ),
            "beta is missing.": lambda ref, best, b: right(ref, best, 1.0),
            "this divides by beta; the reward is beta times the log-ratio.": lambda ref, best, b: (
                right(ref, best, 1 / b)
            ),
        },
    )


def check_implicit_reward(answer: Function) -> None:
    """Exercise 3: answer(log_p [T], ref_log_p [T], mask [T], beta) -> implicit reward, a
    number."""

    def right(log_p: Tensor, ref: Tensor, mask: Tensor, beta: float) -> Tensor:
        return beta * ((log_p - ref) * mask).sum()

    judge(
        answer,
        right,
        [
            (
                vector([-1.0, -2.0, -0.5, -9.0]),
                vector([-1.5, -1.0, -2.0, -4.0]),
                vector([1, 1, 1, 0]),
                0.5,
            ),
            (vector([-3.0, -2.0, -7.0]), vector([-1.0, -2.5, -1.0]), vector([1, 1, 0]), 0.1),
        ],
        {
            "both are means now; DPO's log-ratio is of the whole response.": lambda p, q, m, b: (
                right(p, q, m, b) / m.sum()
            ),
            "the mask is gone: padding counts.": lambda p, q, m, b: b * (p - q).sum(),
            "the sign is turned round: it is the policy less the reference.": lambda p, q, m, b: (
                right(q, p, m, b)
            ),
            "the reference is gone.": lambda p, q, m, b: b * (p * m).sum(),
        },
        untouched=lambda p, q, m, b: b * ((p * m).sum() - (q * m).sum() / m.sum()),
    )


def check_pair_weight(answer: float | None) -> None:
    """Exercise 4: the weight of a pair with log-ratios −20 and −50 at β = 0.1."""
    judge_number(
        answer,
        0.1 / (1 + math.exp(3.0)),
        {
            "this is the weight of a pair in the wrong order: the margin is +3.": 0.1
            / (1 + math.exp(-3.0)),
            "that is the sigmoid alone; the weight is β times that.": 1 / (1 + math.exp(3.0)),
            "β belongs into the margin, too: 0.1 · 30 = 3.": 0.1 / (1 + math.exp(30.0)),
            "that is the weight at the start of training, where the margin is 0.": 0.05,
        },
        tolerance=1e-4,
    )
