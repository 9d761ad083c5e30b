"""Checks of the exercises of bandit."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_helpers.book.checks.judge import Function, gradient_of, judge, judge_number, vector


def check_bandit_gradient(answer: Function) -> None:
    """Exercise 1: answer(probs [K], means [K]) -> exact gradient of the expected reward, [K]."""

    def average(p: Tensor, m: Tensor) -> Tensor:
        return (p * m).sum()

    judge(
        answer,
        lambda p, m: p * (m - average(p, m)),
        [
            (vector([0.5, 0.3, 0.2]), vector([1.0, 2.0, 0.0])),
            (vector([0.1, 0.9]), vector([-1.0, 4.0])),
        ],
        {
            "the sign is turned round: an arm above your average must get a positive number.": (
                lambda p, m: p * (average(p, m) - m)
            ),
            "these are the advantages; weigh each by how often its arm is played.": lambda p, m: (
                m - average(p, m)
            ),
            "nothing is subtracted: an arm's logit also takes probability from arms that pay.": (
                lambda p, m: p * m
            ),
            "your average is the plain mean of the arms; weigh them by the probabilities.": (
                lambda p, m: p * (m - m.mean())
            ),
            "this is the gradient in the probabilities; we want the one in the logits.": (
                lambda p, m: m
            ),
        },
    )


def check_leave_one_out(answer: Function) -> None:
    """Exercise 2: answer(rewards [N]) -> reward minus the mean of the others, [N]."""
    judge(
        answer,
        lambda r: r - (r.sum() - r) / (len(r) - 1),
        [(vector([1.0, 2.0, 6.0]),), (vector([0.0, 1.0, 0.0, 0.0, 5.0]),)],
        {
            "this subtracts the mean of all, which contains the reward itself.": lambda r: (
                r - r.mean()
            ),
            "the others are one fewer than all: divide their sum by N − 1.": lambda r: (
                r - (r.sum() - r) / len(r)
            ),
            "this is the baseline; the advantage is the reward minus it.": lambda r: (
                (r.sum() - r) / (len(r) - 1)
            ),
            "the sign is turned round: a reward above the others must get a positive number.": (
                lambda r: (r.sum() - r) / (len(r) - 1) - r
            ),
        },
    )


def check_batch_mean_factor(answer: float | None) -> None:
    """Exercise 3: the factor by which a batch-mean baseline shrinks the expected gradient, for N
    = 4."""
    judge_number(
        answer,
        0.75,
        {
            "that would be unbiased, but this baseline contains the play's own reward; it "
            "depends on the action.": (1.0),
            "that is the share of the reward itself in the mean; how much is left?": 0.25,
            "that is the factor that would undo the shrinking.": 4 / 3,
        },
    )


def check_policy_gradient_loss(answer: Function) -> None:
    """Exercise 4: answer(logits [K], actions [N], advantages [N]) -> a loss; its gradient is
    compared."""
    cases = [
        (vector([0.2, -0.4, 1.0]), torch.tensor([0, 2, 2, 1]), vector([1.0, -0.5, 2.0, 0.3])),
        (vector([0.0, 0.0]), torch.tensor([1, 0]), vector([1.0, 3.0])),
    ]

    def of_probs(logits: Tensor, actions: Tensor, advantages: Tensor) -> Tensor:
        return -(advantages * logits.softmax(-1)[actions]).mean()

    def right(logits: Tensor, actions: Tensor, advantages: Tensor) -> Tensor:
        return -(advantages * logits.log_softmax(-1)[actions]).mean()

    judge(
        gradient_of(answer),
        gradient_of(right),
        cases,
        {
            "the sign is turned round: PyTorch minimises, so this unlearns.": gradient_of(
                lambda *x: -right(*x)
            ),
            "the sum must be a mean, or the step grows with the batch.": gradient_of(
                lambda *x: right(*x) * len(x[1])
            ),
            "a logit is not a log-probability: take log_softmax of the logits first.": gradient_of(
                lambda z, actions, advantages: -(advantages * z[actions]).mean()
            ),
        },
        untouched=gradient_of(of_probs),
    )
