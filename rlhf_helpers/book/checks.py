"""Checks for the exercises: 'not attempted', 'right', or the name of the typical mistake.

A check compares the reader's function with the right one on a few cases, and if it differs, with the functions that
typical mistakes produce.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Function = Callable[..., object]


def judge(
    answer: Function,
    right: Function,
    cases: Sequence[tuple],
    mistakes: dict[str, Function],
    untouched: Function | None = None,
) -> None:
    """Print the verdict on `answer`, a function that returns a number or tensor (or a tuple of them).

    Args:
        answer: the reader's function; returning None means not attempted.
        right: the right function.
        cases: arguments to call both with; each call gets fresh copies.
        mistakes: what to say -> the function that this mistake produces.
        untouched: in an exercise to find a bug, the function with the bug.
    """
    try:
        given = [_numbers(answer(*_copies(case))) for case in cases]
    except NotImplementedError:
        given = [None]
    except Exception as error:
        print(f"Not yet: your function raised {type(error).__name__}: {error}")
        return
    if any(one is None for one in given):
        print(
            "Not attempted: your function returns nothing yet. Write it, then run this cell again."
        )
        return
    wanted = [_numbers(right(*_copies(case))) for case in cases]
    if _agree(given, wanted):
        print("Right.")
        return
    if untouched is not None and _agree(
        given, [_numbers(untouched(*_copies(case))) for case in cases]
    ):
        print(
            "Not attempted: the bug is still there. Change the function, then run this cell again."
        )
        return
    for message, mistake in mistakes.items():
        if _agree(given, [_numbers(mistake(*_copies(case))) for case in cases]):
            print(f"Not yet: {message}")
            return
    index = next(
        i
        for i, pair in enumerate(zip(given, wanted, strict=True))
        if not _agree(*([one] for one in pair))
    )
    print(
        f"Not yet: in test case {index + 1} your function gives {_short(given[index])}, not {_short(wanted[index])}."
    )


def judge_number(
    answer: float | None, right: float, mistakes: dict[str, float], tolerance: float = 0.01
) -> None:
    """Print the verdict on a predicted number: right within `tolerance` (relative), or which mistake gives it.

    Args:
        answer: the prediction; None means not attempted.
        right: the right number.
        mistakes: what to say -> the number that this mistake produces.
        tolerance: relative to the right number, and absolute where that is smaller than 1.
    """

    def near(x: float, y: float) -> bool:
        return abs(x - y) <= tolerance * max(1.0, abs(y))

    if answer is None:
        print("Not attempted: replace None with your prediction, then run this cell again.")
        return
    if not isinstance(answer, (int, float)):
        print(f"Not yet: {answer!r} is not a number; write one such as 0.5.")
        return
    if near(float(answer), right):
        print("Right.")
        return
    for message, wrong in mistakes.items():
        if near(float(answer), wrong):
            print(f"Not yet: {message}")
            return
    print(
        "Not yet: work it out on paper with the numbers above; no typical mistake gives this one."
    )


def _copies(case: tuple) -> tuple:
    return tuple(x.clone() if isinstance(x, Tensor) else x for x in case)


def _numbers(value: object) -> Tensor | None:
    """A number, tensor or tuple of them as one flat float64 tensor; None stays None."""
    if value is None:
        return None
    if isinstance(value, (tuple, list)):
        parts = [_numbers(part) for part in value]
        return None if any(part is None for part in parts) else torch.cat(parts)
    return torch.as_tensor(value, dtype=torch.float64).detach().reshape(-1)


def _agree(given: Sequence[Tensor], wanted: Sequence[Tensor]) -> bool:
    pairs = zip(given, wanted, strict=True)
    return all(
        g.shape == w.shape and torch.allclose(g, w, rtol=1e-5, atol=1e-8, equal_nan=True)
        for g, w in pairs
    )


def _short(numbers: Tensor) -> str:
    shown = ", ".join(f"{x:.4g}" for x in numbers[:4].tolist())
    return f"[{shown}{', …' if len(numbers) > 4 else ''}]" if len(numbers) != 1 else shown


# Chapter 01


def check_bandit_gradient(answer: Function) -> None:
    """Exercise 1.1: answer(probs [K], means [K]) -> exact gradient of the expected reward, [K]."""

    def average(p: Tensor, m: Tensor) -> Tensor:
        return (p * m).sum()

    judge(
        answer,
        lambda p, m: p * (m - average(p, m)),
        [(_f([0.5, 0.3, 0.2]), _f([1.0, 2.0, 0.0])), (_f([0.1, 0.9]), _f([-1.0, 4.0]))],
        {
            "the sign is turned round: an arm above your average must get a positive number.": lambda p, m: (
                p * (average(p, m) - m)
            ),
            "these are the advantages; weigh each by how often its arm is played.": lambda p, m: (
                m - average(p, m)
            ),
            "nothing is subtracted: an arm's logit also takes probability from arms that pay.": lambda p, m: (
                p * m
            ),
            "your average is the plain mean of the arms; weigh them by the probabilities.": lambda p, m: (
                p * (m - m.mean())
            ),
            "this is the gradient in the probabilities; we want the one in the logits.": lambda p, m: (
                m
            ),
        },
    )


def check_leave_one_out(answer: Function) -> None:
    """Exercise 1.2: answer(rewards [N]) -> reward minus the mean of the others, [N]."""
    judge(
        answer,
        lambda r: r - (r.sum() - r) / (len(r) - 1),
        [(_f([1.0, 2.0, 6.0]),), (_f([0.0, 1.0, 0.0, 0.0, 5.0]),)],
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
            "the sign is turned round: a reward above the others must get a positive number.": lambda r: (
                (r.sum() - r) / (len(r) - 1) - r
            ),
        },
    )


def check_batch_mean_factor(answer: float | None) -> None:
    """Exercise 1.3: the factor by which a batch-mean baseline shrinks the expected gradient, for N = 4."""
    judge_number(
        answer,
        0.75,
        {
            "that would be unbiased, but this baseline contains the play's own reward; it depends on the action.": 1.0,
            "that is the share of the reward itself in the mean; how much is left?": 0.25,
            "that is the factor that would undo the shrinking.": 4 / 3,
        },
    )


def check_policy_gradient_loss(answer: Function) -> None:
    """Exercise 1.4: answer(logits [K], actions [N], advantages [N]) -> a loss; its gradient is compared."""
    cases = [
        (_f([0.2, -0.4, 1.0]), torch.tensor([0, 2, 2, 1]), _f([1.0, -0.5, 2.0, 0.3])),
        (_f([0.0, 0.0]), torch.tensor([1, 0]), _f([1.0, 3.0])),
    ]

    def of_probs(logits: Tensor, actions: Tensor, advantages: Tensor) -> Tensor:
        return -(advantages * logits.softmax(-1)[actions]).mean()

    def right(logits: Tensor, actions: Tensor, advantages: Tensor) -> Tensor:
        return -(advantages * logits.log_softmax(-1)[actions]).mean()

    judge(
        _gradient_of(answer),
        _gradient_of(right),
        cases,
        {
            "the sign is turned round: PyTorch minimises, so this unlearns.": _gradient_of(
                lambda *x: -right(*x)
            ),
            "the sum must be a mean, or the step grows with the batch.": _gradient_of(
                lambda *x: right(*x) * len(x[1])
            ),
            "a logit is not a log-probability: take log_softmax of the logits first.": _gradient_of(
                lambda z, actions, advantages: -(advantages * z[actions]).mean()
            ),
        },
        untouched=_gradient_of(of_probs),
    )


def _gradient_of(loss: Function) -> Function:
    """The same arguments -> the gradient of the loss with respect to the first of them; None stays None."""

    def gradient(first: Tensor, *rest: object) -> Tensor | None:
        first = first.requires_grad_()
        value = loss(first, *rest)
        if value is None:
            return None
        if value.numel() != 1:
            raise ValueError("return one number: take the mean")
        if not value.requires_grad:
            raise ValueError("nothing in this loss depends on the logits any more")
        return torch.autograd.grad(value, first)[0]

    return gradient


def _f(values: list) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# Chapter 02


def check_clipped_objective(answer: Function) -> None:
    """Exercise 2.1: answer(ratio, advantage, clip) -> the clipped objective of one sample."""
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
            "you take the larger of the two; the objective believes the worse one.": lambda r, a, clip: (
                max(r * a, clipped(r, clip) * a)
            ),
            "the clipped term alone: it also stops the gradient where a wrong move needs repair.": lambda r, a, clip: (
                clipped(r, clip) * a
            ),
            "the minimum is taken before the advantage; for a negative advantage the order turns round.": (
                lambda r, a, clip: min(r, clipped(r, clip)) * a
            ),
            "this is the loss, to minimise; the objective has the other sign.": lambda *x: (
                -right(*x)
            ),
            "the bad samples are unclipped; a bad action that is rare enough must be flat, too.": lambda r, a, clip: (
                right(r, a, clip) if a > 0 else r * a
            ),
            "this is the 'split' objective: for bad samples, too, it is the minimum and the same bounds.": split,
        },
    )


def check_four_slopes(answer: Function) -> None:
    """Exercise 2.2: answer() -> the slopes in the ratio of the four cases, four numbers."""
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
        ): "the size is right, but which way does the objective move when a bad action gets likelier?",
        (3, -1.0): "that is the slope without the dual clip.",
        (3, -3.0): "that is the objective there, not its slope.",
    }
    try:
        given = _numbers(answer())
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
    """Exercise 2.3: answer(log_probs, old_log_probs, advantages, clip) -> the PPO loss, value and gradient."""
    old = _f([0.4, 0.4, 0.4, 0.4, 0.4]).log()
    new = _f([0.2, 0.6, 0.2, 0.6, 0.44]).log()
    cases = [
        (new, old, _f([1.0, 2.0, -1.0, -3.0, 1.5]), 0.2),
        (new, old, _f([-2.0, -1.0, 1.0, 0.5, -1.0]), 0.3),
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
            "the maximum was right: in a loss it is minus the minimum of the objectives.": with_gradient(
                lambda *x: loss(*x, worse=False)
            ),
            "the sign was right: this is a loss, so it is minus the objective.": with_gradient(
                lambda *x: -loss(*x)
            ),
        },
        untouched=with_gradient(lambda *x: loss(*x, turned=True)),
    )


def check_effective_sample_size(answer: Function) -> None:
    """Exercise 2.4: answer(log_ratios [N]) -> (Σρ)² / Σρ²."""
    ratios = _f([0.5, 3.0, 1.0, 0.2])
    cases = [(ratios.log(),), (torch.zeros(5, dtype=torch.float64),), (ratios.log() + 800.0,)]
    cases.append((_f([0.0, 0.0, 2000.0]),))  # far apart: here subtracting the mean overflows

    def weights(log_ratios: Tensor) -> Tensor:
        return (log_ratios - log_ratios.max()).exp()

    judge(
        answer,
        lambda x: weights(x).sum() ** 2 / weights(x).square().sum(),
        cases,
        {
            "right for small numbers, but exp(800) overflows; subtract the largest logarithm first.": lambda x: (
                x.exp().sum() ** 2 / x.exp().square().sum()
            ),
            "the mean is not enough: a ratio far above it still overflows; subtract the largest logarithm.": lambda x: (
                (x - x.mean()).exp().sum() ** 2 / (x - x.mean()).exp().square().sum()
            ),
            "the squares are exchanged: square the sum above, sum the squares below.": lambda x: (
                weights(x).square().sum() / weights(x).sum() ** 2
            ),
            "this is the share of the samples; multiply by N (or use sums instead of means).": lambda x: (
                weights(x).mean() ** 2 / weights(x).square().mean()
            ),
            "the numbers you are given are logarithms; take the exponential.": lambda x: (
                x.sum() ** 2 / x.square().sum()
            ),
        },
    )


# Chapter 03


def check_categorical_kl(answer: Function) -> None:
    """Exercise 3.1: answer(old_logits [K], new_logits [K]) -> KL(π_old‖π_θ), a scalar in nats."""

    def kl(p: Tensor, q: Tensor) -> Tensor:
        return (p * (p / q).log()).sum()

    def of_probs(function: Callable[[Tensor, Tensor], Tensor]) -> Function:
        return lambda old, new: function(old.softmax(-1), new.softmax(-1))

    judge(
        answer,
        of_probs(kl),
        [
            (_f([0.5, 0.25, 0.25]).log(), _f([0.8, 0.1, 0.1]).log()),
            (_f([1.0, -2.0, 0.5, 3.0]), _f([0.0, 1.0, 0.5, -1.0])),
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
    """Exercise 3.2: answer(logits [K], v [K]) -> F·v for the Fisher matrix F of the softmax, [K]."""

    def of_probs(function: Callable[[Tensor, Tensor], Tensor]) -> Function:
        return lambda logits, v: function(logits.softmax(-1), v)

    judge(
        answer,
        of_probs(lambda p, v: p * (v - p @ v)),
        [
            (_f([1.0, -2.0, 0.5]), _f([0.3, 1.0, -2.0])),
            (_f([0.0, 1.0, 2.0, -1.0]), _f([5.0, 1.0, 2.0, 4.0])),
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
    """Exercise 3.3: batches until β has at least doubled while the KL is twice its target (horizon: one batch)."""
    judge_number(
        answer,
        4,
        {
            "the error of +1 is clipped to +0.2 first, so one batch cannot double β.": 1,
            "the factors multiply: 1.2 · 1.2 · …, not 1 + 0.2 + 0.2 + …": 5,
            "β grows by the same factor each batch; multiply it out once more: has it reached 2?": 3,
        },
    )


def check_line_search(answer: Function) -> None:
    """Exercise 3.4: answer(gains [n], kls [n], budget) -> the longest share ½^j that is allowed, or 0.0."""

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
                _f([0.1, 0.2, 0.1]),
                _f([0.01, 0.004, 0.001]),
                0.02,
            ),  # the full step will do, though half gains more
            (_f([0.3, 0.2, 0.1]), _f([0.05, 0.015, 0.004]), 0.02),  # the full step is too far
            (
                _f([-0.2, -0.1, 0.1]),
                _f([0.01, 0.004, 0.001]),
                0.02,
            ),  # near enough at once, but a loss
            (_f([-0.2, -0.1, -0.1]), _f([0.05, 0.01, 0.003]), 0.02),  # nothing will do
            (_f([0.2, 0.1, 0.1]), _f([0.02, 0.005, 0.001]), 0.02),  # the whole budget may be used
            (_f([0.0, 0.1, 0.1]), _f([0.01, 0.004, 0.001]), 0.02),  # no gain is not a gain
        ],
        {
            "both conditions must hold; with 'or' a step that is too far, or a loss, gets through.": first(
                lambda gain, kl, budget: kl <= budget or gain > 0, otherwise=None
            ),
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
            "you take the share with the largest gain; the search stops at the first share that is allowed.": greedy,
        },
    )
