"""The checks of grpo: stub, right answer, and each typical mistake."""

import itertools
import math

import pytest
import torch

from rlhf_helpers.book.checks import grpo as checks


def said(capsys, check, answer):
    check(answer)
    return capsys.readouterr().out.strip()


def group_advantages(rewards, less_one=1, eps=1e-4, power=0.5, sign=1):
    """In plain Python."""
    values = rewards.tolist()
    mean = sum(values) / len(values)
    variance = sum((r - mean) ** 2 for r in values) / (len(values) - less_one)
    return torch.tensor(
        [sign * (r - mean) / (variance**power + eps) for r in values], dtype=torch.float64
    )


def pass_at_k(n, right, k, wanted=any):
    """By going through all choices of k answers."""
    answers = [True] * right + [False] * (n - right)
    choices = list(itertools.combinations(answers, k))
    return sum(wanted(choice) for choice in choices) / len(choices)


def mean_of_means(values, mask):
    rows = zip(values.tolist(), mask.tolist(), strict=True)
    means = [sum(v * m for v, m in zip(*row, strict=True)) / sum(row[1]) for row in rows]
    return sum(means) / len(means)


def buggy(values, mask):
    return (values * mask).sum() / mask.numel()


@pytest.mark.parametrize(
    ("check", "stub"),
    [
        (checks.check_group_advantages, lambda *x: None),
        (checks.check_pass_at_k, lambda *x: None),
        (checks.check_mean_of_means, lambda *x: None),
        (checks.check_mean_of_means, buggy),
        (checks.check_constant_share, None),
    ],
)
def test_stub_is_not_attempted(capsys, check, stub):
    assert said(capsys, check, stub).startswith("Not attempted")


@pytest.mark.parametrize(
    ("check", "answer"),
    [
        (checks.check_group_advantages, group_advantages),
        (checks.check_pass_at_k, pass_at_k),
        (checks.check_mean_of_means, mean_of_means),
        (checks.check_constant_share, 0.43046722),
        (checks.check_constant_share, 0.43),
    ],
)
def test_right_answer(capsys, check, answer):
    assert said(capsys, check, answer) == "Right."


@pytest.mark.parametrize(
    ("check", "answer", "message"),
    [
        (checks.check_group_advantages, lambda r: (r - r.mean()) / torch.std(r), "gives NaN"),
        (
            checks.check_group_advantages,
            lambda r: group_advantages(r, less_one=0),
            "biased standard deviation",
        ),
        (
            checks.check_group_advantages,
            lambda r: group_advantages(r, power=1),
            "divides by the variance",
        ),
        (
            checks.check_group_advantages,
            lambda r: (r - r.mean()) / torch.sqrt(torch.var(r) + 1e-4),
            "added to the variance",
        ),
        (checks.check_group_advantages, lambda r: r - r.mean(), "not yet divided"),
        (
            checks.check_group_advantages,
            lambda r: r / (torch.std(r) + 1e-4),
            "mean was not taken off",
        ),
        (
            checks.check_group_advantages,
            lambda r: group_advantages(r, sign=-1),
            "the sign is turned round",
        ),
        (checks.check_pass_at_k, lambda n, c, k: 1 - math.pow((n - c) / n, k), "put back"),
        (checks.check_pass_at_k, lambda n, c, k: 1 - pass_at_k(n, c, k), "none is right"),
        (checks.check_pass_at_k, lambda n, c, k: pass_at_k(n, c, k, all), "all k are right"),
        (checks.check_pass_at_k, lambda n, c, k: c / n, "pass@1"),
        (
            checks.check_mean_of_means,
            lambda v, m: torch.masked.mean(v, mask=m.bool()),
            "all tokens count alike",
        ),
        (
            checks.check_mean_of_means,
            lambda v, m: (v * m).sum() / len(v),
            "not divided by their lengths",
        ),
        (checks.check_mean_of_means, lambda v, m: v.mean(), "the mask is gone"),
        (
            checks.check_mean_of_means,
            lambda v, m: (v * m).sum() / len(v) / m.sum(1).max(),
            "the longest answer",
        ),
        (checks.check_constant_share, 0.56953, "teach something"),
        (checks.check_constant_share, 1e-8, "all wrong teaches nothing"),
        (checks.check_constant_share, 0.9, "one wrong answer"),
        (checks.check_constant_share, 0.1, "the pass rate"),
        (checks.check_constant_share, 43.05, "between 0 and 1"),
    ],
)
def test_typical_mistake_is_named(capsys, check, answer, message):
    verdict = said(capsys, check, answer)
    assert verdict.startswith("Not yet")
    assert message in verdict
