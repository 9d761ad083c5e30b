"""The checks of token_mdp: stub, right answer, and each typical mistake."""

import math

import pytest
import torch

from rlhf_helpers.book.checks import token_mdp as checks


def said(capsys, check, answer):
    check(answer)
    return capsys.readouterr().out.strip()


def gae(rewards, values, lam):
    """The double sum of the definition, in plain Python."""
    r, v = rewards.tolist(), [*values.tolist(), 0.0]
    td_errors = [r[t] + v[t + 1] - v[t] for t in range(len(r))]
    return torch.tensor(
        [
            sum(lam ** (later - t) * td_errors[later] for later in range(t, len(r)))
            for t in range(len(r))
        ],
        dtype=torch.float64,
    )


def gae_with_last_value_again(rewards, values, lam):
    longer = torch.cat([rewards, values[-1:]])
    # a last reward that is exactly the last value has no TD error and pays what the bug adds
    return gae(longer, torch.cat([values, values[-1:]]), lam)[:-1]


def gae_without_next_value(rewards, values, lam):
    return gae(rewards - values, 0 * values, lam)


def gae_from_the_front(rewards, values, lam):
    td_errors = gae(rewards, values, 0.0)
    return torch.stack(
        [
            sum(lam ** (t - before) * td_errors[before] for before in range(t + 1))
            for t in range(len(rewards))
        ]
    )


def k3(new, ref):
    return torch.tensor(
        [math.exp(r - n) - 1 + (n - r) for n, r in zip(new.tolist(), ref.tolist(), strict=True)]
    )


def k3_with_plus_d(new, ref):
    return k3(-new, -ref)


def token_entropies(logits, mask):
    """(text, entropy) of every token that counts, in plain Python."""
    found = []
    for n, t in mask.nonzero().tolist():
        weights = [math.exp(z) for z in logits[n, t].tolist()]
        probs = [w / sum(weights) for w in weights]
        found.append((n, -sum(p * math.log(p) for p in probs)))
    return found


def mean_entropy(logits, mask):
    found = [h for _, h in token_entropies(logits, mask)]
    return sum(found) / len(found)


def mean_entropy_by_text(logits, mask):
    found = token_entropies(logits, mask)
    texts = {n for n, _ in found}
    each = [[h for m, h in found if m == n] for n in texts]
    return sum(sum(h) / len(h) for h in each) / len(texts)


def mean_unweighted(logits, mask):
    each = -logits.log_softmax(-1).sum(-1)
    return each[mask > 0].mean()


def two_losses(values, log_probs, returns, advantages=None, error=None):
    if advantages is None:
        advantages = (returns - values).detach()
    error = values - returns if error is None else error
    return -(advantages * log_probs).mean() + error.square().mean() / 2


@pytest.mark.parametrize(
    ("check", "stub"),
    [
        (checks.check_gae, lambda rewards, values, lam: None),
        (checks.check_first_credit, None),
        (checks.check_third_estimate, lambda new, ref: None),
        (checks.check_third_estimate, k3_with_plus_d),
        (checks.check_mean_entropy, lambda logits, mask: None),
        (checks.check_two_losses, lambda *x: None),
        (checks.check_two_losses, lambda v, lp, g: two_losses(v, lp, g, advantages=g - v)),
    ],
)
def test_stub_is_not_attempted(capsys, check, stub):
    assert said(capsys, check, stub).startswith("Not attempted")


@pytest.mark.parametrize(
    ("check", "answer"),
    [
        (checks.check_gae, gae),
        (checks.check_first_credit, 1 - (0.4 * 1.75 + 0.4 * 0.5)),
        (checks.check_third_estimate, k3),
        (checks.check_mean_entropy, mean_entropy),
        (checks.check_two_losses, two_losses),
    ],
)
def test_right_answer(capsys, check, answer):
    assert said(capsys, check, answer) == "Right."


@pytest.mark.parametrize(
    ("check", "answer", "message"),
    [
        (checks.check_gae, lambda r, v, lam: gae(r, v, 0.0), "which is λ = 0"),
        (
            checks.check_gae,
            lambda r, v, lam: r.flip(0).cumsum(0).flip(0) - v,
            "which is λ = 1",
        ),
        (checks.check_gae, lambda r, v, lam: gae(r, v, lam) + v, "these are the returns"),
        (checks.check_gae, gae_with_last_value_again, "the last value is used again"),
        (checks.check_gae, gae_without_next_value, "the next value is missing"),
        (checks.check_gae, gae_from_the_front, "runs the wrong way"),
        (checks.check_gae, lambda r, v, lam: gae(r, 0 * v, lam) - v, "λ multiplies the rewards"),
        (checks.check_first_credit, 0.85, "the exact advantage"),
        (checks.check_first_credit, 1.0, "that is the return"),
        (checks.check_first_credit, -0.75, "the second a"),
        (checks.check_first_credit, -0.1, "sign is turned round"),
        (checks.check_first_credit, 0.9, "the value at the start; subtract"),
        (
            checks.check_third_estimate,
            lambda new, ref: (ref - new).exp() - 1 - (new - ref),
            "only one of the two signs",
        ),
        (
            checks.check_third_estimate,
            lambda new, ref: (new - ref).exp() - 1 + (new - ref),
            "still the wrong sign",
        ),
        (checks.check_third_estimate, lambda new, ref: new - ref, "this is k1"),
        (checks.check_third_estimate, lambda new, ref: (ref - new) ** 2 / 2, "this is k2"),
        (checks.check_third_estimate, lambda new, ref: k3(new, ref) + 1, "the −1 is missing"),
        (checks.check_third_estimate, lambda new, ref: -k3(new, ref), "the opposite sign"),
        (checks.check_mean_entropy, lambda z, m: -mean_entropy(z, m), "Σ π log π"),
        (
            checks.check_mean_entropy,
            lambda z, m: mean_entropy(z, torch.ones_like(m)),
            "use the mask",
        ),
        (
            checks.check_mean_entropy,
            lambda z, m: mean_entropy(z, m) * m.sum() / m.numel(),
            "divided by all entries",
        ),
        (
            checks.check_mean_entropy,
            lambda z, m: mean_entropy(z, m) / z.shape[-1],
            "mean over the vocabulary",
        ),
        (checks.check_mean_entropy, mean_unweighted, "weigh by π"),
        (checks.check_mean_entropy, mean_entropy_by_text, "each text counts the same"),
        (checks.check_mean_entropy, lambda z, m: mean_entropy(z, m) * m.sum(), "this is the sum"),
        (checks.check_mean_entropy, lambda z, m: mean_entropy(z, m) / math.log(2), "not in bits"),
        (
            checks.check_two_losses,
            lambda v, lp, g: two_losses(v.detach(), lp, g),
            "nothing trains the critic",
        ),
        (
            checks.check_two_losses,
            lambda v, lp, g: two_losses(v, lp, g, g - v, v.detach() - g),
            "the value loss is the detached one",
        ),
        (
            checks.check_two_losses,
            lambda v, lp, g: two_losses(v, lp, g, advantages=g),
            "gone from the advantages",
        ),
        (
            checks.check_two_losses,
            lambda v, lp, g: two_losses(v, lp, g, advantages=(v - g).detach()),
            "turned round",
        ),
    ],
)
def test_typical_mistake_is_named(capsys, check, answer, message):
    verdict = said(capsys, check, answer)
    assert verdict.startswith("Not yet")
    assert message in verdict


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda v, lp, g: (v - g) ** 2, "take the mean"),
        (lambda v, lp, g: two_losses(v, lp, g).detach(), "nothing in this loss depends"),
    ],
)
def test_a_loss_without_a_gradient_is_told_why(capsys, answer, message):
    verdict = said(capsys, checks.check_two_losses, answer)
    assert verdict.startswith("Not yet")
    assert message in verdict
