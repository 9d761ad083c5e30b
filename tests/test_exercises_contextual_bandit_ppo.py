"""The checks of contextual_bandit_ppo: stub, right answer, and each typical mistake."""

import itertools
import re

import pytest
import torch

from rlhf_helpers.book.checks import contextual_bandit_ppo as checks


def said(capsys, check, answer):
    check(answer)
    return capsys.readouterr().out.strip()


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


def less_the_mean(log_ratios):
    weights = (log_ratios - log_ratios.mean()).exp()
    return weights.sum() ** 2 / (weights**2).sum()


def kong(log_ratios):
    weights = torch.softmax(log_ratios, 0)
    return 1 / (weights**2).sum()


def loop(objective, steps=16, rate=0.2, sign=-1, rollouts=30):
    """A training loop that passes or fails by its objective of (ratio, advantage)."""

    def learn(collect):
        weights = torch.zeros(8, 8, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.Adam([weights], lr=rate)
        for _ in range(rollouts):
            contexts, actions, rewards, old = collect(weights)
            advantages = (rewards - rewards.mean()) / rewards.std()
            for _ in range(steps):
                new = torch.log_softmax(contexts @ weights.T, 1)[torch.arange(64), actions]
                optimizer.zero_grad()
                (sign * objective((new - old).exp(), advantages).mean()).backward()
                optimizer.step()
        return weights

    return learn


def pessimist(ratio, advantages):
    return torch.where(
        advantages > 0, ratio.clamp(max=1.2) * advantages, ratio.clamp(min=0.8) * advantages
    )


@pytest.mark.parametrize(
    ("check", "stub"),
    [
        (checks.check_without_stretch, None),
        (checks.check_ppo_loop, lambda collect: None),
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
        (checks.check_without_stretch, -1),
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
        (checks.check_without_stretch, 1, "run it"),
        (checks.check_ppo_loop, lambda collect: torch.zeros(8), "a tensor [8, 8]"),
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


@pytest.mark.parametrize("rate", [0.1, 0.2, 0.4])
def test_a_loop_with_ratio_clip_and_epochs_is_right(capsys, rate):
    assert said(capsys, checks.check_ppo_loop, loop(pessimist, rate=rate)) == "Right."


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (loop(pessimist, steps=1, rate=0.4), "One step per rollout brings"),
        (loop(lambda ratio, advantages: ratio.log() * advantages, rate=0.025), "sixteen steps"),
        (
            loop(lambda ratio, advantages: (ratio / ratio.detach()) * advantages, rate=0.025),
            "as collect returns them",
        ),
        (loop(lambda ratio, advantages: ratio * advantages, rate=0.05), "and clip"),
        (loop(pessimist, sign=1), "the sign of the loss"),
        (loop(pessimist, rollouts=31), "30 rollouts are used up"),
    ],
)
def test_what_a_loop_lacks_is_named(capsys, answer, message):
    verdict = said(capsys, checks.check_ppo_loop, answer)
    assert verdict.startswith("Not yet")
    assert message in verdict
