"""The checks of reward_model: stub, right answer, and each typical mistake."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from rlhf_helpers.book.checks import reward_model as checks


def said(capsys, check, answer):
    check(answer)
    return capsys.readouterr().out.strip()


def surprise(gap):
    return math.log1p(math.exp(-gap)) if gap > -30 else -gap


def last_score(scores, mask, pick=max):
    found = []
    for row, counts in zip(scores.tolist(), mask.tolist(), strict=True):
        found.append(row[pick(i for i, one in enumerate(counts) if one)])
    return torch.tensor(found)


def mean_loss(a, b, p):
    rows = zip(a.tolist(), b.tolist(), p.tolist(), strict=True)
    return sum(q * surprise(x - y) + (1 - q) * surprise(y - x) for x, y, q in rows) / len(a)


def differences(a, b, p, step=1e-6, loss=mean_loss):
    """Central differences of the mean loss by the scores in a."""
    rows = torch.eye(len(a), dtype=torch.float64) * step
    found = [(loss(a + row, b, p) - loss(a - row, b, p)) / (2 * step) for row in rows]
    return torch.tensor(found, dtype=torch.float64)


def newton(chosen, rejected, steps=20):
    """Maximum likelihood of a logistic regression, by Newton's method."""
    x = chosen - rejected
    weights = torch.zeros(x.shape[1], dtype=x.dtype)
    for _ in range(steps):
        wrong = 1 / (1 + (x @ weights).exp())
        hessian = (x * (wrong * (1 - wrong))[:, None]).T @ x
        weights = weights + torch.linalg.solve(hessian, x.T @ wrong)
    return weights


def by_scipy(chosen, rejected):
    """The same by SciPy's minimiser, without a gradient, as a list."""
    x = (chosen - rejected).numpy()
    return minimize(lambda w: np.logaddexp(0, -x @ w).mean(), np.zeros(x.shape[1])).x.tolist()


def majority_ceiling(p, best=lambda q: max(q, 1 - q), enough=(2, 3)):
    """The eight ways in which three annotators can answer, one by one."""
    found = []
    for one in p.tolist():
        ways = [w for w in itertools.product((0, 1), repeat=3) if sum(w) in enough]
        found.append(best(sum(math.prod(one if x else 1 - one for x in way) for way in ways)))
    return sum(found) / len(found)


def factor_of_gap(mix=lambda p: 0.9 * p + 0.05):
    """Bradley-Terry by SciPy's minimiser on all fifteen pairs: last gap over the true 4.6."""
    true = np.array([2.3, 1.0, 0.3, -0.3, -1.0, -2.3])
    i, j = np.triu_indices(6, 1)
    won, lost = (mix(1 / (1 + np.exp(-gap))) for gap in (true[i] - true[j], true[j] - true[i]))

    def loss(r):
        gap = r[i] - r[j]
        return (won * np.logaddexp(0, -gap) + lost * np.logaddexp(0, gap)).sum() + r.sum() ** 2

    found = minimize(loss, np.zeros(6)).x
    return float(found[0] - found[-1]) / 4.6


def factor_of_pair():
    share = 0.9 / (1 + math.exp(-4.6)) + 0.05
    return math.log(share / (1 - share)) / 4.6


@pytest.mark.parametrize(
    ("check", "stub"),
    [
        (checks.check_pair_gradient, lambda a, b, p: None),
        (checks.check_fit, lambda c, r: None),
        (checks.check_blind_answers, None),
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
        (checks.check_pair_gradient, differences),
        (
            checks.check_pair_gradient,
            lambda a, b, p: ((torch.sigmoid(a - b) - p) / len(a)).tolist(),
        ),
        (checks.check_fit, newton),
        (checks.check_fit, by_scipy),
        (checks.check_blind_answers, factor_of_gap()),
        (checks.check_blind_answers, 0.78),
        (checks.check_blind_answers, torch.tensor(0.783)),
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
        (checks.check_pair_gradient, lambda a, b, p: -differences(a, b, p), "has the other sign"),
        (
            checks.check_pair_gradient,
            lambda a, b, p: len(a) * differences(a, b, p),
            "gradient of the sum",
        ),
        (
            checks.check_pair_gradient,
            lambda a, b, p: -p * (1 - torch.sigmoid(a - b)) / len(a),
            "the second pulls",
        ),
        (
            checks.check_pair_gradient,
            lambda a, b, p: differences(a, b, torch.ones_like(p)),
            "labels are not used",
        ),
        (
            checks.check_pair_gradient,
            lambda a, b, p: [
                mean_loss(*(x[None] for x in row)) for row in zip(a, b, p, strict=True)
            ],
            "these are the losses",
        ),
        (checks.check_fit, lambda c, r: -newton(c, r), "the rejected responses score higher"),
        (checks.check_fit, lambda c, r: c.mean(0) * 0 + 1, "have a skill of"),
        (checks.check_fit, lambda c, r: (c - r).mean(0), "times the true log-odds"),
        (checks.check_fit, lambda c, r: 2 * newton(c, r), "times the true log-odds"),
        (checks.check_fit, lambda c, r: newton(c, r)[:2], "return 6 finite numbers"),
        (checks.check_fit, lambda c, r: c @ r, "your function raised RuntimeError"),
        (checks.check_blind_answers, 1 / factor_of_gap(), "right way up"),
        (checks.check_blind_answers, factor_of_gap(mix=lambda p: 0.9 * p), "how decided"),
        (checks.check_blind_answers, 0.9, "in proportion"),
        (checks.check_blind_answers, factor_of_gap(mix=lambda p: 0.8 * p + 0.1), "in twenty goes"),
        (checks.check_blind_answers, factor_of_gap(mix=lambda p: 0.9 * p + 0.1), "add up to 1"),
        (checks.check_blind_answers, factor_of_pair(), "the pair by itself"),
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
