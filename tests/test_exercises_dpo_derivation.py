"""The checks of dpo_derivation: stub, right answer, and each typical mistake."""

import math

import pytest
import torch

from rlhf_helpers.book.checks import dpo_derivation as checks


def said(capsys, check, answer):
    check(answer)
    return capsys.readouterr().out.strip()


def best_policy(ref, rewards, beta):
    """In plain Python."""
    weights = [p * math.exp(r / beta) for p, r in zip(ref.tolist(), rewards.tolist(), strict=True)]
    return torch.tensor([w / sum(weights) for w in weights], dtype=torch.float64)


def hidden_reward(ref, best, beta, mean_under=None, sign=1):
    found = [
        sign * beta * math.log(q / p) for p, q in zip(ref.tolist(), best.tolist(), strict=True)
    ]
    weights = ref.tolist() if mean_under is None else mean_under
    mean = sum(w * r for w, r in zip(weights, found, strict=True))
    return torch.tensor([r - mean for r in found], dtype=torch.float64)


def implicit_reward(log_p, ref, mask, beta):
    pairs = zip(log_p.tolist(), ref.tolist(), mask.tolist(), strict=True)
    return sum(beta * (p - q) for p, q, m in pairs if m)


def buggy(log_p, ref, mask, beta):
    return beta * (log_p * mask).sum() - beta * (ref * mask).sum() / mask.sum()


@pytest.mark.parametrize(
    ("check", "stub"),
    [
        (checks.check_best_policy, lambda *x: None),
        (checks.check_hidden_reward, lambda *x: None),
        (checks.check_implicit_reward, lambda *x: None),
        (checks.check_implicit_reward, buggy),
        (checks.check_pair_weight, None),
    ],
)
def test_stub_is_not_attempted(capsys, check, stub):
    assert said(capsys, check, stub).startswith("Not attempted")


@pytest.mark.parametrize(
    ("check", "answer"),
    [
        (checks.check_best_policy, best_policy),
        (checks.check_hidden_reward, hidden_reward),
        (checks.check_implicit_reward, implicit_reward),
        (checks.check_pair_weight, 0.0047426),
    ],
)
def test_right_answer(capsys, check, answer):
    assert said(capsys, check, answer) == "Right."


@pytest.mark.parametrize(
    ("check", "answer", "message"),
    [
        (checks.check_best_policy, lambda p, r, b: p * torch.exp(r / b), "divide by the sum"),
        (
            checks.check_best_policy,
            lambda p, r, b: best_policy(torch.ones(3), r, b),
            "reference is missing",
        ),
        (
            checks.check_best_policy,
            lambda p, r, b: best_policy(p, r * b, 1.0),
            "multiplied by beta",
        ),
        (checks.check_best_policy, lambda p, r, b: best_policy(p, r, 1.0), "beta is missing"),
        (
            checks.check_best_policy,
            lambda p, r, b: torch.softmax(p + r / b, 0),
            "their logarithms belong there",
        ),
        (
            checks.check_hidden_reward,
            lambda *x: hidden_reward(*x, [0.0] * 3),
            "right up to a constant",
        ),
        (
            checks.check_hidden_reward,
            lambda *x: hidden_reward(*x, [1 / 3] * 3),
            "shifted by the plain mean",
        ),
        (
            checks.check_hidden_reward,
            lambda p, q, b: hidden_reward(p, q, b, q.tolist()),
            "it is the reference that should",
        ),
        (
            checks.check_hidden_reward,
            lambda *x: hidden_reward(*x, sign=-1),
            "the sign is turned round",
        ),
        (checks.check_hidden_reward, lambda p, q, b: hidden_reward(p, q, 1.0), "beta is missing"),
        (
            checks.check_hidden_reward,
            lambda p, q, b: hidden_reward(p, q, 1.0) / b,
            "divides by beta",
        ),
        (
            checks.check_implicit_reward,
            lambda p, q, m, b: implicit_reward(p, q, m, b) / int(m.sum()),
            "both are means now",
        ),
        (
            checks.check_implicit_reward,
            lambda p, q, m, b: b * float(p.sum() - q.sum()),
            "the mask is gone",
        ),
        (
            checks.check_implicit_reward,
            lambda p, q, m, b: -implicit_reward(p, q, m, b),
            "the sign is turned round",
        ),
        (
            checks.check_implicit_reward,
            lambda p, q, m, b: implicit_reward(p, 0 * q, m, b),
            "the reference is gone",
        ),
        (checks.check_pair_weight, 0.09526, "the margin is +3"),
        (checks.check_pair_weight, 0.047426, "the sigmoid alone"),
        (checks.check_pair_weight, 0.0, "belongs into the margin"),
        (checks.check_pair_weight, 0.05, "the start of training"),
    ],
)
def test_typical_mistake_is_named(capsys, check, answer, message):
    verdict = said(capsys, check, answer)
    assert verdict.startswith("Not yet")
    assert message in verdict
