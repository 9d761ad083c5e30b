"""The checks of gpt2_sentiment_ppo: stub, right answer, and each typical mistake."""

import math

import pytest
import torch

from rlhf_helpers.book.checks import gpt2_sentiment_ppo as checks


def said(capsys, check, answer):
    check(answer)
    return capsys.readouterr().out.strip()


def token_rewards(score, log_probs, ref, beta, at=-1, sign=-1, last=True):
    """One token after the other, in plain Python."""
    found = [sign * beta * (p - q) for p, q in zip(log_probs.tolist(), ref.tolist(), strict=True)]
    found[at] = found[at] * last + score
    return torch.tensor(found, dtype=torch.float64)


def all_at_the_end(score, log_probs, ref, beta):
    price = beta * sum((log_probs - ref).tolist())
    return torch.tensor([0.0] * (len(ref) - 1) + [score - price], dtype=torch.float64)


def harmonic(n):
    """Without ties the rank u of the best has density n·u^(n − 1); E[log of it] by hand."""
    return math.log(n) + (n - 1) * (-1 / n)


@pytest.mark.parametrize(
    ("check", "stub"),
    [
        (checks.check_token_rewards, lambda *x: None),
        (checks.check_value_targets, lambda *x: None),
        (checks.check_value_targets, lambda a, v: (a - a.mean()) * a.var() ** -0.5 + v),
        (checks.check_best_of_n_kl, lambda n: None),
        (checks.check_adaptive_coefficient, None),
    ],
)
def test_stub_is_not_attempted(capsys, check, stub):
    assert said(capsys, check, stub).startswith("Not attempted")


@pytest.mark.parametrize(
    ("check", "answer"),
    [
        (checks.check_token_rewards, token_rewards),
        (checks.check_value_targets, lambda a, v: v + a),
        (checks.check_best_of_n_kl, harmonic),
        (checks.check_adaptive_coefficient, 0.05128),
    ],
)
def test_right_answer(capsys, check, answer):
    assert said(capsys, check, answer) == "Right."


@pytest.mark.parametrize(
    ("check", "answer", "message"),
    [
        (checks.check_token_rewards, lambda *x: token_rewards(*x, sign=1), "paid for, not charged"),
        (checks.check_token_rewards, lambda s, p, q, b: s + b * (q - p), "on every token"),
        (checks.check_token_rewards, lambda *x: token_rewards(*x, at=0), "on the first token"),
        (checks.check_token_rewards, all_at_the_end, "each token pays its own"),
        (checks.check_token_rewards, lambda *x: token_rewards(*x, last=False), "pays no price"),
        (
            checks.check_token_rewards,
            lambda s, p, q, b: token_rewards(s, p, q, 1),
            "beta is missing",
        ),
        (checks.check_value_targets, lambda a, v: 1.0 * a, "the advantages alone"),
        (checks.check_value_targets, lambda a, v: a - v, "sign of the values"),
        (
            checks.check_value_targets,
            lambda a, v: (a + v - (a + v).mean()) / (a + v).std(),
            "is whitened now",
        ),
        (
            checks.check_value_targets,
            lambda a, v: v + a - a.sum() / len(a),
            "the mean is still taken",
        ),
        (checks.check_best_of_n_kl, math.log, "the second term is missing"),
        (checks.check_best_of_n_kl, lambda n: math.log(n, 2) - 1 + 1 / n, "in bits"),
        (checks.check_best_of_n_kl, lambda n: math.log(n) - 1 / n, "is (n − 1)/n"),
        (checks.check_best_of_n_kl, lambda n: math.log(n) + 1 - 1 / n, "not added"),
        (checks.check_adaptive_coefficient, 0.0564, "clipped to ±0.2"),
        (checks.check_adaptive_coefficient, 0.04872, "the wrong way"),
        (checks.check_adaptive_coefficient, 0.06, "samples over horizon"),
        (checks.check_adaptive_coefficient, 0.1, "twice the price"),
    ],
)
def test_typical_mistake_is_named(capsys, check, answer, message):
    verdict = said(capsys, check, answer)
    assert verdict.startswith("Not yet")
    assert message in verdict
