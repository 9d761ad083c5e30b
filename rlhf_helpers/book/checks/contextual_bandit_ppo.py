"""Checks of the exercises of contextual_bandit_ppo."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_helpers.book.checks.judge import Function, judge, numbers, vector


def check_clipped_objective(answer: Function) -> None:
    """Exercise 1: answer(ratio, advantage, clip) -> the clipped objective of one sample."""
    ratios, advantages = (0.5, 0.9, 1.1, 1.5), (2.0, -1.0)
    cases = [(ratio, advantage, 0.2) for advantage in advantages for ratio in ratios] + [
        (1.5, 1.0, 0.3)
    ]

    def clipped(ratio: float, clip: float) -> float:
        return min(max(ratio, 1 - clip), 1 + clip)

    def right(ratio: float, advantage: float, clip: float) -> float:
        return min(ratio * advantage, clipped(ratio, clip) * advantage)

    def split(ratio: float, advantage: float, clip: float) -> float:
        if advantage > 0:
            return right(ratio, advantage, clip)
        moved = min(max(ratio, 1 / (1 + clip)), 1 / (1 - clip))
        return max(ratio * advantage, moved * advantage)

    judge(
        answer,
        right,
        cases,
        {
            "you take the larger of the two; the objective believes the worse one.": (
                lambda r, a, clip: max(r * a, clipped(r, clip) * a)
            ),
            "the clipped term alone: it also stops the gradient where a wrong move needs "
            "repair.": lambda r, a, clip: clipped(r, clip) * a,
            "the minimum is taken before the advantage; for a negative advantage the order turns "
            "round.": (lambda r, a, clip: min(r, clipped(r, clip)) * a),
            "this is the loss, to minimise; the objective has the other sign.": lambda *x: (
                -right(*x)
            ),
            "the bad samples are unclipped; a bad action that is rare enough must be flat, too.": (
                lambda r, a, clip: right(r, a, clip) if a > 0 else r * a
            ),
            "this is the 'split' objective: for bad samples, too, it is the minimum and the same "
            "bounds.": (split),
        },
    )


def check_four_slopes(answer: Function) -> None:
    """Exercise 2: answer() -> the slopes in the ratio of the four cases, four numbers."""
    right = [2.0, 0.0, -2.0, 0.0]
    hints = (
        "compare the ratio with the upper bound of this exercise, 1 + 0.3.",
        "is a bad action that has become rarer pushed further? The clip acts when A < 0, too.",
        "the action is bad and has become likelier; does the objective let that pass?",
        "compare the ratio with c; what does the dual clip do beyond it?",
    )
    named = {  # (case, what was given for it): a better hint
        (0, 2.5): "that is the objective there, not its slope.",
        (
            2,
            2.0,
        ): (
            "the size is right, but which way does the objective move when a bad action gets"
            " likelier?"
        ),
        (3, -1.0): "that is the slope without the dual clip.",
        (3, -3.0): "that is the objective there, not its slope.",
    }
    try:
        given = numbers(answer())
    except Exception as error:
        print(f"Not yet: your function raised {type(error).__name__}: {error}")
        return
    if given is None:
        print(
            "Not attempted: your function returns nothing yet. Write it, then run this cell again."
        )
        return
    if len(given) != len(right):
        print(f"Not yet: return four numbers, one a case; these are {len(given)}.")
        return
    correct = [abs(x - y) < 1e-6 for x, y in zip(given.tolist(), right, strict=True)]
    if all(correct):
        print("Right.")
    elif given.tolist() == [1.0, 0.0, -1.0, 0.0]:
        print("Not yet: the slope in the ratio is the advantage, not its sign.")
    else:
        case = correct.index(False)
        hint = named.get((case, round(given[case].item(), 6)), hints[case])
        print(f"Not yet, {sum(correct)} of 4 are right: case {case + 1}: {hint}")


def check_mended_loss(answer: Function) -> None:
    """Exercise 3: answer(log_probs, old_log_probs, advantages, clip) -> the PPO loss, value and
    gradient."""
    old = vector([0.4, 0.4, 0.4, 0.4, 0.4]).log()
    new = vector([0.2, 0.6, 0.2, 0.6, 0.44]).log()
    cases = [
        (new, old, vector([1.0, 2.0, -1.0, -3.0, 1.5]), 0.2),
        (new, old, vector([-2.0, -1.0, 1.0, 0.5, -1.0]), 0.3),
    ]

    def loss(
        new: Tensor,
        old: Tensor,
        advantages: Tensor,
        clip: float,
        turned: bool = False,
        worse: bool = True,
    ) -> Tensor:
        ratio = (old - new if turned else new - old).exp()
        terms = -ratio * advantages, -ratio.clamp(1 - clip, 1 + clip) * advantages
        return (torch.maximum(*terms) if worse else torch.minimum(*terms)).mean()

    def with_gradient(function: Function) -> Function:
        def both(new: Tensor, *rest: object) -> tuple | None:
            value = function(new.requires_grad_(), *rest)
            return None if value is None else (value, torch.autograd.grad(value, new)[0])

        return both

    judge(
        with_gradient(answer),
        with_gradient(loss),
        cases,
        {
            "the ratio is upside down, and the maximum was right: this is a loss.": with_gradient(
                lambda *x: loss(*x, turned=True, worse=False)
            ),
            "the maximum was right: in a loss it is minus the minimum of the objectives.": (
                with_gradient(lambda *x: loss(*x, worse=False))
            ),
            "the sign was right: this is a loss, so it is minus the objective.": with_gradient(
                lambda *x: -loss(*x)
            ),
        },
        untouched=with_gradient(lambda *x: loss(*x, turned=True)),
    )


def check_effective_sample_size(answer: Function) -> None:
    """Exercise 4: answer(log_ratios [N]) -> (Σρ)² / Σρ²."""
    ratios = vector([0.5, 3.0, 1.0, 0.2])
    cases = [(ratios.log(),), (torch.zeros(5, dtype=torch.float64),), (ratios.log() + 800.0,)]
    cases.append((vector([0.0, 0.0, 2000.0]),))  # far apart: here subtracting the mean overflows

    def weights(log_ratios: Tensor) -> Tensor:
        return (log_ratios - log_ratios.max()).exp()

    judge(
        answer,
        lambda x: weights(x).sum() ** 2 / weights(x).square().sum(),
        cases,
        {
            "right for small numbers, but exp(800) overflows; subtract the largest logarithm "
            "first.": lambda x: x.exp().sum() ** 2 / x.exp().square().sum(),
            "the mean is not enough: a ratio far above it still overflows; subtract the largest "
            "logarithm.": lambda x: (
                (x - x.mean()).exp().sum() ** 2 / (x - x.mean()).exp().square().sum()
            ),
            "the squares are exchanged: square the sum above, sum the squares below.": lambda x: (
                weights(x).square().sum() / weights(x).sum() ** 2
            ),
            "this is the share of the samples; multiply by N (or use sums instead of means).": (
                lambda x: weights(x).mean() ** 2 / weights(x).square().mean()
            ),
            "the numbers you are given are logarithms; take the exponential.": lambda x: (
                x.sum() ** 2 / x.square().sum()
            ),
        },
    )
