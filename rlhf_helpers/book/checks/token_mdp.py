"""Checks of the exercises of token_mdp."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_helpers.book.checks.judge import Function, judge, judge_number, vector


def check_gae(answer: Function) -> None:
    """Exercise 1: answer(rewards [T], values [T], lam) -> advantages [T], without discount."""

    def summed(td_errors: Tensor, decay: float) -> Tensor:
        sums, running = torch.zeros_like(td_errors), 0.0
        for t in reversed(range(len(td_errors))):
            running = td_errors[t] + decay * running
            sums[t] = running
        return sums

    def after(values: Tensor, end: Tensor | float = 0.0) -> Tensor:
        return torch.cat([values[1:], torch.as_tensor(end, dtype=values.dtype).reshape(1)])

    def right(rewards: Tensor, values: Tensor, lam: float) -> Tensor:
        return summed(rewards + after(values) - values, lam)

    judge(
        answer,
        right,
        [
            (vector([0.0, 0.5, 3.0]), vector([1.0, 0.4, 2.0]), 0.5),
            (vector([-0.1, 0.0, -0.3, 2.0]), vector([0.2, -0.7, 1.1, 0.6]), 0.9),
            (vector([4.0]), vector([1.5]), 0.95),
        ],
        {
            "these are the TD errors, which is λ = 0; add the later ones with weights λ, λ², ….": (
                lambda r, v, lam: right(r, v, 0.0)
            ),
            "this is the return minus the value, which is λ = 1; weigh later TD errors by λ, λ², "
            "….": lambda r, v, lam: right(r, v, 1.0),
            "these are the returns; the advantages are smaller by the values.": (
                lambda r, v, lam: right(r, v, lam) + v
            ),
            "the value after the last token is 0; here the last value is used again.": (
                lambda r, v, lam: summed(r + after(v, v[-1]) - v, lam)
            ),
            "the next value is missing: δ_t = r_t + V(s_{t+1}) − V(s_t).": (
                lambda r, v, lam: summed(r - v, lam)
            ),
            "the sum runs the wrong way: a token is credited with what comes after it, not "
            "before.": (lambda r, v, lam: summed((r + after(v) - v).flip(0), lam).flip(0)),
            "λ multiplies the rewards; it should multiply the TD errors.": lambda r, v, lam: (
                summed(r, lam) - v
            ),
        },
    )


def check_first_credit(answer: float | None) -> None:
    """Exercise 2: what λ = 1 credits the first letter of 'aa' with: its return 1, less 0.9."""
    judge_number(
        answer,
        0.1,
        {
            "that is the exact advantage, which is λ = 0 with an exact critic; λ = 1 takes this "
            "text's return.": (0.85),
            "that is the return; subtract the value at the start.": 1.0,
            "that is the credit of the second a; the question is about the first.": -0.75,
            "the sign is turned round: the return is above the value at the start.": -0.1,
            "that is the value at the start; subtract it from the return.": 0.9,
        },
    )


def check_third_estimate(answer: Function) -> None:
    """Exercise 3: answer(log_probs [N], ref_log_probs [N]) -> k3 [N], of samples of the
    policy."""
    judge(
        answer,
        lambda new, ref: torch.expm1(ref - new) + new - ref,
        [
            (vector([-1.0, -0.3, -2.5]), vector([-1.5, -0.2, -2.0])),
            (vector([-0.7, -4.0]), vector([-0.9, -1.0])),
        ],
        {
            "only one of the two signs is turned; with −d in the exponent, the last term is + d.": (
                lambda new, ref: (ref - new).exp() - 1 - (new - ref)
            ),
            "the exponent has still the wrong sign; the last term was right together with it.": (
                lambda new, ref: (new - ref).exp() - 1 + (new - ref)
            ),
            "this is k1: right on average, but it can be negative.": lambda new, ref: new - ref,
            "this is k2: never negative, but biased.": lambda new, ref: 0.5 * (new - ref) ** 2,
            "the −1 is missing; at the reference the estimate must be 0.": lambda new, ref: (
                (ref - new).exp() + new - ref
            ),
            "this has the opposite sign; a KL is never negative.": lambda new, ref: (
                -(torch.expm1(ref - new) + new - ref)
            ),
        },
        untouched=lambda new, ref: torch.expm1(new - ref) - (new - ref),
    )


def check_mean_entropy(answer: Function) -> None:
    """Exercise 4: answer(logits [N, T, V], mask [N, T]) -> mean entropy of the tokens that
    count."""

    def each(logits: Tensor) -> Tensor:
        log_probs = logits.log_softmax(-1)
        return -(log_probs.exp() * log_probs).sum(-1)

    def mean(values: Tensor, mask: Tensor) -> Tensor:
        return (values * mask).sum() / mask.sum()

    logits = vector(
        [
            [[2.0, 0.0, -1.0, 0.5], [0.1, 0.2, 0.3, 0.4], [3.0, 3.0, -2.0, 0.0]],
            [[1.0, -1.0, 0.0, 0.0], [5.0, 0.0, 0.0, 0.0], [0.0, 1.0, 2.0, 3.0]],
        ]
    )
    judge(
        answer,
        lambda z, m: mean(each(z), m),
        [
            (logits, torch.tensor([[1, 1, 0], [1, 0, 0]])),
            (logits.flip(0) * 0.7, torch.tensor([[1, 0, 0], [1, 1, 1]])),
        ],
        {
            "this is Σ π log π; the entropy is minus that, and never negative.": lambda z, m: (
                -mean(each(z), m)
            ),
            "tokens that do not count are in the mean; use the mask.": lambda z, m: each(z).mean(),
            "the masked sum is divided by all entries; divide by the number of those that count.": (
                lambda z, m: (each(z) * m).mean()
            ),
            "this is the mean over the vocabulary as well; the entropy is the sum over it.": (
                lambda z, m: mean(each(z), m) / z.shape[-1]
            ),
            "this is −Σ log π, with every token weighed alike; weigh by π.": lambda z, m: mean(
                -z.log_softmax(-1).sum(-1), m
            ),
            "each text counts the same here; a token should: one mean over all that count.": (
                lambda z, m: ((each(z) * m).sum(1) / m.sum(1)).mean()
            ),
            "this is the sum; divide by the number of tokens that count.": lambda z, m: (
                each(z) * m
            ).sum(),
            "the entropy is in nats here, not in bits.": lambda z, m: (
                mean(each(z), m) / torch.tensor(2.0).log()
            ),
        },
    )


def check_two_losses(answer: Function) -> None:
    """Exercise 5: answer(values [N], log_probs [N], returns [N]) -> policy loss plus value loss,
    a scalar.

    Judged by its gradients in the values and in the log-probabilities.
    """

    def gradients(loss: Function) -> Function:
        def both(values: Tensor, log_probs: Tensor, returns: Tensor) -> tuple[Tensor, ...] | None:
            inputs = (values.requires_grad_(), log_probs.requires_grad_())
            total = loss(*inputs, returns)
            if total is None:
                return None
            if total.numel() != 1:
                raise ValueError("return one number: take the mean")
            if not total.requires_grad:
                raise ValueError("nothing in this loss depends on values or log_probs any more")
            found = torch.autograd.grad(total, inputs, allow_unused=True)
            pairs = zip(found, inputs, strict=True)
            return tuple(torch.zeros_like(x) if g is None else g for g, x in pairs)

        return both

    def losses(inside: Function, error: Function) -> Function:
        def total(values: Tensor, log_probs: Tensor, returns: Tensor) -> Tensor:
            advantages = inside(returns, values)
            return -(advantages * log_probs).mean() + 0.5 * error(values, returns).square().mean()

        return gradients(total)

    def plain(values: Tensor, returns: Tensor) -> Tensor:
        return values - returns

    judge(
        gradients(answer),
        losses(lambda g, v: g - v.detach(), plain),
        [
            (vector([0.5, -1.0, 2.0]), vector([-0.3, -1.2, -2.0]), vector([1.0, 0.0, 1.5])),
            (vector([0.0, 0.3]), vector([-0.7, -0.1]), vector([2.0, -1.0])),
        ],
        {
            "the value loss is detached, too; now nothing trains the critic.": losses(
                lambda g, v: g - v.detach(), lambda v, g: v.detach() - g
            ),
            "the value loss is the detached one; it is the advantages that must not carry a "
            "gradient.": losses(lambda g, v: g - v, lambda v, g: v.detach() - g),
            "the values are gone from the advantages; they were a baseline, and only their "
            "gradient is wrong.": losses(lambda g, v: g, plain),
            "the sign of the advantages is turned round: returns minus values.": losses(
                lambda g, v: v.detach() - g, plain
            ),
        },
        untouched=losses(lambda g, v: g - v, plain),
    )
