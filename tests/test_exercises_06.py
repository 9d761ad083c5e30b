"""The checks of chapter 06: stub, right answer, and each typical mistake."""

import math

import pytest
import torch

from rlhf_helpers.book import checks


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
        (checks.check_preference_probability, each(lambda a, b: math.exp(a) / (math.exp(a) + math.exp(b)))),
        (checks.check_bradley_terry_loss, loss),
        (checks.check_last_score, last_score),
        (checks.check_noise_ceiling, lambda p: 0.5 + (p - 0.5).abs().mean()),
        (checks.check_score_gap, math.log(19)),
    ],
)  # fmt: skip
def test_right_answer(capsys, check, answer):
    assert said(capsys, check, answer) == "Right."


@pytest.mark.parametrize(
    ("check", "answer", "message"),
    [
        (checks.check_preference_probability, each(lambda a, b: 1 / (1 + math.exp(a - b))), "of the second"),
        (checks.check_preference_probability, each(lambda a, b: a / (a + b)), "logarithm of a strength"),
        (checks.check_preference_probability, each(lambda a, b: a - b), "this is the log-odds"),
        (checks.check_preference_probability, each(lambda a, b: -surprise(a - b)), "the logarithm of the probability"),
        (checks.check_bradley_terry_loss, lambda c, r: -(1 / (1 + (r - c).exp())).log().mean(), "take logsigmoid"),
        (checks.check_bradley_terry_loss, lambda c, r: (1 + (r - c).exp()).log().mean(), "take logsigmoid"),
        (checks.check_bradley_terry_loss, lambda c, r: loss(c, r) * len(c), "the sum over pairs"),
        (checks.check_bradley_terry_loss, lambda c, r: -loss(c, r), "never negative"),
        (checks.check_bradley_terry_loss, lambda c, r: loss(r, c), "are swapped"),
        (checks.check_bradley_terry_loss, lambda c, r: (1 / (1 + (r - c).exp())).mean(), "the mean probability"),
        (
            checks.check_bradley_terry_loss,
            lambda c, r: loss(c, r, lambda c, r: c) + loss(c, r, lambda c, r: -r),
            "stands by itself",
        ),
        (checks.check_bradley_terry_loss, lambda c, r: loss(c, r, lambda c, r: c), "the rejected score is missing"),
        (checks.check_last_score, lambda s, m: torch.stack([row[n - 1] for row, n in zip(s, m.sum(1), strict=True)]), "padding on the right only"),
        (checks.check_last_score, lambda s, m: torch.stack([row[c.bool()].mean() for row, c in zip(s, m, strict=True)]), "the mean over the tokens"),
        (checks.check_last_score, lambda s, m: torch.stack([row[c.bool()].max() for row, c in zip(s, m, strict=True)]), "the largest score"),
        (checks.check_last_score, lambda s, m: last_score(s, m, min), "the first real token"),
        (checks.check_noise_ceiling, lambda p: p.sum() / len(p), "the mean of p"),
        (checks.check_noise_ceiling, lambda p: sum(x > 0.5 for x in p.tolist()) / len(p), "the first is the better one"),
        (checks.check_noise_ceiling, lambda p: (1 - 2 * p * (1 - p)).mean(), "two annotators agree"),
        (checks.check_noise_ceiling, lambda p: 0.5 + (p - 0.5).abs().max(), "the best pair"),
        (checks.check_score_gap, 0.95, "the probability itself"),
        (checks.check_score_gap, 19, "the odds"),
        (checks.check_score_gap, math.log(0.95), "divide by the other"),
        (checks.check_score_gap, math.log10(19), "base 10"),
        (checks.check_score_gap, 0.9, "difference of the two probabilities"),
    ],
)  # fmt: skip
def test_typical_mistake_is_named(capsys, check, answer, message):
    verdict = said(capsys, check, answer)
    assert verdict.startswith("Not yet")
    assert message in verdict
