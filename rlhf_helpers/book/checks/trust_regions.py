"""Checks of the exercises of trust_regions."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from rlhf_helpers.book.checks.judge import Function, attempt, judge, judge_number, vector
from rlhf_helpers.kl import exact_kl
from rlhf_helpers.worlds.bandits import fan


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
            "each action counts the same here; weight it by its old probability.": of_probs(
                lambda p, q: (p / q).log().mean()
            ),
            "this is in bits; use the natural logarithm.": of_probs(
                lambda p, q: kl(p, q) / math.log(2)
            ),
        },
    )


def check_step_by_hand(answer: float | None) -> None:
    """Exercise 2: what TRPO's step of 0.02 nats adds to the logit of machine 2 relative to machine
    3."""
    probs, pays = vector([0.70, 0.05, 0.25]), vector([1.0, 2.0, 0.0])
    variance = (probs * pays**2).sum() - (probs @ pays) ** 2
    scale = (2 * 0.02 / variance).sqrt().item()
    judge_number(
        answer,
        2 * scale,
        {
            "that is what one unit of pay adds; machine 2 pays two more than machine 3.": scale,
            "the KL is half the variance, so the root is of 2δ over it.": 2 * scale / 2**0.5,
            "the length is the root of that.": 2 * scale**2,
            "E[pay²] is not yet the variance: subtract the square of the mean.": 2
            * (0.04 / (probs * pays**2).sum().item()) ** 0.5,
        },
        tolerance=0.015,
    )


def check_telescope(answer: Function) -> None:
    """Exercise 3: answer(rewards [T], first_value, last_value, gamma) -> Σ γ^t (r_t + γ·V(s_{t+1})
    − V(s_t)), whatever the values between."""

    def right(rewards: Tensor, first: float, last: float, gamma: float) -> float:
        values = [first, *[7.0 * i for i in range(1, len(rewards))], last]  # those between cancel
        steps = enumerate(zip(rewards.tolist(), values[:-1], values[1:], strict=True))
        return sum(gamma**t * (r + gamma * after - before) for t, (r, before, after) in steps)

    def discounted(rewards: Tensor, gamma: float) -> Tensor:
        return sum(gamma**t * r for t, r in enumerate(rewards))

    judge(
        answer,
        right,
        [
            (vector([1.0, 0.0, 2.0]), 0.5, 3.0, 0.9),
            (vector([0.0, 1.0, -1.0, 4.0]), -1.0, 2.0, 0.5),
        ],
        {
            "the last value lies T steps ahead: discount it by γ to the power T.": (
                lambda r, v, w, g: discounted(r, g) + w - v
            ),
            "the last value is discounted once per step: by γ to the power T.": (
                lambda r, v, w, g: discounted(r, g) + g * w - v
            ),
            "the last value is missing: it does not cancel.": (
                lambda r, v, w, g: discounted(r, g) - v
            ),
            "the first value is missing: it is subtracted once.": (
                lambda r, v, w, g: discounted(r, g) + g ** len(r) * w
            ),
            "the rewards have to be discounted, too.": (
                lambda r, v, w, g: r.sum() + g ** len(r) * w - v
            ),
        },
    )


def check_without_reward_noise(answer: float | None) -> None:
    """Exercise 6: whether a step of three nats from sixteen samples helps (+1) or does harm (−1) if
    rewards have no noise."""
    judge_number(
        answer,
        -1,
        {
            "run it: each context still shows what one arm pays, and not what the others would have"
            " paid.": 1,
        },
    )


def check_controller(answer: Function) -> None:
    """Exercise 4: answer(beta, kl, target, samples, horizon) -> the next β."""

    def right(beta: float, kl: float, target: float, samples: int, horizon: int) -> float:
        error = max(-0.2, min(0.2, kl / target - 1))
        return beta * (1 + error * samples / horizon)

    judge(
        answer,
        right,
        [(1.0, 0.03, 0.02, 64, 64), (0.5, 0.021, 0.02, 64, 640), (2.0, 0.001, 0.02, 32, 64)],
        {
            "the relative error has to be clipped to ±0.2 before it is used.": (
                lambda b, kl, target, n, h: b * (1 + (kl / target - 1) * n / h)
            ),
            "a batch moves β by its share of the horizon: samples / horizon.": (
                lambda b, kl, target, n, h: b * right(1.0, kl, target, n, n)
            ),
            "the error is relative to the target: KL / target − 1.": (
                lambda b, kl, target, n, h: b * (1 + max(-0.2, min(0.2, kl - target)) * n / h)
            ),
            "the sign is wrong: too far from the old policy must raise the price.": (
                lambda b, kl, target, n, h: b * (2 - right(1.0, kl, target, n, h))
            ),
            "the new β is the old one times the factor.": (
                lambda b, kl, target, n, h: right(1.0, kl, target, n, h)
            ),
            "it is 1 + the clipped error that multiplies β; at the target β must stay.": (
                lambda b, kl, target, n, h: b * (right(1.0, kl, target, n, h) - 1)
            ),
        },
    )


def check_line_search(answer: Function) -> None:
    """Exercise 5: answer(gains [n], kls [n], budget) -> the longest share ½^j that is allowed, or
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
        untouched=first(lambda gain, kl, budget: kl <= budget or gain > 0, otherwise=None),
    )


_FAR = 0.05  # nats
_CALLS = 30


def check_careful_training(answer: Function) -> None:
    """Exercise 7: answer(collect) -> weights [8, 2] of a policy that was trained without moving
    far; collect(weights) -> contexts [64, 2], actions [64], rewards [64]."""
    trained = attempt(partial(_trained, answer))
    if trained is None:
        return
    found, steps = trained
    contexts = _WORLD.contexts(1000, generator=torch.Generator().manual_seed(1))
    reward = _WORLD.expected_reward(contexts @ found.T, contexts).mean().item()
    if max(steps, default=0.0) > _FAR:
        print(
            f"Not yet: one of your updates moved {max(steps):.3f} nats, and {_FAR} are allowed."
            " Measure the KL between the old and the new policy on the batch, and act on it."
        )
    elif len(steps) < 2:
        print("Not yet: these weights were not learned; train on what collect returns.")
    elif reward > 0.9:
        print(f"Right. Reward {reward:.1f}, no update beyond {_FAR} nats.")
    elif reward < -0.2:
        print("Not yet: the sign is turned round, so the policy looks for the worst arm.")
    else:
        print(
            f"Not yet: no update went far, but the reward is {reward:.3f}; it should be above 0.9."
            " Are your steps too small, do you use too few of the 30 batches, or do two shapes not"
            " fit ([64, 1] times [64] is [64, 64])?"
        )


_WORLD = fan(8)


def _trained(answer: Function) -> tuple[Tensor, list[float]] | None:
    """What a loop returns, and the KL between the policies of one call and the next, on the
    contexts of the first; with random numbers that the notebook does not notice."""
    generator = torch.Generator().manual_seed(0)
    visited: list[tuple[Tensor, Tensor]] = []

    def collect(weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if len(visited) == _CALLS:
            raise RuntimeError(f"collect was called more than {_CALLS} times")
        weights = _weights(weights)
        contexts = _WORLD.contexts(64, generator=generator)
        visited.append((weights.clone(), contexts))
        probs = (contexts @ weights.T).softmax(-1)
        actions = torch.multinomial(probs, 1, generator=generator)[:, 0]
        return contexts, actions, _WORLD.pull(contexts, actions, generator)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        found = answer(collect)
    if found is None:
        return None
    weights = [*(one for one, _ in visited), _weights(found)]
    steps = [
        exact_kl(contexts @ old.T, contexts @ new.T).mean().item()
        for (_, contexts), old, new in zip(visited, weights[:-1], weights[1:], strict=True)
    ]
    return weights[-1], steps


def _weights(value: object) -> Tensor:
    weights = torch.as_tensor(value, dtype=torch.float64).detach()
    if weights.shape != _WORLD.weights.shape:
        raise ValueError(f"the weights have the shape {tuple(weights.shape)}; make them [8, 2]")
    if not weights.isfinite().all():
        raise ValueError("the weights hold a NaN or an infinity; take smaller steps")
    return weights
