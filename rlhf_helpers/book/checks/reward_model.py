"""Checks of the exercises of reward_model."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf_helpers.book.checks.judge import Function, judge, judge_number, vector


def check_preference_probability(answer: Function) -> None:
    """Exercise 1: answer(score_1, score_2) -> P(the first is preferred), elementwise."""
    judge(
        answer,
        lambda a, b: torch.sigmoid(a - b),
        [
            (vector([2.0, 0.5, -1.0]), vector([1.0, 0.5, 3.0])),
            (vector([0.3]), vector([2.5])),
        ],
        {
            "the sign is turned round: this is the probability of the second.": lambda a, b: (
                torch.sigmoid(b - a)
            ),
            "these are shares of the scores; a score is the logarithm of a strength.": (
                lambda a, b: a / (a + b)
            ),
            "this is the log-odds; σ makes a probability of it.": lambda a, b: a - b,
            "this is the logarithm of the probability.": lambda a, b: logsigmoid(a - b),
        },
    )


def check_bradley_terry_loss(answer: Function) -> None:
    """Exercise 2: answer(chosen [N], rejected [N]) -> mean surprise of the choices."""
    far = (torch.tensor([0.0, 1.0]), torch.tensor([200.0, 0.0]))
    judge(
        answer,
        lambda c, r: -logsigmoid(c - r).mean(),
        [(vector([2.0, 0.5, -1.0]), vector([1.0, 1.5, 0.0])), far],
        {
            "infinite at a gap of −200, where exp overflows and σ becomes 0: take logsigmoid.": (
                lambda c, r: -torch.sigmoid(c - r).log().mean()
            ),
            "this is the sum over pairs; return the mean.": lambda c, r: -logsigmoid(c - r).sum(),
            "the sign is turned round: a surprise is never negative.": (
                lambda c, r: logsigmoid(c - r).mean()
            ),
            "chosen and rejected are swapped.": lambda c, r: -logsigmoid(r - c).mean(),
            "this is the mean probability; the surprise is minus its logarithm.": lambda c, r: (
                torch.sigmoid(c - r).mean()
            ),
            "each score stands by itself here; only their difference has a meaning.": (
                lambda c, r: -(logsigmoid(c) + logsigmoid(-r)).mean()
            ),
            "the rejected score is missing; the loss is that of the difference.": lambda c, r: (
                -logsigmoid(c).mean()
            ),
        },
    )


def check_last_score(answer: Function) -> None:
    """Exercise 3: answer(scores [N, T], mask [N, T]) -> the score at the last real token, [N]."""

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
    """Exercise 5: the gap between first and third, from P(1st over 2nd) = 0.8 and P(2nd over 3rd)
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
