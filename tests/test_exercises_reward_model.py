"""The checks of reward_model: stub, right answer, and each typical mistake."""

import itertools
import math

import pytest
import torch

from rlhf_helpers.book.checks import reward_model as checks


def said(capsys, check, answer):
    check(answer)
    return capsys.readouterr().out.strip()


def each(function):
    """A function of two numbers, applied to tensors pair by pair."""
    return lambda a, b: torch.tensor(
        [function(x, y) for x, y in zip(a.tolist(), b.tolist(), strict=True)], dtype=torch.float64
    )


def surprise(gap):
    return math.log1p(math.exp(-gap)) if gap > -30 else -gap


def last_score(scores, mask, pick=max):
    found = []
    for row, counts in zip(scores.tolist(), mask.tolist(), strict=True):
        found.append(row[pick(i for i, one in enumerate(counts) if one)])
    return torch.tensor(found)


def loss(chosen, rejected, gap=lambda c, r: c - r):
    gaps = [gap(c, r) for c, r in zip(chosen.tolist(), rejected.tolist(), strict=True)]
    return sum(map(surprise, gaps)) / len(gaps)


def majority_ceiling(p, best=lambda q: max(q, 1 - q), enough=(2, 3)):
    """The eight ways in which three annotators can answer, one by one."""
    found = []
    for one in p.tolist():
        ways = [w for w in itertools.product((0, 1), repeat=3) if sum(w) in enough]
        found.append(best(sum(math.prod(one if x else 1 - one for x in way) for way in ways)))
    return sum(found) / len(found)


@pytest.mark.parametrize(
    ("check", "stub"),
    [
        (checks.check_preference_probability, lambda a, b: None),
        (checks.check_bradley_terry_loss, lambda c, r: None),
        (checks.check_last_score, lambda s, m: None),
        (checks.check_last_score, lambda s, m: s[..., s.shape[1] - 1]),
        (checks.check_noise_ceiling, lambda p: None),
        (checks.check_score_gap, None),
    ],
)
def test_stub_is_not_attempted(capsys, check, stub):
    assert said(capsys, check, stub).startswith("Not attempted")


@pytest.mark.parametrize(
    ("check", "answer"),
    [
        (
            checks.check_preference_probability,
            each(lambda a, b: math.exp(a) / (math.exp(a) + math.exp(b))),
        ),
        (checks.check_bradley_terry_loss, loss),
        (checks.check_last_score, last_score),
        (checks.check_noise_ceiling, majority_ceiling),
        (checks.check_score_gap, math.log(4) + math.log(9)),
    ],
)
def test_right_answer(capsys, check, answer):
    assert said(capsys, check, answer) == "Right."


@pytest.mark.parametrize(
    ("check", "answer", "message"),
    [
        (
            checks.check_preference_probability,
            each(lambda a, b: 1 / (1 + math.exp(a - b))),
            "of the second",
        ),
        (
            checks.check_preference_probability,
            each(lambda a, b: a / (a + b)),
            "logarithm of a strength",
        ),
        (checks.check_preference_probability, each(lambda a, b: a - b), "this is the log-odds"),
        (
            checks.check_preference_probability,
            each(lambda a, b: -surprise(a - b)),
            "the logarithm of the probability",
        ),
        (
            checks.check_bradley_terry_loss,
            lambda c, r: -(1 / (1 + (r - c).exp())).log().mean(),
            "take logsigmoid",
        ),
        (
            checks.check_bradley_terry_loss,
            lambda c, r: (1 + (r - c).exp()).log().mean(),
            "take logsigmoid",
        ),
        (checks.check_bradley_terry_loss, lambda c, r: loss(c, r) * len(c), "the sum over pairs"),
        (checks.check_bradley_terry_loss, lambda c, r: -loss(c, r), "never negative"),
        (checks.check_bradley_terry_loss, lambda c, r: loss(r, c), "are swapped"),
        (
            checks.check_bradley_terry_loss,
            lambda c, r: (1 / (1 + (r - c).exp())).mean(),
            "the mean probability",
        ),
        (
            checks.check_bradley_terry_loss,
            lambda c, r: loss(c, r, lambda c, r: c) + loss(c, r, lambda c, r: -r),
            "stands by itself",
        ),
        (
            checks.check_bradley_terry_loss,
            lambda c, r: loss(c, r, lambda c, r: c),
            "the rejected score is missing",
        ),
        (
            checks.check_last_score,
            lambda s, m: torch.stack([row[n - 1] for row, n in zip(s, m.sum(1), strict=True)]),
            "padding on the right only",
        ),
        (
            checks.check_last_score,
            lambda s, m: torch.stack([row[c.bool()].mean() for row, c in zip(s, m, strict=True)]),
            "the mean over the tokens",
        ),
        (
            checks.check_last_score,
            lambda s, m: torch.stack([row[c.bool()].max() for row, c in zip(s, m, strict=True)]),
            "the largest score",
        ),
        (checks.check_last_score, lambda s, m: last_score(s, m, min), "the first real token"),
        (checks.check_noise_ceiling, lambda p: 0.5 + (p - 0.5).abs().mean(), "for one annotator"),
        (
            checks.check_noise_ceiling,
            lambda p: majority_ceiling(p, best=lambda q: q),
            "predict the other",
        ),
        (
            checks.check_noise_ceiling,
            lambda p: sum(max(x**3, (1 - x) ** 3) for x in p.tolist()) / len(p),
            "two are enough",
        ),
        (
            checks.check_noise_ceiling,
            lambda p: sum(max(x**2, 1 - x**2) for x in p.tolist()) / len(p),
            "three ways",
        ),
        (checks.check_noise_ceiling, lambda p: majority_ceiling(p, enough=(2,)), "all three agree"),
        (
            checks.check_noise_ceiling,
            lambda p: max(majority_ceiling(x[None]) for x in p),
            "the best pair",
        ),
        (checks.check_score_gap, 1 / (1 + 1 / 36), "its logit"),
        (checks.check_score_gap, 36, "the odds"),
        (checks.check_score_gap, math.log(0.72 / 0.28), "are multiplied"),
        (checks.check_score_gap, math.log(9) - math.log(4), "add them"),
        (checks.check_score_gap, math.log10(36), "base 10"),
        (checks.check_score_gap, math.log(4), "first and second alone"),
        (checks.check_score_gap, math.log(9), "second and third alone"),
    ],
)
def test_typical_mistake_is_named(capsys, check, answer, message):
    verdict = said(capsys, check, answer)
    assert verdict.startswith("Not yet")
    assert message in verdict
