"""KL estimators, the exact KL and the adaptive coefficient against enumeration of a small
softmax."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.special import log_softmax
from torch.distributions import Categorical, kl_divergence

from rlhf_helpers.kl import AdaptiveKLController, exact_kl, kl_estimate

modest = settings(max_examples=40, deadline=None, derandomize=True)
KINDS = ["k1", "k2", "k3", "abs"]


def two_policies(seed=0, vocabulary=5):
    """Logits of pi and of the reference over one small vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    logits, ref_logits = torch.randn(2, vocabulary, generator=generator, dtype=torch.float64)
    return logits, ref_logits


def expected_estimate(logits, ref_logits, kind):
    """Mean of the estimate over tokens drawn from pi, every token enumerated, its probability held
    fixed."""
    log_pi, log_ref = torch.log_softmax(logits, -1), torch.log_softmax(ref_logits, -1)
    probability = log_pi.exp().detach()
    return (probability * kl_estimate(log_pi[None], log_ref[None], kind)[0]).sum()


# kl_estimate


@pytest.mark.equation("eq:kl-estimators")
@pytest.mark.parametrize("log_ratio", [-3.0, -0.4, 0.3, 2.0])
def test_estimates_of_one_token_by_hand(log_ratio):
    """Oracle: Python's math module applied to the definitions, d = log pi - log pi_ref; derivatives
    by hand."""
    value = {
        "k1": log_ratio,
        "k2": log_ratio**2 / 2,
        "k3": math.exp(-log_ratio) - 1 + log_ratio,
        "abs": abs(log_ratio),
    }
    slope = {
        "k1": 1.0,
        "k2": log_ratio,
        "k3": 1 - math.exp(-log_ratio),
        "abs": math.copysign(1.0, log_ratio),
    }
    ref = torch.tensor([[-1.5]], dtype=torch.float64)
    for kind in KINDS:
        log_prob = (ref + log_ratio).requires_grad_()
        estimate = kl_estimate(log_prob, ref, kind)
        estimate.sum().backward()
        assert estimate.shape == (1, 1)
        assert estimate.item() == pytest.approx(value[kind], rel=1e-12)
        assert log_prob.grad.item() == pytest.approx(slope[kind], rel=1e-12)


@pytest.mark.equation("eq:kl-estimators")
@pytest.mark.parametrize("seed", range(3))
def test_k1_and_k3_are_unbiased_and_the_others_are_not(seed):
    """Oracle: torch.distributions.kl_divergence, with the expectation over all tokens
    enumerated."""
    logits, ref_logits = two_policies(seed)
    true = kl_divergence(Categorical(logits=logits), Categorical(logits=ref_logits)).item()
    assert expected_estimate(logits, ref_logits, "k1").item() == pytest.approx(true, rel=1e-12)
    assert expected_estimate(logits, ref_logits, "k3").item() == pytest.approx(true, rel=1e-12)
    assert abs(expected_estimate(logits, ref_logits, "k2").item() - true) > 1e-3
    assert expected_estimate(logits, ref_logits, "abs").item() > true + 1e-3


@pytest.mark.equation("eq:kl-estimators")
@pytest.mark.parametrize("seed", range(3))
def test_gradient_of_each_estimate_used_as_a_loss(seed):
    """Oracle: autograd of torch.distributions' KL: k1 gives zero, k2 the gradient of KL(pi||ref),
    k3 of KL(ref||pi)."""
    logits, ref_logits = two_policies(seed)
    z = logits.clone().requires_grad_()
    pi, ref = Categorical(logits=z), Categorical(logits=ref_logits)
    (reverse,) = torch.autograd.grad(kl_divergence(pi, ref), z)
    (forward,) = torch.autograd.grad(kl_divergence(ref, Categorical(logits=z)), z)
    assert (reverse - forward).abs().max() > 1e-2
    expected = {"k1": torch.zeros_like(z), "k2": reverse, "k3": forward}
    for kind, target in expected.items():
        (found,) = torch.autograd.grad(expected_estimate(z, ref_logits, kind), z)
        torch.testing.assert_close(found, target, rtol=1e-12, atol=1e-14)


@pytest.mark.equation("eq:kl-estimators")
def test_k3_mean_over_samples_agrees_within_its_standard_error():
    """Oracle: the exact KL; the tolerance is four standard errors of the mean of 20,000 samples."""
    logits, ref_logits = two_policies(3)
    pi, ref = Categorical(logits=logits), Categorical(logits=ref_logits)
    tokens = torch.multinomial(
        pi.probs, 20_000, replacement=True, generator=torch.Generator().manual_seed(0)
    )
    for kind in ("k1", "k3"):
        sample = kl_estimate(pi.log_prob(tokens)[None], ref.log_prob(tokens)[None], kind)[0]
        error = (sample.mean() - kl_divergence(pi, ref)).abs()
        assert error < 4 * sample.std() / math.sqrt(20_000)


def test_k3_equals_trl_penalty():
    """Oracle: TRL's per-token expression, exp(ref - pi) - (ref - pi) - 1, in float64 NumPy."""
    generator = np.random.default_rng(0)
    log_pi, log_ref = generator.normal(-2, 1, (2, 3, 4))
    expected = np.exp(log_ref - log_pi) - (log_ref - log_pi) - 1
    result = kl_estimate(torch.from_numpy(log_pi), torch.from_numpy(log_ref))
    np.testing.assert_allclose(result.numpy(), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("size", [0.1, 3e-2, 1e-2, 1e-3, 1e-4, 1e-6, 1e-8])
@pytest.mark.parametrize("sign", [1, -1])
def test_k3_is_accurate_near_zero_in_single_precision(size, sign):
    """Oracle: the series d^2/2 - d^3/6 + … in float64, and its slope 1 - exp(-d).

    exp(-d) - 1 + d loses every digit here: 3.3 times the truth at 1e-4, negative at 1e-6.
    """
    log_prob = torch.tensor([[sign * size]], dtype=torch.float32, requires_grad=True)
    d = log_prob.double().item()
    result = kl_estimate(log_prob, torch.zeros(1, 1), "k3")
    result.sum().backward()
    assert result.item() >= 0
    assert result.item() == pytest.approx(
        sum((-d) ** n / math.factorial(n) for n in range(2, 12)), rel=2e-6
    )
    assert log_prob.grad.item() == pytest.approx(-math.expm1(-d), rel=1e-4, abs=2**-23)


@modest
@given(
    log_ratios=hnp.arrays(np.float32, (2, 3), elements=st.floats(-80, 80, width=32)),
    kind=st.sampled_from(KINDS),
)
def test_extreme_log_ratios_give_finite_values_and_gradients(log_ratios, kind):
    """Oracle: float64 NumPy expm1; k2, k3 and abs are never negative."""
    d = log_ratios.astype(np.float64)
    expected = {"k1": d, "k2": d**2 / 2, "k3": np.expm1(-d) + d, "abs": np.abs(d)}[kind]
    log_prob = torch.from_numpy(log_ratios).requires_grad_()
    result = kl_estimate(log_prob, torch.zeros(2, 3), kind)
    np.testing.assert_allclose(result.detach().numpy(), expected, rtol=1e-4, atol=1e-5)
    assert kind == "k1" or (result >= 0).all()
    result.sum().backward()
    assert log_prob.grad.isfinite().all()


def test_unknown_kind_lists_the_known_ones():
    """Oracle: the specification: ValueError that names the argument and the choices."""
    with pytest.raises(ValueError, match="kind") as caught:
        kl_estimate(torch.zeros(1, 2), torch.zeros(1, 2), "k4")
    assert all(kind in str(caught.value) for kind in KINDS)


@pytest.mark.parametrize("shape", [(2, 4), (3,), (1, 3), (2, 1)])
def test_kl_estimate_rejects_unequal_shapes(shape):
    """Oracle: the specification: no silent broadcasting; the message names the argument."""
    with pytest.raises(ValueError, match="ref_log_probs"):
        kl_estimate(torch.zeros(2, 3), torch.zeros(shape))


# exact_kl


@pytest.mark.equation("eq:kl")
def test_exact_kl_equals_torch_distributions():
    """Oracle: torch.distributions.kl_divergence; the gradients in closed form, p (log(p / q) - KL)
    and q - p."""
    generator = torch.Generator().manual_seed(2)
    z, w = torch.randn(2, 3, 4, 6, generator=generator, dtype=torch.float64)
    expected = kl_divergence(Categorical(logits=z), Categorical(logits=w))
    torch.testing.assert_close(exact_kl(z, w), expected, rtol=1e-12, atol=1e-13)
    z.requires_grad_(), w.requires_grad_()
    grad_z, grad_w = torch.autograd.grad(exact_kl(z, w).sum(), (z, w))
    log_p, log_q = torch.log_softmax(z.detach(), -1), torch.log_softmax(w.detach(), -1)
    p, q = log_p.exp(), log_q.exp()
    torch.testing.assert_close(
        grad_z, p * (log_p - log_q - expected[..., None]), rtol=1e-11, atol=1e-13
    )
    torch.testing.assert_close(grad_w, q - p, rtol=1e-11, atol=1e-13)


@pytest.mark.equation("eq:kl")
def test_exact_kl_in_both_directions_by_hand():
    """Oracle: the two sums written out for a coin of 3/4 against a fair one, which differ."""
    biased = torch.tensor([[[math.log(3.0), 0.0]]], dtype=torch.float64)
    fair = torch.zeros(1, 1, 2, dtype=torch.float64)
    assert exact_kl(biased, fair).item() == pytest.approx(
        0.75 * math.log(1.5) + 0.25 * math.log(0.5), rel=1e-12
    )
    assert exact_kl(fair, biased).item() == pytest.approx(
        0.5 * math.log(2 / 3) + 0.5 * math.log(2), rel=1e-12
    )


def test_exact_kl_equals_trl_distillation_loss():
    """Oracle: TRL's generalised Jensen-Shannon loss at beta = 1, which is KL(student ||
    teacher)."""
    gkd = pytest.importorskip("trl.experimental.gkd.gkd_trainer")
    generator = torch.Generator().manual_seed(4)
    student, teacher = torch.randn(2, 2, 3, 5, generator=generator, dtype=torch.float64)
    expected = gkd.GKDTrainer.generalized_jsd_loss(student, teacher, beta=1, reduction="none").sum(
        -1
    )
    torch.testing.assert_close(exact_kl(student, teacher), expected, rtol=1e-11, atol=1e-13)


@pytest.mark.equation("eq:kl")
def test_hessian_of_exact_kl_at_the_old_policy_is_the_fisher_matrix():
    """Oracle: the closed form diag(p) - p p^T, for either argument."""
    logits, _ = two_policies(1)
    p = torch.softmax(logits, -1)
    fisher = torch.diag(p) - torch.outer(p, p)
    for function in (
        lambda z: exact_kl(logits[None, None], z[None, None]).sum(),
        lambda z: exact_kl(z[None, None], logits[None, None]).sum(),
    ):
        torch.testing.assert_close(
            torch.func.hessian(function)(logits), fisher, rtol=1e-12, atol=1e-13
        )


@modest
@given(
    logits=hnp.arrays(np.float32, (1, 2, 4), elements=st.floats(-1e4, 1e4, width=32)),
    ref_logits=hnp.arrays(np.float32, (1, 2, 4), elements=st.floats(-1e4, 1e4, width=32)),
)
def test_exact_kl_is_finite_and_not_negative_for_extreme_logits(logits, ref_logits):
    """Oracle: float64 scipy log-softmax and the sum; Gibbs' inequality up to float32 rounding of
    logits of size 1e4.

    torch.distributions is no oracle here: it calls the KL infinite where a probability underflows.
    """
    z, w = torch.from_numpy(logits).requires_grad_(), torch.from_numpy(ref_logits).requires_grad_()
    result = exact_kl(z, w)
    log_p, log_q = (
        log_softmax(logits.astype(np.float64), -1),
        log_softmax(ref_logits.astype(np.float64), -1),
    )
    expected = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    np.testing.assert_allclose(result.detach().numpy(), expected, rtol=1e-4, atol=5e-3)
    assert (result >= -5e-3).all()
    result.sum().backward()
    assert z.grad.isfinite().all()
    assert w.grad.isfinite().all()


def test_exact_kl_where_probabilities_are_zero():
    """Oracle: 0 log(0 / q) = 0, so a token impossible under both or under pi alone adds nothing; p
    log(p / 0) = inf."""
    never = -float("inf")
    both = exact_kl(torch.tensor([[[0.0, 1.0, never]]]), torch.tensor([[[0.5, 0.5, never]]]))
    expected = exact_kl(torch.tensor([[[0.0, 1.0]]]), torch.tensor([[[0.5, 0.5]]]))
    assert both.item() == pytest.approx(expected.item(), rel=1e-6)
    assert exact_kl(
        torch.tensor([[[0.0, 0.0, never]]]), torch.zeros(1, 1, 3)
    ).item() == pytest.approx(math.log(1.5))
    assert exact_kl(torch.zeros(1, 1, 3), torch.tensor([[[0.0, 0.0, never]]])).item() == math.inf


def test_exact_kl_of_a_policy_with_itself_is_zero():
    """Oracle: KL(p || p) = 0, where every gradient vanishes too."""
    logits = two_policies(5)[0].reshape(1, 1, -1).clone().requires_grad_()
    result = exact_kl(logits, logits.detach())
    result.sum().backward()
    assert result.item() == pytest.approx(0.0, abs=1e-15)
    assert logits.grad.abs().max() < 1e-15


@pytest.mark.parametrize("shape", [(2, 3, 4), (2, 2, 5), (1, 3, 5), (3, 5)])
def test_exact_kl_rejects_unequal_shapes(shape):
    """Oracle: the specification: no silent broadcasting; the message names the argument."""
    with pytest.raises(ValueError, match="ref_logits"):
        exact_kl(torch.zeros(2, 3, 5), torch.zeros(shape))


# AdaptiveKLController


@pytest.mark.equation("eq:adaptive-kl")
@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        (6.0, 0.2),  # on target
        (6.6, 0.2 * (1 + 0.1 * 0.05)),  # 10 % above, inside the band
        (5.4, 0.2 * (1 - 0.1 * 0.05)),
        (60.0, 0.2 * (1 + 0.2 * 0.05)),  # far above: the error is clipped at 0.2
        (0.0, 0.2 * (1 - 0.2 * 0.05)),
    ],
)
def test_controller_moves_by_the_clipped_relative_error(kl, expected):
    """Oracle: numbers worked out by hand with the defaults (0.2, 6, 10,000) and 500 steps."""
    controller = AdaptiveKLController()
    controller.update(kl, 500)
    assert controller.coefficient == pytest.approx(expected, rel=1e-12)


@pytest.mark.equation("eq:adaptive-kl")
def test_controller_updates_multiply():
    """Oracle: the product of the factors, in NumPy."""
    kls = [1.0, 3.2, 2.9, 40.0, 3.0]
    controller = AdaptiveKLController(coefficient=0.05, target=3.0, horizon=100)
    for kl in kls:
        controller.update(kl, 32)
    factors = 1 + np.clip(np.array(kls) / 3.0 - 1, -0.2, 0.2) * 32 / 100
    assert controller.coefficient == pytest.approx(0.05 * factors.prod(), rel=1e-12)


@pytest.mark.parametrize(
    ("name", "value"), [("target", 0.0), ("target", -1.0), ("horizon", 0), ("horizon", -5)]
)
def test_controller_rejects_what_it_would_divide_by(name, value):
    """Oracle: the specification: ValueError that names the argument."""
    with pytest.raises(ValueError, match=name):
        AdaptiveKLController(**{name: value})


def test_controller_refuses_a_kl_that_is_not_a_number_and_keeps_its_coefficient():
    """Oracle: the specification: ValueError that names the argument."""
    controller = AdaptiveKLController()
    with pytest.raises(ValueError, match="kl"):
        controller.update(float("nan"), 100)
    assert controller.coefficient == 0.2


def test_inputs_are_left_as_they_were():
    """Oracle: copies made before the calls."""
    logits, ref_logits = two_policies()
    before = logits.clone(), ref_logits.clone()
    for kind in KINDS:
        kl_estimate(logits[None], ref_logits[None], kind)
    exact_kl(logits[None, None], ref_logits[None, None])
    assert torch.equal(before[0], logits)
    assert torch.equal(before[1], ref_logits)
