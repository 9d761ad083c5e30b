"""Checks of the exercises of reward_model."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf_helpers.book.checks.judge import Function, attempt, judge, judge_number, numbers, vector


def check_pair_gradient(answer: Function) -> None:
    """Exercise 3: answer(scores_1 [N], scores_2 [N], p [N]) -> the gradient of the mean loss by
    scores_1, [N]."""

    def scaled(weight: Function) -> Function:
        return lambda a, b, p: -weight(a, b, p) / len(a)

    judge(
        answer,
        scaled(lambda a, b, p: p - torch.sigmoid(a - b)),
        [
            (vector([2.0, 0.5, -1.0]), vector([1.0, 1.5, 0.0]), vector([1.0, 0.8, 0.2])),
            (vector([0.3, 4.0]), vector([2.5, -4.0]), vector([0.4, 0.6])),
        ],
        {
            "this has the other sign, or is the gradient by the second scores: a step down it"
            " lowers the score of the response that people prefer.": scaled(
                lambda a, b, p: torch.sigmoid(a - b) - p
            ),
            "this is the gradient of the sum; the loss is a mean over N pairs.": lambda a, b, p: (
                torch.sigmoid(a - b) - p
            ),
            "this is right where everybody preferred the first; with p below 1 the second pulls,"
            " too.": scaled(lambda a, b, p: p * (1 - torch.sigmoid(a - b))),
            "the labels are not used.": scaled(lambda a, b, p: 1 - torch.sigmoid(a - b)),
            "these are the losses; their derivative is asked for.": lambda a, b, p: (
                -(p * logsigmoid(a - b) + (1 - p) * logsigmoid(b - a))
            ),
        },
    )


def check_last_score(answer: Function) -> None:
    """Exercise 2: answer(scores [N, T], mask [N, T]) -> the score at the last real token, [N]."""

    def at(scores: Tensor, column: Tensor) -> Tensor:
        return scores[torch.arange(len(scores)), column]

    def last(mask: Tensor) -> Tensor:
        return (mask * torch.arange(mask.shape[1])).argmax(1)

    scores = vector([[1.0, 5.0, 2.0, -3.0], [0.5, -1.0, 4.0, 7.0], [3.0, 2.0, 6.0, 8.0]])
    right = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 0]])
    judge(
        answer,
        lambda s, m: at(s, last(m)),
        [(scores, right), (scores, right.flip(1)), (scores[:1], torch.tensor([[0, 1, 1, 0]]))],
        {
            "right under padding on the right only: with padding on the left the last token is "
            "further on.": lambda s, m: at(s, m.sum(1) - 1),
            "this is the mean over the tokens; the score is read at one of them.": lambda s, m: (
                (s * m).sum(1) / m.sum(1)
            ),
            "this is the largest score of each text; the last one is asked for.": lambda s, m: (
                s.masked_fill(m == 0, -torch.inf).amax(1)
            ),
            "this is the first real token; it has read nothing yet.": lambda s, m: at(
                s, m.argmax(1)
            ),
        },
        untouched=lambda s, m: s[:, -1],
    )


def check_noise_ceiling(answer: Function) -> None:
    """Exercise 4: answer(p [N]) -> the best accuracy at predicting the majority of three."""

    def majority(p: Tensor) -> Tensor:
        return p.square() * (3 - 2 * p)

    def best(p: Tensor) -> Tensor:
        return torch.maximum(p, 1 - p)

    judge(
        answer,
        lambda p: best(majority(p)).mean(),
        [(vector([0.9, 0.2, 0.5]),), (vector([0.1, 0.35, 0.6, 0.99]),)],
        {
            "this is the ceiling for one annotator; the label is what two of three say.": (
                lambda p: best(p).mean()
            ),
            "this is how often the majority prefers the first; where that is below ½, predict "
            "the other.": lambda p: majority(p).mean(),
            "this asks for all three to say the same; two are enough.": (
                lambda p: torch.maximum(p**3, (1 - p) ** 3).mean()
            ),
            "there are three ways in which two of three prefer the first.": (
                lambda p: best(p**3 + p**2 * (1 - p)).mean()
            ),
            "this leaves out the case where all three agree.": (
                lambda p: best(3 * p**2 * (1 - p)).mean()
            ),
            "this is the best pair; the mean over pairs is asked for.": (
                lambda p: best(majority(p)).max()
            ),
        },
    )


def check_score_gap(answer: float | None) -> None:
    """Exercise 1: the gap between first and third, from P(1st over 2nd) = 0.8 and P(2nd over 3rd)
    = 0.9."""
    judge_number(
        answer,
        3.584,
        {
            "that is the probability that the first is preferred to the third; the gap is its "
            "logit.": (36 / 37),
            "those are the odds; the gap is their logarithm.": 36.0,
            "the probabilities are multiplied here; it is the gaps that add up.": 0.944,
            "both gaps point the same way; add them.": 0.811,
            "that is the logarithm to base 10; scores are in natural units.": 1.556,
            "that is the gap between first and second alone.": 1.386,
            "that is the gap between second and third alone.": 2.197,
        },
    )


def check_blind_answers(answer: float | None) -> None:
    """Exercise 5: by which factor the fitted gap between the first and the last text changes if one
    answer in ten is a coin toss."""
    judge_number(
        answer,
        0.78,
        {
            "the order stays, but a score is a log-odds: it knows how decided people are (and nine"
            " tenths of all wins are no less decided: the coins' wins are missing).": 1.0,
            "nine answers in ten look, but log-odds do not shrink in proportion to them.": 0.9,
            "blind answers are less decided, so scores move together, not apart; is the ratio the"
            " right way up?": 1.28,
            "a blind answer is right half of the time: one answer in twenty goes the other way, not"
            " one in ten.": 0.63,
            "half of the coins fall for either side: the two shares of a pair add up to 1.": 0.65,
            "that is the pair by itself; the fit has one score a text for all fifteen pairs.": 0.6,
        },
    )


_SEEDS = (20, 21, 22)  # of the data that a fit is tried on


def _weights(answer: Function, chosen: Tensor, rejected: Tensor) -> Tensor | None:
    given = answer(chosen.clone(), rejected.clone())
    return None if given is None else numbers(given)


def check_fit(answer: Function) -> None:
    """Exercise 6: answer(chosen [N, D], rejected [N, D]) -> weights [D] of a linear reward."""
    ways, slopes = [], []
    for seed in _SEEDS:
        true, chosen, rejected, gaps = _choices(seed)
        weights = attempt(partial(_weights, answer, chosen, rejected))
        if weights is None:
            return
        if weights.shape != true.shape or not weights.isfinite().all():
            print(f"Not yet: return {len(true)} finite numbers, one weight for each feature.")
            return
        p = torch.sigmoid(gaps @ true)
        right = torch.where(gaps @ weights > 0, p, 1 - p).mean()
        ways.append(((right - 0.5) / (torch.maximum(p, 1 - p).mean() - 0.5)).item())
        slopes.append(((weights @ true) / (true @ true)).item())
    way, slope = sum(ways) / len(ways), sum(slopes) / len(slopes)
    if way < -0.5:
        print("Not yet: the sign is wrong; the rejected responses score higher.")
    elif way < 0.9:
        print(
            f"Not yet: on held-out pairs your weights have a skill of {way:.0%}; it should be more"
            " than 90%. Does the loss see the difference of the two scores, and does each step take"
            " all pairs?"
        )
    elif not 0.8 < slope < 1.25:
        print(
            f"Not yet: the order is right, but your gaps are {slope:.1f} times the true log-odds."
            " Is it the mean surprise that you made small, and did you go on until it stood still?"
        )
    else:
        print("Right.")


def _choices(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """True weights, features of 2,000 chosen and rejected responses, and held-out differences."""
    generator = torch.Generator().manual_seed(seed)
    true = torch.randn(6, generator=generator, dtype=torch.float64) * 0.7
    first, second, one, two = torch.randn(4, 2000, 6, generator=generator, dtype=torch.float64)
    luck = torch.rand(2000, generator=generator, dtype=torch.float64)
    wins = (luck < torch.sigmoid((first - second) @ true))[:, None]
    chosen, rejected = torch.where(wins, first, second), torch.where(wins, second, first)
    return true, chosen, rejected, one - two
