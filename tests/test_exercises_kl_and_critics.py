"""The checks of kl_and_critics: stub, right answer, and each typical mistake."""

import math
import random
import statistics

import pytest
import torch

from rlhf_helpers.book.checks import kl_and_critics as checks


def said(capsys, check, answer):
    check(answer)
    return capsys.readouterr().out.strip()


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
    return each[mask].mean()


def expected_gradient(term, policy, reference):
    """Of a term of (new, ref) under the policy, by summing over the tokens."""
    theta = policy.log().requires_grad_()
    new = theta.log_softmax(-1)
    return torch.autograd.grad((policy * term(new, reference.log())).sum(), theta)[0]


def held_down(term):
    """Which of the two KLs has this gradient, by torch.distributions; "none" for no gradient."""
    policy, reference = (
        torch.tensor(p, dtype=torch.float64) for p in ([0.1, 0.8, 0.1], [0.2, 0.4, 0.4])
    )
    found = expected_gradient(term, policy, reference)
    if found.abs().max() < 1e-12:
        return "none"
    theta = policy.log().requires_grad_()
    of = torch.distributions.Categorical
    pairs = {
        "reverse": (of(logits=theta), of(probs=reference)),
        "forward": (of(probs=reference), of(logits=theta)),
    }
    for name, pair in pairs.items():
        kl = torch.distributions.kl_divergence(*pair)
        if torch.allclose(torch.autograd.grad(kl, theta)[0], found):
            return name
    return "neither"


def library_a(new, ref):
    d = new - ref
    k2, k3 = d**2 / 2, (-d).exp() - 1 + d
    return k3.detach() + k2 - k2.detach()


LIBRARIES = (library_a, lambda new, ref: (ref - new).exp(), lambda new, ref: -new)


def test_the_answers_about_libraries_are_what_autograd_says(capsys):
    """Oracle: expected gradients by autograd, beside those of torch.distributions' KLs."""
    answers = tuple(held_down(term) for term in LIBRARIES)
    assert said(capsys, checks.check_libraries, answers) == "Right."


def drift(weight):
    """The sign of the step that descent makes in the values of −mean((G − V) · weight)."""
    values = torch.tensor([0.9, 1.75], requires_grad=True)
    (pull,) = torch.autograd.grad(-((4.0 - values) * weight).mean(), values)
    assert len(set(pull.sign().tolist())) == 1
    return -int(pull[0].sign())


def test_the_drift_is_what_autograd_says(capsys):
    """Oracle: the gradient in the values."""
    log_probs = torch.tensor([0.4, 0.25]).log()
    signs = (drift(log_probs), drift(torch.ones(2)))
    assert said(capsys, checks.check_drift, signs) == "Right."


def test_the_rare_success_is_what_huber_learns(capsys):
    """Oracle: torch's Huber loss on a grid of values."""
    grid = torch.linspace(0, 2, 20_001, dtype=torch.float64)
    returns = torch.tensor([0.0] * 9 + [10.0], dtype=torch.float64)
    both = torch.broadcast_tensors(grid[:, None], returns)
    losses = torch.nn.functional.huber_loss(*both, reduction="none").mean(1)
    best = grid[losses.argmin()].item()
    assert said(capsys, checks.check_rare_success, round(best, 2)) == "Right."


def logged(kind):
    """Batch means of an estimate near the reference and far away, from 64 draws of three tokens, in
    plain Python."""
    rng, ref, found = random.Random(0), [0.2, 0.4, 0.4], []
    for new in ([0.21, 0.4, 0.39], [0.0105, 0.9845, 0.005]):
        d = [math.log(p / q) for p, q in zip(new, ref, strict=True)]
        each = {
            "k1": d,
            "k2": [x * x / 2 for x in d],
            "k3": [math.exp(-x) - 1 + x for x in d],
        }[kind]
        draws = [rng.choices(each, new, k=64) for _ in range(200)]
        found.append([sum(draw) / 64 for draw in draws])
    return found


def test_the_curves_are_told_apart_by_what_the_hints_name(capsys):
    """Oracle: batches of plain Python draws. One kind goes below zero, of the others one has
    spikes far away."""
    by_kind = {kind: logged(kind) for kind in ("k1", "k2", "k3")}
    (below,) = [kind for kind, (near, _) in by_kind.items() if min(near) < -1e-9]
    peaks = {kind: max(far) / statistics.median(far) for kind, (_, far) in by_kind.items()}
    spiky = max((kind for kind in peaks if kind != below), key=peaks.get)
    (quiet,) = set(by_kind) - {below, spiky}
    assert said(capsys, checks.check_curves, (spiky, below, quiet)) == "Right."


def fitted(steps=100, size=None, column=True):
    """A critic's fit; `size` is the unit of its targets, None for their own deviation; without
    `column`, values [512, 1] are compared with targets [512]."""

    def fit(features, targets):
        middle, unit = (targets.mean(), targets.std()) if size is None else (0.0, size)
        layers = (torch.nn.Linear(8, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1))
        net = torch.nn.Sequential(*layers).double()
        optimizer = torch.optim.Adam(net.parameters(), lr=0.01, weight_decay=1e-2)
        for _ in range(steps):
            values = net(features)
            error = (values[:, 0] if column else values) - (targets - middle) / unit
            optimizer.zero_grad()
            error.square().mean().backward()
            optimizer.step()
        return lambda states: net(states)[:, 0] * unit + middle

    return fit


def of_the_linear_part(features, targets):
    """Least squares: all that a linear critic can foresee."""
    wide = torch.cat([features, torch.ones(len(features), 1, dtype=features.dtype)], 1)
    weights = torch.linalg.lstsq(wide, targets[:, None]).solution[:, 0]
    return lambda states: states @ weights[:-1] + weights[-1]


def the_nearest(features, targets):
    """Knows every target by heart, its noise too."""
    return lambda states: targets[torch.cdist(states, features).argmin(1)]


@pytest.mark.parametrize(
    ("check", "stub"),
    [
        (checks.check_libraries, None),
        (checks.check_mean_entropy, lambda logits, mask: None),
        (checks.check_drift, None),
        (checks.check_rare_success, None),
        (checks.check_critic, lambda features, targets: None),
        (checks.check_curves, None),
    ],
)
def test_stub_is_not_attempted(capsys, check, stub):
    assert said(capsys, check, stub).startswith("Not attempted")


@pytest.mark.parametrize(
    ("check", "answer"),
    [
        (checks.check_libraries, ["Reverse", " forward", "none"]),
        (checks.check_mean_entropy, mean_entropy),
        (checks.check_drift, [1.0, -1.0]),
        (checks.check_rare_success, 1 / 9),
        (checks.check_curves, [" K3", "k1", "k2"]),
    ],
)
def test_right_answer(capsys, check, answer):
    assert said(capsys, check, answer) == "Right."


def test_a_network_in_the_unit_of_its_targets_fits(capsys):
    assert said(capsys, checks.check_critic, fitted()).startswith("Right: explained variance 0.9")


@pytest.mark.parametrize(
    ("check", "answer", "message"),
    [
        (checks.check_libraries, "reverse", "three words"),
        (checks.check_libraries, ("reverse", "forward"), "three words"),
        (checks.check_libraries, ("reverse", "forward", "no"), "each answer is one of"),
        (checks.check_libraries, ("forward", "forward", "none"), "a: what is detached"),
        (checks.check_libraries, ("reverse", "reverse", "none"), "b: differentiate"),
        (checks.check_libraries, ("reverse", "forward", "forward"), "c: the gradient is"),
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
        (checks.check_mean_entropy, mean_unweighted, "weight by π"),
        (checks.check_mean_entropy, mean_entropy_by_text, "each text counts the same"),
        (checks.check_mean_entropy, lambda z, m: mean_entropy(z, m) * m.sum(), "this is the sum"),
        (checks.check_mean_entropy, lambda z, m: mean_entropy(z, m) / math.log(2), "not in bits"),
        (checks.check_drift, (-1, 1), "signs of the gradients"),
        (checks.check_drift, (1, 1), "can both push the same way"),
        (checks.check_drift, (-1, -1), "can both push the same way"),
        (checks.check_drift, 1, "give two signs"),
        (checks.check_drift, (0, 1), "give two signs"),
        (checks.check_rare_success, 1.0, "that is the mean"),
        (checks.check_rare_success, 0.0, "that is the median"),
        (checks.check_rare_success, 0.1, "not all ten errors are V"),
        (checks.check_rare_success, 10 / 9, "cut off at 10"),
        (checks.check_rare_success, "some", "not a number"),
        (checks.check_critic, fitted(steps=40, size=1.0), "in units of the targets"),
        (checks.check_critic, fitted(steps=20, column=False), "compare [512, 1] with [512]"),
        (checks.check_critic, the_nearest, "learned by heart"),
        (checks.check_critic, of_the_linear_part, "too small a network"),
        (checks.check_critic, lambda x, y: lambda s: fitted()(x, y)(s)[:, None], "shape [M, 1]"),
        (checks.check_critic, lambda x, y: lambda s: s, "return [M]"),
        (checks.check_critic, lambda x, y: lambda s: fitted()(x, y)(s) + 1, "does not show"),
        (checks.check_critic, lambda x, y: 1 / 0, "ZeroDivisionError"),
        (checks.check_curves, "k1", "three names"),
        (checks.check_curves, ("k1", "k1", "k2"), "behind one curve"),
        (checks.check_curves, ("k1", "k2", "k3"), "below zero"),
        (checks.check_curves, ("k2", "k1", "k3"), "has spikes"),
    ],
)
def test_typical_mistake_is_named(capsys, check, answer, message):
    verdict = said(capsys, check, answer)
    assert verdict.startswith("Not yet")
    assert message in verdict


def test_the_notebooks_random_numbers_are_left_alone():
    torch.manual_seed(3)
    before = torch.rand(1)
    torch.manual_seed(3)
    checks.check_critic(fitted(steps=2))
    assert torch.rand(1) == before
