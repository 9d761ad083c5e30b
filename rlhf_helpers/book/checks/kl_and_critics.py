"""Checks of the exercises of kl_and_critics."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rlhf_helpers.book.checks.judge import Function, attempt, judge, judge_number, vector

_NO_ANSWER = "Not attempted: replace None with your prediction, then run this cell again."
_STATES = 512  # that a critic is fitted to


def check_libraries(answers: Sequence[str] | None) -> None:
    """Exercise 1: which KL the gradient of each of three terms holds down."""
    if answers is None:
        print(_NO_ANSWER)
        return
    words = ("reverse", "forward", "none")
    if isinstance(answers, str) or not isinstance(answers, Sequence) or len(answers) != 3:
        print('Not yet: give three words, such as ("none", "none", "none").')
        return
    given = [str(word).strip().lower() for word in answers]
    if any(word not in words for word in given):
        print(f"Not yet: each answer is one of {', '.join(words)}.")
        return
    hints = {
        "a": ("reverse", "what is detached has no gradient; which of the terms is left?"),
        "b": ("forward", "differentiate e^(−d), then average over the policy: π · π_ref/π."),
        "c": ("none", "the gradient is −∇log π; average it over the policy."),
    }
    wrong = [
        f"{letter}: {hint}"
        for word, (letter, (right, hint)) in zip(given, hints.items(), strict=True)
        if word != right
    ]
    print(f"Not yet: {' '.join(wrong)}" if wrong else "Right.")


def check_mean_entropy(answer: Function) -> None:
    """Exercise 2: answer(logits [N, T, V], mask [N, T]) -> mean entropy of the tokens that
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
            (logits, torch.tensor([[True, True, False], [True, False, False]])),
            (logits.flip(0) * 0.7, torch.tensor([[True, False, False], [True, True, True]])),
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
            "this is −Σ log π, with every token weighted equally; weight by π.": (
                lambda z, m: mean(-z.log_softmax(-1).sum(-1), m)
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


def check_drift(answer: Sequence[float] | None) -> None:
    """Exercise 3: the signs in which values drift when they are not detached from the advantages:
    with log π, and with the ratio."""
    if answer is None:
        print(_NO_ANSWER)
        return
    if not isinstance(answer, Sequence) or len(answer) != 2 or not set(answer) <= {1, -1}:
        print("Not yet: give two signs, such as (+1, +1).")
        return
    verdicts = {
        (1, -1): "Right.",
        (-1, 1): "Not yet: these are the signs of the gradients; descent goes the other way.",
        (1, 1): "Not yet: a ratio is positive and log π is not; can both push the same way?",
        (-1, -1): "Not yet: a ratio is positive and log π is not; can both push the same way?",
    }
    print(verdicts[tuple(int(sign) for sign in answer)])


def check_rare_success(answer: float | None) -> None:
    """Exercise 4: the number that a Huber loss of threshold 1 learns from nine zeros and a ten."""
    judge_number(
        answer,
        1 / 9,
        {
            "that is the mean, which the squared error learns.": 1.0,
            "that is the median; Huber is a square near 0, so it moves a little from there.": 0.0,
            "nine errors of V pull down, one of 1 pulls up: not all ten errors are V.": 0.1,
            "the pull of the success is cut at 1; that is what it would be if cut off at 10.": 10
            / 9,
        },
        tolerance=0.006,
    )


def check_critic(answer: Callable[[Tensor, Tensor], Callable[[Tensor], Tensor] | None]) -> None:
    """Exercise 5: answer(features [512, 8], targets [512]) -> a function from features [M, 8] to
    values [M]; judged on fresh states by the explained variance and the mean of the values."""
    generator = torch.Generator().manual_seed(0)

    def states(count: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(count, 8, generator=generator, dtype=torch.float64)
        return x, 50 + 1.5 * x[:, 0] - x[:, 1] + 1.2 * (x[:, 2] * x[:, 3]).tanh() + x[:, 4].sin()

    features, exact = states(_STATES)
    targets = exact + 0.7 * torch.randn(_STATES, generator=generator, dtype=torch.float64)
    fresh, right = states(2000)

    def values() -> Tensor | None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            values_of = answer(features.clone(), targets.clone())
            return None if values_of is None else torch.as_tensor(values_of(fresh.clone()))

    found = attempt(values)
    if found is None:
        return
    found = found.detach().double()
    if found.shape == (2000, 1):
        print("Not yet: the values have shape [M, 1]; return [M], and compare [512] with [512].")
    elif found.shape != (2000,):
        print(f"Not yet: the values have shape {list(found.shape)}; return [M].")
    else:
        print(_verdict(found, right))


def _verdict(found: Tensor, right: Tensor) -> str:
    explained = (1 - (right - found).var() / right.var()).item()
    shift = (found.mean() - right.mean()).item()
    said = f"explained variance {explained:.2f}, mean off by {shift:+.2f}"
    if explained > 0.9 and abs(shift) < 0.3:
        return f"Right: {said}."
    if abs(shift) > 5:
        return f"Not yet: {said}. The mean is far away: train longer, or in units of the targets."
    if abs(explained) < 0.05:
        return (
            f"Not yet: {said}. It says the same everywhere. Did you compare [512, 1] with [512]?"
            " Their difference is [512, 512]."
        )
    if explained <= 0.9:
        return f"Not yet: {said}. Too few steps, too small a network, or noise learned by heart."
    return f"Not yet: {said}. A constant shift does not show in the explained variance."


def check_curves(answers: Sequence[str] | None) -> None:
    """Exercise 6: which estimate is behind each of three logged curves."""
    if answers is None:
        print(_NO_ANSWER)
        return
    if isinstance(answers, str) or not isinstance(answers, Sequence) or len(answers) != 3:
        print('Not yet: give three names, such as ("k1", "k2", "k3").')
        return
    given = [str(name).strip().lower() for name in answers]
    if sorted(given) != ["k1", "k2", "k3"]:
        print("Not yet: each of k1, k2 and k3 stands behind one curve.")
    elif given == ["k3", "k1", "k2"]:
        print("Right.")
    elif given[1] != "k1":
        print("Not yet: one curve goes below zero. Which of the three can be negative?")
    else:
        print("Not yet: far away one of them has spikes. Which one holds an e^(−d)?")
