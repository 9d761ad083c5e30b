"""Checks of the exercises of grpo."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rlhf_helpers.book.checks.judge import Function, judge, judge_number, vector


def check_group_advantages(answer: Function) -> None:
    """Exercise 1: answer(rewards [G]) -> advantages [G], ε = 1e-4, unbiased standard
    deviation."""

    def centred(rewards: Tensor) -> Tensor:
        return rewards - rewards.mean()

    def right(rewards: Tensor) -> Tensor:
        return centred(rewards) / (rewards.std() + 1e-4)

    judge(
        answer,
        right,
        [
            (vector([1, 0, 0, 1, 0, 0, 0, 0]),),
            (vector([0.5, 2.0, -1.0]),),
            (vector([1, 1, 1, 1]),),
        ],
        {
            "a group of equal rewards gives NaN: add ε to the standard deviation.": lambda r: (
                centred(r) / r.std()
            ),
            "this divides by the biased standard deviation; torch's std() has G − 1 below the "
            "sum.": lambda r: centred(r) / (r.std(unbiased=False) + 1e-4),
            "this divides by the variance.": lambda r: centred(r) / (r.var() + 1e-4),
            "ε was added to the variance; it belongs to the standard deviation.": lambda r: (
                centred(r) / (r.var() + 1e-4).sqrt()
            ),
            "centred, and not yet divided.": centred,
            "the mean was not taken off.": lambda r: r / (r.std() + 1e-4),
            "the sign is turned round.": lambda r: -right(r),
        },
    )


def check_pass_at_k(answer: Function) -> None:
    """Exercise 2: answer(n, right, k) -> probability that one of k of the n answers is right."""

    def right(n: int, good: int, k: int) -> float:
        return 1 - math.comb(n - good, k) / math.comb(n, k)

    judge(
        answer,
        right,
        [(8, 2, 4), (10, 1, 3), (6, 6, 1)],
        {
            "each answer is put back here: this is 1 − (1 − n₊/n)^k, which is too low.": (
                lambda n, c, k: 1 - (1 - c / n) ** k
            ),
            "that is the chance that none is right.": lambda n, c, k: 1 - right(n, c, k),
            "that is the chance that all k are right.": lambda n, c, k: (
                math.comb(c, k) / math.comb(n, k)
            ),
            "that is pass@1, whatever k is.": lambda n, c, k: c / n,
        },
    )


def check_mean_of_means(answer: Function) -> None:
    """Exercise 3: answer(values [N, T], mask [N, T]) -> mean over answers of the means over
    tokens."""

    def right(values: Tensor, mask: Tensor) -> Tensor:
        return ((values * mask).sum(1) / mask.sum(1)).mean()

    values = torch.tensor([[1.0, 3.0, 5.0, 2.0], [4.0, -2.0, 7.0, 9.0]], dtype=torch.float64)
    mask = torch.tensor([[1.0, 1.0, 1.0, 1.0], [1.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    other = torch.tensor([[1.0, 1.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0]], dtype=torch.float64)
    judge(
        answer,
        right,
        [(values, mask), (2 * values + 1, other)],
        {
            "all tokens count alike here: that is the mean over the batch, DAPO's.": lambda v, m: (
                (v * m).sum() / m.sum()
            ),
            "the sums of the answers are averaged, and not divided by their lengths.": (
                lambda v, m: (v * m).sum(1).mean()
            ),
            "the mask is gone: padding counts.": lambda v, m: v.mean(),
            "all are divided by the longest answer; each has a length of its own.": (
                lambda v, m: ((v * m).sum(1) / m.sum(1).max()).mean()
            ),
        },
        untouched=lambda v, m: (v * m).mean(1).mean(),
    )


def check_constant_share(answer: float | None) -> None:
    """Exercise 4: the share of groups of eight that teach nothing at a pass rate of 0.1."""
    nothing = 0.9**8 + 0.1**8
    judge_number(
        answer,
        nothing,
        {
            "that is the share of groups that teach something.": 1 - nothing,
            "that is the chance that all eight are right; all wrong teaches nothing, too.": 0.1**8,
            "that is the chance of one wrong answer.": 0.9,
            "that is the pass rate.": 0.1,
            "write it as a share, between 0 and 1.": 100 * nothing,
        },
        tolerance=0.005,
    )
