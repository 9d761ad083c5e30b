"""The checks of grpo: stub, right answer, and each typical mistake."""

import math
import re

import pytest
import torch

from rlhf_helpers.book.checks import grpo as checks


def said(capsys, check, answer):
    check(answer)
    return capsys.readouterr().out.strip()


def group_loss(
    logits,
    tokens,
    mask,
    old,
    rewards,
    *,
    advantage=None,
    gain=None,
    ratio=lambda new, old: torch.exp(new - old),
    mean=lambda rows: sum(sum(row) / len(row) for row in rows) / len(rows),
    padding=False,
    sign=-1,
):
    """With loops over answers and tokens."""
    size = len(rewards)
    values = rewards.tolist()
    centre = sum(values) / size
    deviation = math.sqrt(sum((r - centre) ** 2 for r in values) / (size - 1))
    advantage = advantage or (lambda r: (r - centre) / (deviation + 1e-4))
    gain = gain or (lambda rho, A: min(rho * A, min(max(rho, 0.8), 1.2) * A))
    rows = []
    for i in range(size):
        rows.append([])
        for t in range(tokens.shape[1]):
            if mask[i, t] or padding:
                probs = torch.softmax(logits[i, t], dim=0)
                rho = ratio(probs[tokens[i, t]].log(), old[i, t])
                rows[-1].append(gain(rho, advantage(values[i])))
    return sign * mean(rows)


def wrong_loss(**change):
    return lambda *given: group_loss(*given, **change)


def by_torch(rho, A):
    return torch.minimum(rho * A, rho.clip(0.8, 1.2) * A)


def shared(rows):
    return sum(map(sum, rows)) / sum(map(len, rows))


def statistics_of(rewards, less_one=1):
    mean = rewards.mean()
    return mean, ((rewards - mean) ** 2).sum().div(len(rewards) - less_one).sqrt()


def with_advantages(make):
    """The right loss with other advantages, from the rewards of the whole group."""

    def loss(logits, tokens, mask, old, rewards):
        pairs = dict(zip(rewards.tolist(), make(rewards), strict=True))
        return group_loss(logits, tokens, mask, old, rewards, advantage=pairs.get, gain=by_torch)

    return loss


def is_right(text, answer):
    """By a regular expression of the whole text."""
    return (
        re.fullmatch(r"(?:(?!####)[\s\S])*", text.rstrip().removesuffix(f"#### {answer}"))
        is not None
        and re.search(rf"(?:^|\n)#### {answer}$", text.rstrip()) is not None
    )


def last_number(text, answer):
    numbers = re.findall(r"[0-9]+", text)
    return bool(numbers) and numbers[-1] == answer


def as_integer(text, answer):
    last = text.rstrip().split("\n")[-1]
    if not last.startswith("#### ") or text.count("####") != 1:
        return False
    try:
        return int(last[5:]) == int(answer)
    except ValueError:
        return False


def advantages(rewards, size):
    found = []
    for begin in range(0, len(rewards), size):
        mean, deviation = statistics_of(rewards[begin : begin + size])
        found += [(r - mean) / (deviation + 1e-4) for r in rewards[begin : begin + size]]
    return torch.stack(found)


def buggy(rewards, G):
    groups = rewards.view(G, -1)
    centred = groups - groups.mean(0)
    return (centred / (groups.std(0) + 1e-4)).flatten()


@pytest.mark.parametrize(
    ("check", "stub"),
    [
        (checks.check_group_loss, lambda *x: None),
        (checks.check_checker, lambda *x: None),
        (checks.check_constant_share, None),
        (checks.check_smallest_group, None),
        (checks.check_pulls, None),
        (checks.check_advantages, lambda *x: None),
        (checks.check_advantages, buggy),
        (checks.check_diagnosis, None),
    ],
)
def test_stub_is_not_attempted(capsys, check, stub):
    assert said(capsys, check, stub).startswith("Not attempted")


@pytest.mark.parametrize(
    ("check", "answer"),
    [
        (checks.check_group_loss, group_loss),
        (checks.check_checker, is_right),
        (checks.check_constant_share, 0.43046722),
        (checks.check_constant_share, 0.43),
        (checks.check_smallest_group, 7),
        (checks.check_smallest_group, torch.tensor(7)),
        (checks.check_pulls, (0.20, 0.20, 0.018, 0.053)),
        (checks.check_pulls, [1.62 / 8, 1.62 / 8, 3 * 0.75 / 128, 9 * 0.75 / 128]),
        (checks.check_pulls, torch.tensor([0.2025, 0.2025, 0.0176, 0.0527])),
        (checks.check_advantages, advantages),
        (checks.check_diagnosis, ("B", "C", "A")),
        (checks.check_diagnosis, ["b", "c", "a"]),
    ],
)
def test_right_answer(capsys, check, answer):
    assert said(capsys, check, answer) == "Right."


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sign": 1}, "sign is turned round"),
        ({"mean": shared}, "all tokens count alike"),
        ({"mean": lambda rows: sum(map(sum, rows)) / len(rows)}, "not divided by their number"),
        ({"gain": lambda rho, A: rho * A}, "nothing is clipped"),
        ({"gain": lambda rho, A: rho.clip(0.8, 1.2) * A}, "without the smaller"),
        (
            {"gain": lambda rho, A: max(rho * A, min(max(rho, 0.8), 1.2) * A)},
            "not the larger",
        ),
        ({"advantage": lambda r: r}, "these are the rewards"),
        ({"padding": True}, "padding counts"),
        ({"ratio": lambda new, old: new / old}, "that of the probabilities"),
    ],
)
def test_a_mistake_in_the_loss_is_named(capsys, change, message):
    verdict = said(capsys, checks.check_group_loss, wrong_loss(**change))
    assert verdict.startswith("Not yet")
    assert message in verdict


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda r: r - r.mean(), "not yet divided"),
        (lambda r: r / (statistics_of(r)[1] + 1e-4), "mean of the group was not taken off"),
        (lambda r: (r - r.mean()) / (statistics_of(r, 0)[1] + 1e-4), "biased standard deviation"),
    ],
)
def test_a_mistake_in_the_advantages_of_the_loss_is_named(capsys, make, message):
    verdict = said(capsys, checks.check_group_loss, with_advantages(make))
    assert verdict.startswith("Not yet")
    assert message in verdict


def test_a_constant_group_that_gives_nan_is_named(capsys):
    def loss(logits, tokens, mask, old, rewards):
        log_probs = torch.log_softmax(logits, -1).gather(2, tokens.unsqueeze(2)).squeeze(2)
        rho, A = (log_probs - old).exp(), ((rewards - rewards.mean()) / rewards.std()).unsqueeze(1)
        gain = by_torch(rho, A) * mask
        return -(gain.sum(1) / mask.sum(1)).mean()

    assert "gives NaN" in said(capsys, checks.check_group_loss, loss)


def test_a_loss_without_a_gradient_is_told(capsys):
    verdict = said(capsys, checks.check_group_loss, lambda *x: group_loss(*x).detach())
    assert "nothing in this loss depends" in verdict


def raises(text, answer):
    return int(text.split("####")[1]) == int(answer)


@pytest.mark.parametrize(
    ("checker", "message"),
    [
        (lambda text, answer: answer in text, "the mark #### is missing"),
        (lambda text, answer: text.strip() == answer, "refuses"),
        (lambda text, answer: True, "there is no answer in it"),
        (lambda text, answer: False, "refuses"),
        (last_number, "the mark #### is missing"),
        (as_integer, "a zero stands in front"),
        (lambda text, answer: text.rstrip().endswith(f"#### {answer}"), "two answers"),
        (
            lambda text, answer: text.count("####") == 1 and text.rstrip().endswith(answer),
            "stand in another number",
        ),
        (
            lambda text, answer: (
                text.count("####") == 1 and text.rstrip().endswith(f"#### {answer}")
            ),
            "does not begin with the mark",
        ),
        (raises, "must never stop"),
    ],
)
def test_what_a_checker_lets_pass_is_named(capsys, checker, message):
    verdict = said(capsys, checks.check_checker, checker)
    assert verdict.startswith("Not yet")
    assert message in verdict


def test_there_are_twenty_right_responses_and_each_cheat_is_one():
    assert len(checks.RIGHT) == 20
    assert all(is_right(text, answer) for text, answer in checks.RIGHT)
    assert not any(is_right(text, "95") for text, _ in checks.CHEATS)
    integers = [text for text, _ in checks.CHEATS if as_integer(text, "95")]
    assert len(integers) >= 5  # what int() forgives


@pytest.mark.parametrize(
    ("check", "answer", "message"),
    [
        (checks.check_constant_share, 0.56953, "teach something"),
        (checks.check_constant_share, 1e-8, "all wrong teaches nothing"),
        (checks.check_constant_share, 0.9, "one wrong answer"),
        (checks.check_constant_share, 0.1, "the pass rate"),
        (checks.check_constant_share, 43.05, "between 0 and 1"),
        (checks.check_smallest_group, 6, "not yet half"),
        (checks.check_smallest_group, 8, "fewer enough"),
        (checks.check_smallest_group, 10, "get there with fewer"),
        (checks.check_smallest_group, 5, "solve"),
        (checks.check_pulls, 0.2, "four numbers"),
        (checks.check_pulls, (0.0675, 0.0225, 0.0059, 0.0059), "on one token"),
        (checks.check_pulls, (0.2, 0.2, 0.038, 0.114), "does not divide the advantage"),
        (checks.check_pulls, (0.2, 0.2, 0.28, 0.84), "divided by the constant"),
        (checks.check_pulls, (1.62, 1.62, 0.14, 0.42), "mean over the eight"),
        (checks.check_pulls, (0.61, 1.82, 0.0176, 0.0527), "weight is 1/(N·T)"),
        (checks.check_pulls, (0.2, 0.2, 0.5, 0.053), "number 3"),
        (
            checks.check_advantages,
            lambda r, G: (r - r.mean()) / (r.std() + 1e-4),
            "the whole batch: other problems",
        ),
        (
            checks.check_advantages,
            lambda r, G: (r.view(-1, G) - r.view(-1, G).mean(0)) / (r.view(-1, G).std(0) + 1e-4),
            "down the columns",
        ),
        (
            checks.check_advantages,
            lambda r, G: (r.view(-1, G) - r.view(-1, G).mean(1)[:, None]) / (r.std() + 1e-4),
            "the deviation that of the whole batch",
        ),
        (checks.check_diagnosis, ("A", "B", "C"), "limit of 32 tokens"),
        (checks.check_diagnosis, ("B", "A", "C"), "not shorter"),
        (checks.check_diagnosis, ("B", "B", "A"), "each run once"),
    ],
)
def test_typical_mistake_is_named(capsys, check, answer, message):
    verdict = said(capsys, check, answer)
    assert verdict.startswith("Not yet")
    assert message in verdict
