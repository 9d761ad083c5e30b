"""The checks of dpo_derivation: stub, right answer, and each typical mistake."""

import math

import pytest
import torch
from torch.nn.functional import logsigmoid

from rlhf_helpers.book.checks import dpo_derivation as checks


def said(capsys, check, answer):
    check(answer)
    return capsys.readouterr().out.strip()


def hidden_reward(ref, best, beta, mean_under=None, sign=1):
    """In plain Python."""
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


def online(
    ref,
    rewards,
    beta,
    generator,
    steps=600,
    sign=1.0,
    price=None,
    kept=1.0,
    moving=False,
    hard=True,
):
    """Online DPO, with the mistakes that can be made in it."""
    logits = ref.clone().requires_grad_()
    price = beta if price is None else price
    optimizer = torch.optim.Adam([logits], lr=0.05)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / steps)
        log_probs = logits.log_softmax(0)
        pairs = torch.multinomial(
            log_probs.detach().exp(), 256, replacement=True, generator=generator
        ).view(128, 2)
        gap = rewards[pairs[:, 0]] - rewards[pairs[:, 1]]
        label = torch.sigmoid(sign * gap) if hard else (gap > 0).double() + 0.5 * (gap == 0)
        anchor = log_probs.detach() if moving else kept * ref
        ratio = price * (log_probs - anchor)[pairs]
        z = ratio[:, 0] - ratio[:, 1]
        loss = -(label * logsigmoid(z) + (1 - label) * logsigmoid(-z)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return logits.detach().log_softmax(0)


@pytest.mark.parametrize(
    ("check", "stub"),
    [
        (checks.check_hidden_reward, lambda *x: None),
        (checks.check_two_prompts, None),
        (checks.check_doubled, None),
        (checks.check_implicit_reward, lambda *x: None),
        (checks.check_implicit_reward, buggy),
        (checks.check_own_samples, None),
        (checks.check_online_dpo, lambda *x: None),
    ],
)
def test_stub_is_not_attempted(capsys, check, stub):
    assert said(capsys, check, stub).startswith("Not attempted")


@pytest.mark.parametrize(
    ("check", "answer"),
    [
        (checks.check_hidden_reward, hidden_reward),
        (checks.check_two_prompts, (-0.6, 0.4)),
        (checks.check_two_prompts, torch.tensor([-0.6, 0.4])),
        (checks.check_doubled, (2, 7.48)),
        (checks.check_doubled, [2.0, 7.5]),
        (checks.check_implicit_reward, implicit_reward),
        (checks.check_own_samples, "b"),
        (checks.check_online_dpo, online),
    ],
)
def test_right_answer(capsys, check, answer):
    assert said(capsys, check, answer) == "Right."


@pytest.mark.parametrize(
    ("check", "answer", "message"),
    [
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
            "the sign is reversed",
        ),
        (checks.check_hidden_reward, lambda p, q, b: hidden_reward(p, q, 1.0), "beta is missing"),
        (
            checks.check_hidden_reward,
            lambda p, q, b: hidden_reward(p, q, 1.0) / b,
            "divides by beta",
        ),
        (checks.check_two_prompts, 0.4, "give 2 numbers"),
        (checks.check_two_prompts, ("a", "b"), "give 2 numbers"),
        (checks.check_two_prompts, (0.6, 0.4), "mind the sign"),
        (checks.check_two_prompts, (-1.2, 0.4), "β is 0.5"),
        (checks.check_two_prompts, (3.0, 0.4), "then subtract"),
        (checks.check_two_prompts, (-0.6, -0.6), "within one prompt"),
        (checks.check_two_prompts, (-0.6, -1.6), "not taken off"),
        (checks.check_two_prompts, (-0.6, 1.4), "β times, too"),
        (checks.check_two_prompts, (-0.6, -0.4), "the first one is the better"),
        (checks.check_two_prompts, (-0.6, 8.0), "its own Z"),
        (checks.check_doubled, (2.0,), "give 2 numbers"),
        (checks.check_doubled, (0.5, 7.48), "doubles r/β twice"),
        (checks.check_doubled, (1.0, 7.48), "goes further"),
        (checks.check_doubled, (7.0, 7.48), "cancels in the division"),
        (checks.check_doubled, (9.0, 7.48), "leaves the differences"),
        (checks.check_doubled, (2.0, 1.24), "what it is paid is not"),
        (checks.check_doubled, (2.0, 2.48), "and the 5?"),
        (checks.check_doubled, (2.0, 6.24), "everything but the 5"),
        (checks.check_doubled, (2.0, 12.48), "once"),
        (checks.check_doubled, (2.0, 99.0), "put the new ones into J"),
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
            "the sign is reversed",
        ),
        (
            checks.check_implicit_reward,
            lambda p, q, m, b: implicit_reward(p, 0 * q, m, b),
            "the reference is gone",
        ),
        (checks.check_own_samples, "A", "has just written"),
        (checks.check_own_samples, "both", 'answer "A" or "B"'),
        (checks.check_online_dpo, lambda ref, *x: ref[:2], "a tensor of shape (3,)"),
        (checks.check_online_dpo, lambda ref, *x: ref.exp(), "do not sum to 1"),
        (checks.check_online_dpo, lambda ref, *x: ref, "has not moved"),
        (checks.check_online_dpo, lambda *x: online(*x, sign=-1.0), "the wrong way"),
        (checks.check_online_dpo, lambda *x: online(*x, kept=0.0), "reference is missing"),
        (checks.check_online_dpo, lambda *x: online(*x, price=1.0), "where does beta come in"),
        (checks.check_online_dpo, lambda *x: online(*x, moving=True), "nearly everything"),
        (checks.check_online_dpo, lambda *x: online(*x, steps=15), "train longer"),
        (checks.check_online_dpo, lambda *x: 1 / 0, "raised ZeroDivisionError"),
    ],
)
def test_typical_mistake_is_named(capsys, check, answer, message):
    verdict = said(capsys, check, answer)
    assert verdict.startswith("Not yet")
    assert message in verdict
