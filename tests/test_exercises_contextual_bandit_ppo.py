"""The checks of contextual_bandit_ppo: stub, right answer, and each typical mistake."""

import itertools
import re

import pytest
import torch

from rlhf_helpers.book.checks import contextual_bandit_ppo as checks


def said(capsys, check, answer):
    check(answer)
    return capsys.readouterr().out.strip()


def clipped(ratio, clip):
    return sorted([1 - clip, ratio, 1 + clip])[1]


def ppo(new, old, advantages, clip):
    losses = []
    for n, o, a in zip(new, old, advantages, strict=True):
        ratio = (n - o).exp()
        losses.append(-torch.minimum(ratio * a, ratio.clamp(1 - clip, 1 + clip) * a))
    return sum(losses) / len(losses)


def upside_down(new, old, advantages, clip):
    ratio = (old - new).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages).mean()


def optimist(new, old, advantages, clip):
    ratio = (new - old).exp()
    return -torch.maximum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages).mean()


def bad_unclipped(ratio, advantage, clip):
    return advantage * (min(ratio, 1 + clip) if advantage > 0 else ratio)


def split(ratio, advantage, clip):
    if advantage > 0:
        return advantage * min(ratio, 1 + clip)
    return advantage * min(ratio, 1 / (1 - clip))


def less_the_mean(log_ratios):
    weights = (log_ratios - log_ratios.mean()).exp()
    return weights.sum() ** 2 / (weights**2).sum()


def kong(log_ratios):
    weights = torch.softmax(log_ratios, 0)
    return 1 / (weights**2).sum()


@pytest.mark.parametrize(
    ("check", "stub"),
    [
        (checks.check_clipped_objective, lambda ratio, advantage, clip: None),
        (checks.check_four_slopes, lambda: None),
        (checks.check_mended_loss, lambda *x: None),
        (checks.check_mended_loss, upside_down),
        (checks.check_effective_sample_size, lambda log_ratios: None),
    ],
)
def test_stub_is_not_attempted(capsys, check, stub):
    assert said(capsys, check, stub).startswith("Not attempted")


@pytest.mark.parametrize(
    ("check", "answer"),
    [
        (
            checks.check_clipped_objective,
            lambda r, a, c: r * a if r * a < clipped(r, c) * a else clipped(r, c) * a,
        ),
        (checks.check_four_slopes, lambda: [2, 0, -2, 0]),
        (checks.check_mended_loss, ppo),
        (checks.check_effective_sample_size, kong),
    ],
)
def test_right_answer(capsys, check, answer):
    assert said(capsys, check, answer) == "Right."


@pytest.mark.parametrize(
    ("check", "answer", "message"),
    [
        (
            checks.check_clipped_objective,
            lambda r, a, c: max(r * a, clipped(r, c) * a),
            "the larger of the two",
        ),
        (
            checks.check_clipped_objective,
            lambda r, a, c: clipped(r, c) * a,
            "the clipped term alone",
        ),
        (
            checks.check_clipped_objective,
            lambda r, a, c: min(r, 1 + c) * a,
            "the order turns round",
        ),
        (
            checks.check_clipped_objective,
            lambda r, a, c: -min(r * a, clipped(r, c) * a),
            "this is the loss",
        ),
        (checks.check_clipped_objective, bad_unclipped, "the bad samples are unclipped"),
        (checks.check_clipped_objective, split, "the 'split' objective"),
        (checks.check_four_slopes, lambda: (0.0, 0.0, -2.0, 0.0), "3 of 4 are right: case 1"),
        (checks.check_four_slopes, lambda: (2.5, 0.0, -2.0, 0.0), "the objective there"),
        (checks.check_four_slopes, lambda: (2.0, -1.0, -2.0, 0.0), "3 of 4 are right: case 2"),
        (checks.check_four_slopes, lambda: (2.0, 0.0, 0.0, 0.0), "3 of 4 are right: case 3"),
        (checks.check_four_slopes, lambda: (2.0, 0.0, 2.0, 0.0), "the size is right"),
        (checks.check_four_slopes, lambda: (2.0, 0.0, -2.0, -1.0), "without the dual clip"),
        (checks.check_four_slopes, lambda: (2.0, 0.0, -2.0, -3.0), "the objective there"),
        (checks.check_four_slopes, lambda: (0.0, -1.0, -2.0, 0.0), "2 of 4 are right: case 1"),
        (checks.check_four_slopes, lambda: (2.0, 0.0, -2.0), "return four numbers"),
        (checks.check_four_slopes, lambda: (1.0, 0.0, -1.0, 0.0), "not its sign"),
        (checks.check_mended_loss, optimist, "the maximum was right"),
        (
            checks.check_mended_loss,
            lambda n, o, a, c: optimist(o, n, a, c),
            "the ratio is upside down, and the maximum",
        ),
        (checks.check_mended_loss, lambda *x: -ppo(*x), "the sign was right"),
        (
            checks.check_effective_sample_size,
            lambda x: x.exp().sum() ** 2 / (2 * x).exp().sum(),
            "overflows",
        ),
        (checks.check_effective_sample_size, less_the_mean, "the mean is not enough"),
        (checks.check_effective_sample_size, lambda x: 1 / kong(x), "the squares are exchanged"),
        (checks.check_effective_sample_size, lambda x: kong(x) / len(x), "this is the share"),
        (
            checks.check_effective_sample_size,
            lambda x: x.sum() ** 2 / (x**2).sum(),
            "take the exponential",
        ),
    ],
)
def test_typical_mistake_is_named(capsys, check, answer, message):
    verdict = said(capsys, check, answer)
    assert verdict.startswith("Not yet")
    assert message in verdict


def test_value_without_gradient_is_not_enough(capsys):
    """A loss that is right in value but constant in the log-probabilities must not pass."""
    verdict = said(
        capsys, checks.check_mended_loss, lambda n, o, a, c: ppo(n.detach(), o, a, c) + 0 * n.sum()
    )
    assert verdict.startswith("Not yet")


def test_the_slopes_are_never_given_away(capsys):
    """Whatever is wrong, the verdict names a case and a count, but no slope that was asked for."""
    for given in itertools.product((0.0, 1.0, 5.0), repeat=4):
        verdict = said(capsys, checks.check_four_slopes, lambda given=given: given)
        assert re.match(r"Not yet, [0-3] of 4 are right: case [1-4]: ", verdict), given
        hint = verdict.split(": ", 2)[2]
        assert not re.search(r"\b2\b|-2|flat|slope (of|is) 0", hint), verdict


def test_slopes_that_raise_are_reported(capsys):
    assert said(capsys, checks.check_four_slopes, lambda: 1 / 0).startswith(
        "Not yet: your function"
    )
