"""The tables for policy and critic on a language that can be listed."""

import dataclasses

import pytest
import torch

from rlhf_helpers.algorithms import actor_critic as ac
from rlhf_helpers.worlds import enumerable

LANGUAGE = enumerable.language(vocabulary=4, length=3)
REFERENCE = torch.randn(
    LANGUAGE.num_states, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64
).log_softmax(-1)
REWARDS = enumerable.utilities(LANGUAGE, seed=2).double()
LOG_REF = enumerable.sequence_log_probs(REFERENCE, LANGUAGE)


def train(runs=1, reference=REFERENCE, **settings):
    config = ac.Config(**{"iterations": 5, "batch_size": 8, "learning_rate": 1.0, **settings})
    return ac.train(reference, REWARDS, LANGUAGE, config, runs)


def read(text):
    """(states, tokens) of a text, counted by hand from what is written."""
    tokens = LANGUAGE.tokens[text].tolist()
    tokens = tokens[: tokens.index(0) + 1] if 0 in tokens else tokens
    states = [0]
    for token in tokens[:-1]:
        states.append(3 * states[-1] + token)
    return states, tokens


def loop(credit, lam=0.7, beta=0.5, rate=1.0, critic_rate=0.3, texts=8, iterations=5, seed=0):
    """The same in plain Python, text by text, with autograd for the policy."""
    generator = torch.Generator().manual_seed(seed)
    logits, critic, curve = REFERENCE.clone().requires_grad_(), [0.0] * LANGUAGE.num_states, []
    for _ in range(iterations):
        log_pi = logits.log_softmax(-1)
        of_texts = enumerable.sequence_log_probs(log_pi, LANGUAGE).detach()
        curve.append(enumerable.regularised_objective(of_texts, LOG_REF, REWARDS, beta).item())
        drawn = torch.multinomial(of_texts.exp(), texts, True, generator=generator).tolist()
        cost = beta * (log_pi.detach() - REFERENCE)
        v, q = enumerable.values(log_pi.detach(), REWARDS, LANGUAGE, -cost)
        totals = [
            REWARDS[n].item() - sum(cost[s, a].item() for s, a in zip(*read(n), strict=True))
            for n in drawn
        ]
        loss, goals = 0.0, {}
        for i, n in enumerate(drawn):
            states, tokens = read(n)
            paid = [-cost[s, a].item() for s, a in zip(states, tokens, strict=True)]
            paid[-1] += REWARDS[n].item()
            after = [critic[s] for s in states[1:]] + [0.0]
            errors = [r + w - critic[s] for r, w, s in zip(paid, after, states, strict=True)]
            for t, (s, a) in enumerate(zip(states, tokens, strict=True)):
                summed = sum(lam ** (u - t) * errors[u] for u in range(t, len(errors)))
                others = (sum(totals) - totals[i]) / (texts - 1)
                given = {
                    "whole": totals[i],
                    "leave_one_out": totals[i] - others,
                    "critic": summed,
                    "exact": (q[s, a] - v[s]).item(),
                }[credit]
                loss = loss - given * log_pi[s, a] / texts
                goals.setdefault(s, []).append(critic[s] + summed)
        (gradient,) = torch.autograd.grad(loss, logits)
        logits = (logits - rate * gradient).detach().requires_grad_()
        if credit == "critic":
            for s, found in goals.items():
                critic[s] += critic_rate * (sum(found) / len(found) - critic[s])
    return (*(torch.tensor(x, dtype=torch.float64) for x in (curve, critic)), logits.detach())


@pytest.mark.parametrize("credit", ac.CREDITS)
def test_it_equals_the_plain_loop(credit):
    """Oracle: the algorithm text by text, with autograd and the double sum of GAE."""
    curve, logits, critic = train(credit=credit, lam=0.7, beta=0.5)
    by_hand, values, table = loop(credit)
    torch.testing.assert_close(curve[0, :-1], by_hand)
    torch.testing.assert_close(logits[0], table)
    torch.testing.assert_close(critic[0], values)


def test_the_first_and_the_last_objective():
    """Oracle: the exact objective of the reference, and of the policy that is returned."""
    curve, logits, _ = train(beta=2.0)
    for policy, reached in ((REFERENCE, curve[0, 0]), (logits[0], curve[0, -1])):
        log_p = enumerable.sequence_log_probs(policy, LANGUAGE)
        wanted = enumerable.regularised_objective(log_p, LOG_REF, REWARDS, 2.0)
        torch.testing.assert_close(reached, wanted)
    assert curve.shape == (1, 6)


@pytest.mark.parametrize("credit", ac.CREDITS)
def test_every_credit_learns(credit):
    """Oracle: the largest value of the objective, β·log Z; half of the way there in each run."""
    curve, _, _ = train(runs=3, credit=credit, iterations=150, batch_size=16)
    best = enumerable.log_partition(LOG_REF, REWARDS, 1.0)
    assert ((curve[:, -1] - curve[:, 0]) / (best - curve[:, 0])).min() > 0.5
    assert curve.max() <= best + 1e-12


def test_runs_are_independent_and_repeatable():
    """Oracle: a second call; and the runs of one call, which draw texts of their own."""
    curve, _, _ = train(runs=3)
    again, _, _ = train(runs=3)
    assert torch.equal(curve, again)
    assert len(curve[:, -1].unique()) == 3
    assert len(curve[:, 0].unique()) == 1


def test_the_global_random_state_is_untouched():
    """Oracle: the state before."""
    before = torch.random.get_rng_state()
    train()
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("credit", "some"),
        ("lam", 1.5),
        ("beta", -1.0),
        ("learning_rate", float("nan")),
        ("critic_rate", 2.0),
        ("iterations", 0),
        ("batch_size", 1),
        ("seed", 1.5),
    ],
)
def test_settings_out_of_range_are_named(field, value):
    assert field in {each.name for each in dataclasses.fields(ac.Config)}
    with pytest.raises((ValueError, TypeError), match=field):
        train(**{field: value})


def test_a_table_that_does_not_fit_is_named():
    with pytest.raises(ValueError, match="logits has shape"):
        train(reference=REFERENCE[:3])
    with pytest.raises(ValueError, match="runs"):
        train(runs=0)
    with pytest.raises(TypeError, match="config"):
        ac.train(REFERENCE, REWARDS, LANGUAGE, {"lam": 1.0})
