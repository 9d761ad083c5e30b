"""The checks of gpt2_sentiment_ppo: stub, right answer, and each typical mistake."""

import math

import pytest
import torch

from rlhf_helpers.book.checks import gpt2_sentiment_ppo as checks


def said(capsys, check, answer):
    check(answer)
    return capsys.readouterr().out.strip()


def loss(log_probs, values, old, ref, old_values, scores, mask, beta, clip, c1, wrong=""):
    """Token by token, in plain loops; `wrong` names what is done wrong."""
    rows = []
    for i in range(len(scores)):
        length = int(mask[i].sum())
        target = torch.zeros((), dtype=torch.float64)
        for t in reversed(range(length)):
            now = log_probs if wrong == "price" else old
            reward = (-1 if wrong != "paid" else 1) * beta * (now[i, t] - ref[i, t])
            last = t == length - 1 if wrong != "column" else t == mask.shape[1] - 1
            if last or wrong == "everywhere":
                reward = reward + scores[i]
            target = reward if wrong == "returns" else target + reward
            base = values if wrong == "values" else old_values
            rows.append((i, t, target, target - base[i, t]))
    raw = torch.stack([one[3] for one in rows])
    if wrong == "padding":
        raw = torch.cat([raw, torch.zeros(mask.numel() - len(raw), dtype=torch.float64)])
    shift, scale = (0.0, 1.0) if wrong == "plain" else (raw.mean(), raw.std())
    gains, errors = {}, []
    for i, t, target, advantage in rows:
        white = (advantage - shift) / scale
        ratio = torch.exp(log_probs[i, t] - old[i, t])
        both = ratio * white, ratio.clip(1 - clip, 1 + clip) * white
        gain = {"free": both[0], "held": both[1], "max": max(both)}.get(wrong, min(both))
        gains.setdefault(i, []).append(gain)
        aim = white + old_values[i, t] if wrong == "targets" else target
        errors.append((values[i, t] - aim) ** 2)
    count = mask.numel() if wrong == "all" else len(rows)
    policy = -sum(sum(one) for one in gains.values()) / count
    if wrong == "rows":
        policy = -sum(sum(one) / len(one) for one in gains.values()) / len(gains)
    if wrong == "sign":
        policy = -policy
    half = 1 if wrong == "half" else 2
    return policy + (1 if wrong == "c1" else c1) * sum(errors) / len(errors) / half


def whitened(x):
    return (x - x.mean()) * x.var() ** -0.5


@pytest.mark.parametrize(
    ("check", "stub"),
    [
        (checks.check_ppo_loss, lambda *x: None),
        (checks.check_diagnosis, {"A": None, "B": None, "C": None}),
        (checks.check_same_beta, None),
        (checks.check_batches, None),
        (checks.check_prepare, lambda *x: None),
        (checks.check_prepare, lambda a, v: (whitened(a), v + whitened(a))),
    ],
)
def test_stub_is_not_attempted(capsys, check, stub):
    assert said(capsys, check, stub).startswith("Not attempted")


@pytest.mark.parametrize(
    ("check", "answer"),
    [
        (checks.check_ppo_loss, loss),
        (checks.check_diagnosis, {"A": "Hacked", "B": "moving", "C": " healthy"}),
        (checks.check_same_beta, 0.4),
        (checks.check_batches, 14),
        (checks.check_batches, 14.1),
        (checks.check_batches, 15),
        (checks.check_batches, math.log(25, 1.256)),
        (checks.check_prepare, lambda a, v: (whitened(a), v + a)),
    ],
)
def test_right_answer(capsys, check, answer):
    assert said(capsys, check, answer) == "Right."


@pytest.mark.parametrize("mistake", checks._MISTAKES)
def test_each_mistake_in_the_loss_is_named(capsys, mistake):
    """Oracle: the loss by loops, with the same thing done wrong."""
    verdict = said(capsys, checks.check_ppo_loss, lambda *x: loss(*x, wrong=mistake))
    assert verdict == f"Not yet: {checks._MISTAKES[mistake]}"


@pytest.mark.parametrize(
    ("check", "answer", "message"),
    [
        (checks.check_ppo_loss, lambda *x: x[0], "return one number"),
        (checks.check_ppo_loss, lambda *x: x[2].sum(), "nothing in this loss depends"),
        (checks.check_ppo_loss, lambda *x: loss(*x).detach() + 0 * x[0].sum(), "in test case 1"),
        (checks.check_diagnosis, {"A": "hacked"}, "for each of"),
        (checks.check_diagnosis, {"A": "ill", "B": "moving", "C": "healthy"}, '"ill" is none of'),
        (checks.check_diagnosis, {"A": "moving", "B": "healthy", "C": "hacked"}, "exactly 0"),
        (checks.check_diagnosis, {"A": "healthy", "B": "moving", "C": "hacked"}, "no lower"),
        (checks.check_same_beta, 0.1, "larger rewards need a larger price"),
        (checks.check_same_beta, 0.2, "half the price"),
        (checks.check_same_beta, 1.4, "changes no preference"),
        (checks.check_batches, 93.75, "compound"),
        (checks.check_batches, 17.7, "with 20 % per batch"),
        (checks.check_batches, 3.22, "divide the two logarithms"),
        (checks.check_batches, 19.9, "as a factor"),
        (checks.check_prepare, lambda a, v: (a, a + v), "no longer whitened"),
        (checks.check_prepare, lambda a, v: (whitened(a), 1.0 * a), "the advantages alone"),
        (checks.check_prepare, lambda a, v: (whitened(a), a - v), "sign of the values"),
        (checks.check_prepare, lambda a, v: (whitened(a), whitened(a + v)), "are whitened now"),
        (
            checks.check_prepare,
            lambda a, v: (whitened(a), v + a - a.sum() / len(a)),
            "the mean is still taken",
        ),
    ],
)
def test_typical_mistake_is_named(capsys, check, answer, message):
    verdict = said(capsys, check, answer)
    assert verdict.startswith("Not yet")
    assert message in verdict
