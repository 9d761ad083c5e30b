"""The checks of chapter 06."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf_helpers.book.checks.judge import Function, judge, judge_number, vector


def check_preference_probability(answer: Function) -> None:
    """Exercise 6.1: answer(score_1, score_2) -> P(the first is preferred), elementwise."""
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
            "these are shares of the scores; a score is the logarithm of a strength.": lambda a, b: (
                a / (a + b)
            ),
            "this is the log-odds; σ makes a probability of it.": lambda a, b: a - b,
            "this is the logarithm of the probability.": lambda a, b: logsigmoid(a - b),
        },
    )


def check_bradley_terry_loss(answer: Function) -> None:
    """Exercise 6.2: answer(chosen [N], rejected [N]) -> mean surprise of the choices."""
    far = (torch.tensor([0.0, 1.0]), torch.tensor([200.0, 0.0]))
    judge(
        answer,
        lambda c, r: -logsigmoid(c - r).mean(),
        [(vector([2.0, 0.5, -1.0]), vector([1.0, 1.5, 0.0])), far],
        {
            "infinite at a gap of −200, where exp overflows and σ becomes 0: take logsigmoid.": lambda c, r: (
                -torch.sigmoid(c - r).log().mean()
            ),
            "this is the sum over pairs; return the mean.": lambda c, r: -logsigmoid(c - r).sum(),
            "the sign is turned round: a surprise is never negative.": lambda c, r: logsigmoid(
                c - r
            ).mean(),
            "chosen and rejected are swapped.": lambda c, r: -logsigmoid(r - c).mean(),
            "this is the mean probability; the surprise is minus its logarithm.": lambda c, r: (
                torch.sigmoid(c - r).mean()
            ),
            "each score stands by itself here; only their difference has a meaning.": lambda c, r: (
                -(logsigmoid(c) + logsigmoid(-r)).mean()
            ),
            "the rejected score is missing; the loss is that of the difference.": lambda c, r: (
                -logsigmoid(c).mean()
            ),
        },
    )


def check_last_score(answer: Function) -> None:
    """Exercise 6.3: answer(scores [N, T], mask [N, T]) -> the score at the last real token, [N]."""

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
            "right under padding on the right only: with padding on the left the last token is further on.": lambda s, m: (
                at(s, m.sum(1) - 1)
            ),
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
    """Exercise 6.4: answer(p [N]) -> the best accuracy that a predictor can have."""
    judge(
        answer,
        lambda p: torch.maximum(p, 1 - p).mean(),
        [(vector([0.9, 0.2, 0.5]),), (vector([0.1, 0.35, 0.6, 0.99]),)],
        {
            "this is the mean of p: how often the first is preferred.": lambda p: p.mean(),
            "this counts the pairs where the first is the better one.": lambda p: (
                (p > 0.5).double().mean()
            ),
            "this is how often two annotators agree; a predictor need not toss a coin.": lambda p: (
                p.square() + (1 - p).square()
            ).mean(),
            "this is the best pair; the mean over pairs is asked for.": lambda p: torch.maximum(
                p, 1 - p
            ).max(),
        },
    )


def check_score_gap(answer: float | None) -> None:
    """Exercise 6.5: the gap of scores at which the first is preferred 95 times in 100."""
    judge_number(
        answer,
        2.944,
        {
            "that is the probability itself; the gap is its logit.": 0.95,
            "those are the odds; the gap is their logarithm.": 19.0,
            "that is the logarithm of the probability; divide by the other one first.": -0.0513,
            "that is the logarithm to base 10; scores are in natural units.": 1.279,
            "that is the difference of the two probabilities, not of the scores.": 0.9,
        },
    )
