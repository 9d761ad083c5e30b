"""Checks of the exercises of trust_regions."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from rlhf_helpers.book.checks.judge import Function, judge, judge_number, vector


def check_categorical_kl(answer: Function) -> None:
    """Exercise 1: answer(old_logits [K], new_logits [K]) -> KL(π_old‖π_θ), a scalar in nats."""

    def kl(p: Tensor, q: Tensor) -> Tensor:
        return (p * (p / q).log()).sum()

    def of_probs(function: Callable[[Tensor, Tensor], Tensor]) -> Function:
        return lambda old, new: function(old.softmax(-1), new.softmax(-1))

    judge(
        answer,
        of_probs(kl),
        [
            (vector([0.5, 0.25, 0.25]).log(), vector([0.8, 0.1, 0.1]).log()),
            (vector([1.0, -2.0, 0.5, 3.0]), vector([0.0, 1.0, 0.5, -1.0])),
        ],
        {
            "the policies are swapped: average over what the old policy does.": of_probs(
                lambda p, q: kl(q, p)
            ),
            "both sides of the ratio are the same policy, and the result is always 0.": of_probs(
                lambda p, q: 0 * kl(p, q)
            ),
            "the sign is turned round: a divergence is never negative.": of_probs(
                lambda p, q: -kl(p, q)
            ),
            "logits are not log-probabilities; take log_softmax of both first.": lambda old, new: (
                old.softmax(-1) * (old - new)
            ).sum(),
            "each action counts the same here; weigh it by its old probability.": of_probs(
                lambda p, q: (p / q).log().mean()
            ),
            "this is in bits; use the natural logarithm.": of_probs(
                lambda p, q: kl(p, q) / math.log(2)
            ),
        },
    )


def check_fisher_product(answer: Function) -> None:
    """Exercise 2: answer(logits [K], v [K]) -> F·v for the Fisher matrix F of the softmax,
    [K]."""

    def of_probs(function: Callable[[Tensor, Tensor], Tensor]) -> Function:
        return lambda logits, v: function(logits.softmax(-1), v)

    judge(
        answer,
        of_probs(lambda p, v: p * (v - p @ v)),
        [
            (vector([1.0, -2.0, 0.5]), vector([0.3, 1.0, -2.0])),
            (vector([0.0, 1.0, 2.0, -1.0]), vector([5.0, 1.0, 2.0, 4.0])),
        ],
        {
            "this is the number vᵀ·F·v; the product F·v has one entry an action.": of_probs(
                lambda p, v: (p * v * v).sum() - (p @ v) ** 2
            ),
            "this is diag(p)·v; the part p·pᵀ·v is still to be subtracted.": of_probs(
                lambda p, v: p * v
            ),
            "this is v minus its mean; weigh each entry by its probability.": of_probs(
                lambda p, v: v - p @ v
            ),
            "the plain mean of v is subtracted; F needs the mean under the policy.": of_probs(
                lambda p, v: p * (v - v.mean())
            ),
            "the two parts are added; F = diag(p) − p·pᵀ.": of_probs(lambda p, v: p * (v + p @ v)),
            "logits are used as probabilities; take the softmax first.": lambda logits, v: (
                logits * (v - logits @ v)
            ),
        },
    )


def check_batches_to_double(answer: float | None) -> None:
    """Exercise 3: batches until β has at least doubled while the KL is twice its target (horizon:
    one batch)."""
    judge_number(
        answer,
        4,
        {
            "the error of +1 is clipped to +0.2 first, so one batch cannot double β.": 1,
            "the factors multiply: 1.2 · 1.2 · …, not 1 + 0.2 + 0.2 + …": 5,
            "β grows by the same factor each batch; multiply it out once more: has it reached 2?": (
                3
            ),
        },
    )


def check_line_search(answer: Function) -> None:
    """Exercise 4: answer(gains [n], kls [n], budget) -> the longest share ½^j that is allowed, or
    0.0."""

    def first(
        allowed: Callable[[float, float, float], bool], otherwise: float | None = 0.0
    ) -> Function:
        def search(gains: Tensor, kls: Tensor, budget: float) -> float:
            good = [i for i in range(len(kls)) if allowed(float(gains[i]), float(kls[i]), budget)]
            if good:
                return 0.5 ** good[0]
            return 0.5 ** (len(kls) - 1) if otherwise is None else otherwise

        return search

    def greedy(gains: Tensor, kls: Tensor, budget: float) -> float:
        good = [i for i in range(len(kls)) if kls[i] <= budget and gains[i] > 0]
        return 0.5 ** max(good, key=lambda i: float(gains[i])) if good else 0.0

    judge(
        answer,
        first(lambda gain, kl, budget: kl <= budget and gain > 0),
        [
            (
                vector([0.1, 0.2, 0.1]),
                vector([0.01, 0.004, 0.001]),
                0.02,
            ),  # the full step will do, though half gains more
            (
                vector([0.3, 0.2, 0.1]),
                vector([0.05, 0.015, 0.004]),
                0.02,
            ),  # the full step is too far
            (
                vector([-0.2, -0.1, 0.1]),
                vector([0.01, 0.004, 0.001]),
                0.02,
            ),  # near enough at once, but a loss
            (vector([-0.2, -0.1, -0.1]), vector([0.05, 0.01, 0.003]), 0.02),  # nothing will do
            (
                vector([0.2, 0.1, 0.1]),
                vector([0.02, 0.005, 0.001]),
                0.02,
            ),  # the whole budget may be used
            (vector([0.0, 0.1, 0.1]), vector([0.01, 0.004, 0.001]), 0.02),  # no gain is not a gain
        ],
        {
            "both conditions must hold; with 'or' a step that is too far, or a loss, gets "
            "through.": first(lambda gain, kl, budget: kl <= budget or gain > 0, otherwise=None),
            "the gain is not looked at; a step inside the region can still be a loss.": first(
                lambda gain, kl, budget: kl <= budget
            ),
            "the divergence is not looked at; a gain outside the region does not count.": first(
                lambda gain, kl, budget: gain > 0
            ),
            "a divergence of exactly the budget is allowed: compare with ≤.": first(
                lambda gain, kl, budget: kl < budget and gain > 0
            ),
            "a gain of exactly 0 is no gain: compare with >.": first(
                lambda gain, kl, budget: kl <= budget and gain >= 0
            ),
            "where nothing will do, the step is not taken: return 0.0.": first(
                lambda gain, kl, budget: kl <= budget and gain > 0, otherwise=None
            ),
            "you take the share with the largest gain; the search stops at the first share that "
            "is allowed.": (greedy),
        },
    )
