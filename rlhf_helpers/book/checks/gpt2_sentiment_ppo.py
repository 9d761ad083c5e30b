"""Checks of the exercises of gpt2_sentiment_ppo."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rlhf_helpers.book.checks.judge import Function, judge, judge_number, vector


def check_token_rewards(answer: Function) -> None:
    """Exercise 1: answer(score, log_probs [T], ref_log_probs [T], beta) -> reward of each token,
    [T]."""

    def right(score: float, log_probs: Tensor, ref: Tensor, beta: float) -> Tensor:
        found = -beta * (log_probs - ref)
        found[-1] += score
        return found

    def at_the_end(score: float, log_probs: Tensor, ref: Tensor, beta: float) -> Tensor:
        found = torch.zeros_like(log_probs)
        found[-1] = score - beta * (log_probs - ref).sum()
        return found

    def instead(score: float, log_probs: Tensor, ref: Tensor, beta: float) -> Tensor:
        found = -beta * (log_probs - ref)
        found[-1] = score
        return found

    judge(
        answer,
        right,
        [
            (2.0, vector([-1.0, -0.5, -2.0]), vector([-1.5, -0.5, -1.0]), 0.1),
            (-1.0, vector([-0.2, -3.0]), vector([-0.7, -2.0]), 0.5),
        ],
        {
            "the sign of the log-ratio is turned round: drifting away is paid for, not charged.": (
                lambda s, p, q, b: right(s, q, p, b)
            ),
            "the score stands on every token; it is earned once, at the last.": (
                lambda s, p, q, b: s - b * (p - q)
            ),
            "the score stands on the first token; it is known only after the last.": (
                lambda s, p, q, b: right(s, p.flip(0), q.flip(0), b).flip(0)
            ),
            "the whole price is charged at the last token; each token pays its own.": at_the_end,
            "the last token pays no price: add the score to it.": instead,
            "beta is missing.": lambda s, p, q, b: right(s, p, q, 1.0),
        },
    )


def check_value_targets(answer: Function) -> None:
    """Exercise 2: answer(advantages [T], values [T]) -> what the value function is trained on,
    [T]."""

    def whitened(advantages: Tensor) -> Tensor:
        return (advantages - advantages.mean()) / advantages.std()

    judge(
        answer,
        lambda advantages, values: advantages + values,
        [
            (vector([1.0, -0.5, 2.0]), vector([0.5, 0.2, -1.0])),
            (vector([0.3, 0.1, -0.7, 4.0]), vector([1.0, 2.0, 0.0, 0.5])),
        ],
        {
            "these are the advantages alone; a return is the advantage plus the value.": (
                lambda a, v: a
            ),
            "the sign of the values is turned round.": lambda a, v: a - v,
            "the sum is whitened now; a return is in units of reward and stays there.": (
                lambda a, v: whitened(a + v)
            ),
            "the mean is still taken away from the advantages.": lambda a, v: a - a.mean() + v,
        },
        untouched=lambda a, v: whitened(a) + v,
    )


def check_best_of_n_kl(answer: Function) -> None:
    """Exercise 3: answer(n) -> the largest KL that the best of n can have from the policy,
    nats."""
    judge(
        answer,
        lambda n: math.log(n) - (n - 1) / n,
        [(1,), (4,), (256,)],
        {
            "log n alone is too much: the second term is missing.": lambda n: math.log(n),
            "this is in bits; take the natural logarithm.": lambda n: math.log2(n) - (n - 1) / n,
            "the second term is (n − 1)/n.": lambda n: math.log(n) - 1 / n,
            "the second term is taken away, not added.": lambda n: math.log(n) + (n - 1) / n,
        },
    )


def check_adaptive_coefficient(answer: float | None) -> None:
    """Exercise 4: β = 0.05, target 3 nats, measured 6 nats, 128 samples, horizon 1000: the next
    β."""
    judge_number(
        answer,
        0.05 * (1 + 0.2 * 128 / 1000),
        {
            "the error is clipped to ±0.2; without that it would be this.": 0.05
            * (1 + 1.0 * 128 / 1000),
            "the wrong way: the KL is above its target, so the price must rise.": 0.05
            * (1 - 0.2 * 128 / 1000),
            "the change is scaled by samples over horizon.": 0.05 * 1.2,
            "twice the KL does not mean twice the price in one step.": 0.1,
        },
        tolerance=1e-4,
    )
