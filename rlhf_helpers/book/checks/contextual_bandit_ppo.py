"""Checks of the exercises of contextual_bandit_ppo."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from rlhf_helpers.book.checks.judge import Function, attempt, judge, judge_number, numbers, vector
from rlhf_helpers.worlds.bandits import LinearBandit, stretched

ROLLOUTS = 30


def check_four_slopes(answer: Function) -> None:
    """Exercise 1: answer() -> the slopes in the ratio of the four cases, four numbers."""
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
    """Exercise 2: answer(log_probs, old_log_probs, advantages, clip) -> the PPO loss, value and
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
    """Exercise 3: answer(log_ratios [N]) -> (Σρ)² / Σρ²."""
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


def check_without_stretch(answer: float | None) -> None:
    """Exercise 4: in the world without a stretch, do sixteen clipped epochs beat one step clearly?
    +1 for yes, -1 for no."""
    judge_number(
        answer,
        -1,
        {"run it: `decades=0.0`, both methods, four rates each; then compare the best of each.": 1},
    )


def check_ppo_loop(answer: Function) -> None:
    """Exercise 5: answer(collect) -> weights [8, 8], from at most 30 rollouts of 64 pulls.

    Three runs in the stretched world. There one step per rollout earns about 0.8 at its best
    rate, sixteen steps without a ratio or without a clip at most 0.9, and clipped reuse more than
    1.0.
    """
    world = stretched()
    earned = []
    for seed in range(3):
        weights = attempt(partial(answer, _Rollouts(world, seed)))
        if weights is None:
            return
        if not isinstance(weights, Tensor) or weights.shape != world.weights.shape:
            print("Not yet: return the weights, a tensor [8, 8]: one row per arm.")
            return
        earned.append(_earns(weights.detach().to(world.weights.dtype), world))
    reward = sum(earned) / len(earned)
    if not reward > 0.6:  # also NaN
        print(
            f"Not yet: your policies earn {reward:.2f} per pull; a policy that knows nothing earns"
            " about 0. Look at the sign of the loss, at which actions the log-probabilities are of,"
            " and at the rate (Adam, 0.1 to 0.4)."
        )
    elif reward < 0.95:
        print(
            f"Not yet: your policies earn {reward:.2f} per pull. One step per rollout brings about"
            " 0.8, sixteen without ratio or clip up to 0.9. Take sixteen steps on each; keep"
            " old_log_probs as collect returns them, so that the ratio leaves 1; and clip. Or is"
            " the rate too small?"
        )
    else:
        print("Right.")


class _Rollouts:
    """What exercise 5 calls to act: each call is one rollout, and there are 30 in a run."""

    def __init__(self, world: LinearBandit, seed: int) -> None:
        self.world, self.left = world, ROLLOUTS
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, weights: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if self.left == 0:
            raise ValueError(f"{ROLLOUTS} rollouts are used up; learn more from each of them")
        self.left -= 1
        contexts = self.world.contexts(64, generator=self.generator)
        weights = weights.detach().to(contexts.dtype)
        log_probs = (contexts @ weights.T).log_softmax(-1)
        actions = torch.multinomial(log_probs.exp(), 1, generator=self.generator)
        rewards = self.world.pull(contexts, actions[:, 0], self.generator)
        return contexts, actions[:, 0], rewards, log_probs.gather(1, actions)[:, 0]


def _earns(weights: Tensor, world: LinearBandit) -> float:
    contexts = world.contexts(1000, generator=torch.Generator().manual_seed(1_000_003))
    return world.expected_reward(contexts @ weights.T, contexts).mean().item()
