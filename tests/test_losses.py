"""Policy and value losses: values and gradients against TRL, enumeration, NumPy loops and finite
differences."""

import itertools
import math

import numpy as np
import pytest
import torch
import trl_stubs
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numbers_and_words import value_and_gradient

from rlhf_helpers.losses import (
    GRPO_TYPES,
    IMPORTANCE,
    grpo_loss,
    policy_gradient_loss,
    ppo_clip_loss,
    value_loss,
)

modest = settings(max_examples=40, deadline=None, derandomize=True)
GARBAGE = [float("nan"), float("inf"), -float("inf"), 1e30]
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]])


def random_tensors(count, seed=0, shape=(3, 4)):
    return torch.randn(
        count, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def ppo_batch(seed=0):
    """Log-ratios of both signs, inside and outside the clip range, with advantages of both
    signs."""
    noise, old, advantages = random_tensors(3, seed)
    return old + 0.5 * noise, old, advantages


def single(number):
    return torch.tensor([[number]], dtype=torch.float64)


# policy_gradient_loss


@pytest.mark.equation("eq:policy-gradient")
@pytest.mark.parametrize("mask", [None, MASK])
def test_policy_gradient_loss_is_minus_the_mean_of_advantage_times_log_prob(mask):
    """Oracle: a NumPy loop over the unmasked entries for the value, -A / count for the gradient."""
    log_probs, advantages = random_tensors(2)
    counted = torch.ones(3, 4) if mask is None else mask
    terms = [
        -advantages[i, t].item() * log_probs[i, t].item()
        for i, t in itertools.product(range(3), range(4))
        if counted[i, t]
    ]
    value, gradient = value_and_gradient(
        lambda x: policy_gradient_loss(x, advantages, mask), log_probs
    )
    assert value.shape == ()
    assert value.item() == pytest.approx(np.mean(terms), rel=1e-12)
    torch.testing.assert_close(gradient, -advantages * counted / len(terms), rtol=1e-12, atol=0)


@pytest.mark.equation("eq:policy-gradient")
@pytest.mark.parametrize("baseline", [0.0, 1.5])
def test_its_expected_gradient_is_the_gradient_of_the_expected_reward(baseline):
    """Oracle: autograd of J = sum of p(a) r(a) over all actions; any constant baseline leaves the
    mean alone."""
    rewards = torch.tensor([1.0, 2.0, 0.0, -3.0], dtype=torch.float64)
    logits = torch.tensor([0.3, -0.2, 0.9, 0.1], dtype=torch.float64, requires_grad=True)
    (true,) = torch.autograd.grad((torch.softmax(logits, -1) * rewards).sum(), logits)
    log_p = torch.log_softmax(logits, -1)
    expected_loss = sum(
        log_p[a].exp().detach()
        * policy_gradient_loss(log_p[a].reshape(1, 1), (rewards[a] - baseline).reshape(1, 1))
        for a in range(4)
    )
    (found,) = torch.autograd.grad(expected_loss, logits)
    torch.testing.assert_close(found, -true, rtol=1e-12, atol=1e-14)


@pytest.mark.equation("eq:policy-gradient")
def test_its_expected_gradient_over_all_two_step_sequences():
    """Oracle: autograd of the expected return of a two-step policy, all nine sequences enumerated.

    The loss is a mean over the two tokens, hence the factor one half.
    """
    logits = random_tensors(1, seed=4, shape=(4, 3))[0].requires_grad_()
    rewards = random_tensors(1, seed=5, shape=(3, 3))[0]
    log_p = torch.log_softmax(logits, -1)
    objective, expected_loss = 0.0, 0.0
    for a, b in itertools.product(range(3), range(3)):
        log_probs = torch.stack([log_p[0, a], log_p[1 + a, b]])
        probability = log_probs.sum().exp()
        objective = objective + probability * rewards[a, b]
        loss = policy_gradient_loss(log_probs[None], rewards[a, b].expand(1, 2))
        expected_loss = expected_loss + probability.detach() * loss
    (true,) = torch.autograd.grad(objective, logits, retain_graph=True)
    (found,) = torch.autograd.grad(expected_loss, logits)
    torch.testing.assert_close(found, -true / 2, rtol=1e-12, atol=1e-14)


# ppo_clip_loss


@pytest.mark.equation("eq:ppo-clip")
@pytest.mark.parametrize(
    ("advantage", "ratio", "loss", "slope"),
    [(1, 0.5, -0.5, -1.0), (1, 1.5, -1.2, 0.0), (-1, 0.5, 0.8, 0.0), (-1, 1.5, 1.5, 1.0)],
)
def test_the_four_cases_of_clipping(advantage, ratio, loss, slope):
    """Oracle: the clipped objective worked out by hand, and its derivative by the ratio: -1, 0, 0,
    1."""
    r = single(ratio).requires_grad_()
    result = ppo_clip_loss(r.log(), single(0.0), single(float(advantage)))
    result.loss.backward()
    assert result.loss.item() == pytest.approx(loss, rel=1e-12)
    assert r.grad.item() == pytest.approx(slope, abs=1e-12)


def loop_ppo(log_probs, old, advantages, mask, low, high, dual_clip):
    """The definition, one token at a time."""
    terms = []
    for x, y, a, m in zip(
        *(np.asarray(z).flatten() for z in (log_probs, old, advantages, mask)), strict=True
    ):
        if m:
            r = math.exp(x - y)
            term = min(r * a, max(1 - low, min(r, 1 + high)) * a)
            if dual_clip is not None and a < 0:
                term = max(term, dual_clip * a)
            terms.append(-term)
    return np.mean(terms)


def central_differences(function, x, step=1e-6):
    result = np.zeros_like(x)
    for index in np.ndindex(*x.shape):
        up, down = x.copy(), x.copy()
        up[index] += step
        down[index] -= step
        result[index] = (function(up) - function(down)) / (2 * step)
    return result


@pytest.mark.equation("eq:ppo-clip")
@pytest.mark.equation("eq:dual-clip")
@pytest.mark.parametrize(
    ("clip", "clip_high", "dual_clip"), [(0.2, None, None), (0.2, 0.28, None), (0.1, None, 1.3)]
)
@pytest.mark.parametrize("mask", [None, MASK])
def test_ppo_loss_equals_a_loop_and_its_finite_differences(clip, clip_high, dual_clip, mask):
    """Oracle: a loop over tokens in Python floats; central differences of that loop for the
    gradient."""
    log_probs, old, advantages = ppo_batch()
    counted = np.ones((3, 4)) if mask is None else mask.numpy()

    def oracle(x):
        high = clip if clip_high is None else clip_high
        return loop_ppo(x, old, advantages, counted, clip, high, dual_clip)

    value, gradient = value_and_gradient(
        lambda x: ppo_clip_loss(x, old, advantages, mask, clip, clip_high, dual_clip).loss,
        log_probs,
    )
    assert value.item() == pytest.approx(oracle(log_probs.numpy()), rel=1e-12)
    np.testing.assert_allclose(
        gradient.numpy(), central_differences(oracle, log_probs.numpy()), rtol=1e-6, atol=1e-8
    )


@pytest.mark.equation("eq:ppo-clip")
@pytest.mark.equation("eq:dual-clip")
@pytest.mark.parametrize(
    ("clip", "clip_high", "dual_clip"), [(0.2, None, None), (0.2, 0.28, None), (0.2, None, 1.5)]
)
@pytest.mark.parametrize("seed", range(3))
def test_ppo_loss_equals_trl(clip, clip_high, dual_clip, seed):
    """Oracle: TRL's GRPOTrainer._compute_loss, value, gradient and clip fraction; its `delta` is
    the dual clip.

    TRL caps the ratio at delta for either sign of A; with delta > 1 + clip that changes nothing for
    A > 0.
    """
    pytest.importorskip("trl")
    log_probs, old, advantages = ppo_batch(seed)
    expected, slope = value_and_gradient(
        lambda x: trl_stubs.grpo_loss(x, old, advantages, MASK, clip, clip_high, dual_clip)[0],
        log_probs,
    )
    value, gradient = value_and_gradient(
        lambda x: ppo_clip_loss(x, old, advantages, MASK, clip, clip_high, dual_clip).loss,
        log_probs,
    )
    torch.testing.assert_close(value, expected, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(gradient, slope, rtol=1e-12, atol=1e-15)
    fraction = ppo_clip_loss(
        log_probs, old, advantages, MASK, clip, clip_high, dual_clip
    ).clip_fraction
    assert float(fraction) == pytest.approx(
        trl_stubs.grpo_loss(log_probs, old, advantages, MASK, clip, clip_high, None)[1]
    )


@pytest.mark.equation("eq:ppo-clip")
def test_on_policy_the_gradient_is_the_policy_gradient():
    """Oracle: at ratio 1 the surrogate's gradient is -A / count, and its value minus the mean
    advantage."""
    log_probs, advantages = random_tensors(2)
    value, gradient = value_and_gradient(
        lambda x: ppo_clip_loss(x, log_probs, advantages, MASK).loss, log_probs
    )
    assert value.item() == pytest.approx(-advantages[MASK.bool()].mean().item(), rel=1e-12)
    torch.testing.assert_close(gradient, -advantages * MASK / MASK.sum(), rtol=1e-12, atol=0)


@pytest.mark.equation("eq:dual-clip")
def test_dual_clip_bounds_the_loss_of_a_bad_action_that_became_likely():
    """Oracle: by hand: for A = -2 and r = 10 the loss is 20, with c = 3 it is 6 and has no
    gradient."""
    log_ratio, old, advantage = single(math.log(10.0)), single(0.0), single(-2.0)
    free, slope = value_and_gradient(lambda x: ppo_clip_loss(x, old, advantage).loss, log_ratio)
    bounded, flat = value_and_gradient(
        lambda x: ppo_clip_loss(x, old, advantage, dual_clip=3.0).loss, log_ratio
    )
    assert (free.item(), slope.item()) == pytest.approx((20.0, 20.0), rel=1e-12)
    assert (bounded.item(), flat.item()) == pytest.approx((6.0, 0.0), rel=1e-12)


@pytest.mark.equation("eq:dual-clip")
@pytest.mark.parametrize(
    ("advantage", "ratio"), [(-2.0, 2.9), (-2.0, 0.1), (2.0, 10.0), (2.0, 0.1), (0.0, 10.0)]
)
def test_dual_clip_changes_nothing_elsewhere(advantage, ratio):
    """Oracle: the plain clipped loss, where A >= 0 or r < c."""
    log_ratio, old, a = single(math.log(ratio)), single(0.0), single(advantage)
    plain = value_and_gradient(lambda x: ppo_clip_loss(x, old, a).loss, log_ratio)
    dual = value_and_gradient(lambda x: ppo_clip_loss(x, old, a, dual_clip=3.0).loss, log_ratio)
    assert plain == dual


@pytest.mark.equation("eq:ppo-clip")
def test_asymmetric_clip_range():
    """Oracle: by hand: with clip 0.2 and clip_high 0.5, r = 2 and A = 1 give 1.5, r = 0.1 and A =
    -1 give 0.8."""
    up = ppo_clip_loss(single(math.log(2.0)), single(0.0), single(1.0), clip=0.2, clip_high=0.5)
    down = ppo_clip_loss(single(math.log(0.1)), single(0.0), single(-1.0), clip=0.2, clip_high=0.5)
    assert (up.loss.item(), down.loss.item()) == pytest.approx((-1.5, 0.8), rel=1e-12)


def test_clip_fraction_counts_only_tokens_whose_gradient_is_cut():
    """Oracle: by hand: of six tokens, five counted, the second and third are cut: 2 / 5."""
    ratios = torch.tensor([[0.5, 0.5, 1.5, 1.5, 1.1, 1.5]], dtype=torch.float64)
    advantages = torch.tensor([[1.0, -1.0, 1.0, -1.0, 1.0, 1.0]], dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1, 1, 0]])
    result = ppo_clip_loss(ratios.log(), torch.zeros(1, 6).double(), advantages, mask)
    assert float(result.clip_fraction) == pytest.approx(0.4)


def test_clip_fraction_uses_each_side_of_an_asymmetric_range():
    """Oracle: by hand: with clip 0.2 and clip_high 0.5, of (1.3, 0.7, 1.6) the last two are cut for
    A = (1, -1, 1)."""
    log_ratios = torch.tensor([[1.3, 0.7, 1.6]], dtype=torch.float64).log()
    advantages = torch.tensor([[1.0, -1.0, 1.0]], dtype=torch.float64)
    result = ppo_clip_loss(
        log_ratios, torch.zeros(1, 3).double(), advantages, clip=0.2, clip_high=0.5
    )
    assert float(result.clip_fraction) == pytest.approx(2 / 3)


def test_a_token_without_an_advantage_is_not_cut():
    """Oracle: by hand: of four tokens outside the range on either side, two have A = 0, as all
    tokens of a constant group have: no clip takes a gradient from them."""
    log_ratios = torch.tensor([[1.5, 0.5, 1.5, 0.5]], dtype=torch.float64).log()
    advantages = torch.tensor([[0.0, 0.0, 1.0, -1.0]], dtype=torch.float64)
    result = ppo_clip_loss(log_ratios, torch.zeros_like(log_ratios), advantages)
    assert float(result.clip_fraction) == 0.5


def test_what_is_constant_gets_no_gradient():
    """Oracle: autograd's own bookkeeping: only the policy's log-probabilities and the values are
    trained."""
    x, *constants = random_tensors(5)
    x.requires_grad_()
    old, advantages, ref, returns = (each.requires_grad_() for each in constants)
    for loss in (
        policy_gradient_loss(x, advantages),
        ppo_clip_loss(x, old, advantages, dual_clip=1.1).loss,
        value_loss(x, old, returns, clip=0.1),
        *(
            grpo_loss(
                *(x, old, advantages, MASK),
                ref_log_probs=ref,
                beta=0.3,
                importance=importance,
                bias_correct_kl=correct,
            ).loss
            for importance, correct in itertools.product(IMPORTANCE, (False, True))
        ),
    ):
        loss.backward()
    assert x.grad is not None
    assert all(each.grad is None for each in constants)


def test_approximate_kl_is_the_masked_mean_of_r_minus_one_minus_log_r():
    """Oracle: a loop in Python floats over the unmasked tokens."""
    log_probs, old, advantages = ppo_batch()
    differences = (log_probs - old)[MASK.bool()].tolist()
    expected = np.mean([math.exp(d) - 1 - d for d in differences])
    found = ppo_clip_loss(log_probs, old, advantages, MASK).approx_kl
    assert float(found) == pytest.approx(expected, rel=1e-12)


def test_approximate_kl_of_a_small_step_keeps_its_digits_in_single_precision():
    """Oracle: d^2 / 2 in float64 for d = 1e-4; exp(d) - 1 - d is off by a factor of three in
    float32."""
    step = torch.tensor([[1e-4]])
    found = ppo_clip_loss(step, torch.zeros(1, 1), torch.ones(1, 1)).approx_kl
    assert float(found) == pytest.approx(step.double().item() ** 2 / 2, rel=1e-4)


def test_a_huge_ratio_still_pulls_back_a_bad_action():
    """Oracle: the derivative of -r A by the log-ratio, which is -r A = exp(80) for A = -1, finite
    in float32."""
    log_prob = torch.tensor([[80.0]], requires_grad=True)
    result = ppo_clip_loss(log_prob, torch.zeros(1, 1), -torch.ones(1, 1))
    result.loss.backward()
    assert result.loss.item() == pytest.approx(math.exp(80), rel=1e-4)
    assert log_prob.grad.item() == pytest.approx(math.exp(80), rel=1e-4)


def test_an_overflowing_ratio_is_clipped_without_nan():
    """Oracle: for A = 1 the clipped term 1.2, with zero gradient, though exp(200) has no
    float32."""
    log_prob = torch.tensor([[200.0]], requires_grad=True)
    result = ppo_clip_loss(log_prob, torch.zeros(1, 1), torch.ones(1, 1))
    result.loss.backward()
    assert (result.loss.item(), log_prob.grad.item()) == (pytest.approx(-1.2), 0.0)


def test_diagnostics_carry_no_gradient():
    """Oracle: autograd's own bookkeeping."""
    log_probs, old, advantages = ppo_batch()
    result = ppo_clip_loss(log_probs.requires_grad_(), old, advantages, MASK)
    assert result.loss.requires_grad
    assert not getattr(result.clip_fraction, "requires_grad", False)
    assert not getattr(result.approx_kl, "requires_grad", False)


@modest
@given(
    log_ratios=hnp.arrays(np.float32, (2, 3), elements=st.floats(-80, 80, width=32)),
    advantages=hnp.arrays(np.float32, (2, 3), elements=st.floats(-10, 10, width=32)),
    dual_clip=st.sampled_from([None, 3.0]),
)
@example(
    log_ratios=np.full((2, 3), 80, np.float32),
    advantages=np.full((2, 3), -1, np.float32),
    dual_clip=None,
)
@example(
    log_ratios=np.full((2, 3), 80, np.float32),
    advantages=np.full((2, 3), 1, np.float32),
    dual_clip=None,
)
def test_extreme_ratios_give_finite_losses_and_gradients(log_ratios, advantages, dual_clip):
    """Oracle: the loop over tokens in Python floats; for the gradient, that it is finite, as the
    true one is."""
    log_probs, old = torch.from_numpy(log_ratios).requires_grad_(), torch.zeros(2, 3)
    result = ppo_clip_loss(log_probs, old, torch.from_numpy(advantages), dual_clip=dual_clip)
    expected = loop_ppo(
        log_ratios.astype(float), old, advantages.astype(float), np.ones(6), 0.2, 0.2, dual_clip
    )
    scale = float(np.abs(advantages).max()) * math.exp(max(0.0, log_ratios.max()))
    assert result.loss.item() == pytest.approx(expected, rel=1e-4, abs=1e-5 * scale + 1e-6)
    assert math.isfinite(result.approx_kl)
    assert 0 <= result.clip_fraction <= 1
    (gradient,) = torch.autograd.grad(result.loss, log_probs)
    assert gradient.isfinite().all()


# value_loss


def loop_value_loss(values, old, returns, mask, clip):
    terms = []
    for v, o, g, m in zip(
        *(np.asarray(z).flatten() for z in (values, old, returns, mask)), strict=True
    ):
        if m:
            error = (v - g) ** 2
            if clip is not None:
                error = max(error, (min(max(v, o - clip), o + clip) - g) ** 2)
            terms.append(error / 2)
    return np.mean(terms)


@pytest.mark.equation("eq:value-loss")
@pytest.mark.parametrize("clip", [None, 0.2, 1.0])
@pytest.mark.parametrize("mask", [None, MASK])
def test_value_loss_equals_a_loop_and_its_finite_differences(clip, mask):
    """Oracle: a loop over tokens in Python floats; central differences of that loop for the
    gradient."""
    values, old, returns = random_tensors(3, seed=7)
    counted = np.ones((3, 4)) if mask is None else mask.numpy()

    def oracle(x):
        return loop_value_loss(x, old, returns, counted, clip)

    value, gradient = value_and_gradient(lambda x: value_loss(x, old, returns, mask, clip), values)
    assert value.shape == ()
    assert value.item() == pytest.approx(oracle(values.numpy()), rel=1e-12)
    np.testing.assert_allclose(
        gradient.numpy(), central_differences(oracle, values.numpy()), rtol=1e-6, atol=1e-8
    )


@pytest.mark.equation("eq:value-loss")
def test_value_loss_without_clipping_is_half_the_mean_squared_error():
    """Oracle: torch.nn.functional.mse_loss on the unmasked entries; old values play no part."""
    values, old, returns = random_tensors(3)
    chosen = MASK.bool()
    expected, slope = value_and_gradient(
        lambda x: torch.nn.functional.mse_loss(x[chosen], returns[chosen]) / 2, values
    )
    value, gradient = value_and_gradient(lambda x: value_loss(x, old, returns, MASK), values)
    torch.testing.assert_close(value, expected, rtol=1e-13, atol=0)
    torch.testing.assert_close(gradient, slope, rtol=1e-12, atol=1e-15)


@pytest.mark.equation("eq:value-loss")
@pytest.mark.parametrize(
    ("value", "target", "loss", "slope"),
    [
        (0.1, 1.0, 0.405, -0.9),  # inside the range: the plain loss
        (0.9, 1.0, 0.32, 0.0),  # ran ahead toward the target: (0.2 - 1)^2 / 2, nothing more to gain
        (0.9, -1.0, 1.805, 1.9),  # ran away from the target: the plain loss pulls it back
        (-0.9, -1.0, 0.32, 0.0),
        (-0.9, 1.0, 1.805, -1.9),
    ],
)
def test_the_cases_of_value_clipping(value, target, loss, slope):
    """Oracle: half the larger squared error, worked out by hand with old value 0 and clip 0.2."""
    found, gradient = value_and_gradient(
        lambda x: value_loss(x, single(0.0), single(target), clip=0.2), single(value)
    )
    assert found.item() == pytest.approx(loss, rel=1e-12)
    assert gradient.item() == pytest.approx(slope, abs=1e-12)


# Shared by all three losses


def call(name, tensors, mask):
    """Each loss with its tensor arguments in order, options on."""
    if name == "policy_gradient_loss":
        return policy_gradient_loss(*tensors[:2], mask)
    if name == "ppo_clip_loss":
        return ppo_clip_loss(*tensors[:3], mask, dual_clip=3.0).loss
    return value_loss(*tensors[:3], mask, clip=0.2)


LOSSES = ["policy_gradient_loss", "ppo_clip_loss", "value_loss"]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("garbage", GARBAGE)
def test_garbage_under_the_mask_leaks_into_neither_value_nor_gradient(name, garbage):
    """Oracle: the same call with zeros under the mask."""
    mask = MASK.bool()
    clean = [torch.where(mask, x, 0.0) for x in random_tensors(3)]
    dirty = [torch.where(mask, x, garbage) for x in clean]
    expected, slope = value_and_gradient(lambda x: call(name, [x, *clean[1:]], mask), clean[0])
    found, gradient = value_and_gradient(lambda x: call(name, [x, *dirty[1:]], mask), dirty[0])
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)
    torch.testing.assert_close(gradient, slope, rtol=1e-12, atol=1e-15)
    assert (gradient[~mask] == 0).all()


def test_garbage_under_the_mask_leaves_the_diagnostics_alone():
    """Oracle: the same call with zeros under the mask."""
    mask = MASK.bool()
    clean = [torch.where(mask, x, 0.0) for x in ppo_batch()]
    expected = ppo_clip_loss(*clean, mask)
    for garbage in GARBAGE:
        found = ppo_clip_loss(*[torch.where(mask, x, garbage) for x in clean], mask)
        assert float(found.clip_fraction) == float(expected.clip_fraction)
        assert float(found.approx_kl) == pytest.approx(float(expected.approx_kl), rel=1e-14)


@pytest.mark.parametrize("name", LOSSES)
def test_only_the_first_argument_receives_a_gradient(name):
    """Oracle: the specification: advantages, returns, and what the old policy or critic said are
    data."""
    tensors = [x.requires_grad_() for x in random_tensors(3).unbind()]
    first, *others = torch.autograd.grad(call(name, tensors, MASK), tensors, allow_unused=True)
    assert first.abs().sum() > 0
    assert all(other is None or (other == 0).all() for other in others)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32, torch.float64])
def test_masks_of_any_type_mean_the_same(name, dtype):
    """Oracle: the loss of the unmasked entries alone, as one row without a mask."""
    tensors = random_tensors(3)
    chosen = [x[MASK.bool()][None] for x in tensors]
    assert call(name, tensors, MASK.to(dtype)).item() == pytest.approx(
        call(name, chosen, None).item(), rel=1e-12
    )


@pytest.mark.parametrize("name", LOSSES)
def test_every_token_weighs_the_same(name):
    """Oracle: the loss of a long and a short row together is the mean over tokens, not over
    rows."""
    tensors = random_tensors(3, shape=(2, 4))
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]])
    rows = [call(name, [x[i : i + 1] for x in tensors], mask[i : i + 1]).item() for i in range(2)]
    assert call(name, tensors, mask).item() == pytest.approx((4 * rows[0] + rows[1]) / 5, rel=1e-12)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(
    "mask", [torch.zeros(2, 3), torch.ones(2, 4), torch.ones(3), torch.ones(2, 1)]
)
def test_an_empty_or_misshapen_mask_is_named(name, mask):
    """Oracle: the specification: ValueError that names the argument."""
    with pytest.raises(ValueError, match="mask"):
        call(name, [torch.zeros(2, 3)] * 3, mask)


@pytest.mark.parametrize("shape", [(2, 4), (3,), (1, 3), (2, 1)])
@pytest.mark.parametrize(
    ("name", "argument"),
    [
        ("policy_gradient_loss", "advantages"),
        ("ppo_clip_loss", "old_log_probs"),
        ("ppo_clip_loss", "advantages"),
        ("value_loss", "old_values"),
        ("value_loss", "returns"),
    ],
)
def test_unequal_shapes_are_named(name, argument, shape):
    """Oracle: the specification: no silent broadcasting; the message names the argument."""
    order = {"policy_gradient_loss": 1, "ppo_clip_loss": 1 + (argument == "advantages")}
    tensors = [torch.zeros(2, 3) for _ in range(3)]
    tensors[order.get(name, 1 + (argument == "returns"))] = torch.zeros(shape)
    with pytest.raises(ValueError, match=argument):
        call(name, tensors, torch.ones(2, 3))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("clip", 0.0),
        ("clip", -0.2),
        ("clip_high", 0.0),
        ("clip_high", -0.1),
        ("dual_clip", 1.0),
        ("dual_clip", 0.5),
    ],
)
def test_ppo_options_out_of_range_are_named(option, value):
    """Oracle: the specification: ValueError that names the argument."""
    with pytest.raises(ValueError, match=option):
        ppo_clip_loss(*[torch.zeros(2, 3)] * 3, **{option: value})


@pytest.mark.parametrize("clip", [0.0, -0.2])
def test_value_clip_out_of_range_is_named(clip):
    """Oracle: the specification: ValueError that names the argument."""
    with pytest.raises(ValueError, match="clip"):
        value_loss(*[torch.zeros(2, 3)] * 3, clip=clip)


@pytest.mark.parametrize("name", LOSSES)
def test_inputs_are_left_as_they_were(name):
    """Oracle: copies made before the call."""
    tensors, mask = random_tensors(3), MASK.clone()
    before = tensors.clone()
    call(name, tensors, mask)
    assert torch.equal(before, tensors)
    assert torch.equal(mask, MASK)


# grpo_loss


@pytest.mark.equation("eq:grpo-loss")
@pytest.mark.parametrize("loss_type", GRPO_TYPES)
@pytest.mark.parametrize("importance", IMPORTANCE)
@pytest.mark.parametrize(("beta", "bias_correct"), [(0.0, False), (0.3, False), (0.3, True)])
def test_grpo_loss_equals_trl(loss_type, importance, beta, bias_correct):
    """Oracle: TRL's GRPOTrainer._compute_loss, value and gradient, with sequences of unequal
    length."""
    log_probs, old, both = ppo_batch()
    advantages, ref = both[:, 0], old + 0.3 * random_tensors(1, 7)[0]
    expected, slope = value_and_gradient(
        lambda x: trl_stubs.grpo_loss(
            x,
            old,
            advantages,
            MASK,
            0.2,
            0.28,
            None,
            ref,
            beta,
            loss_type,
            importance,
            9,
            bias_correct,
        )[0],
        log_probs,
    )
    value, gradient = value_and_gradient(
        lambda x: (
            grpo_loss(
                x,
                old,
                advantages,
                MASK,
                0.2,
                0.28,
                ref,
                beta,
                loss_type,
                importance,
                9,
                bias_correct,
            ).loss
        ),
        log_probs,
    )
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(gradient, slope, rtol=1e-12, atol=1e-15)
    assert (gradient[~MASK.bool()] == 0).all()


@pytest.mark.equation("eq:grpo-loss")
def test_a_token_of_a_long_sequence_weighs_less_in_grpo_alone():
    """Oracle: by hand: two sequences of 1 and 4 tokens at ratio 1 with A = 1; the gradient of a
    token is −1/(2·1) and −1/(2·4) in grpo, −1/5 in dapo and bnpo, −1/(2·4) in dr_grpo with T = 4,
    −1/(2·10) with 10."""
    log_probs = torch.zeros(2, 4, dtype=torch.float64)
    mask, ones = torch.tensor([[1, 0, 0, 0], [1, 1, 1, 1]]), torch.ones(2)
    wanted = {
        "grpo": (0.5, 0.125),
        "bnpo": (0.2, 0.2),
        "dapo": (0.2, 0.2),
        "dr_grpo": (0.125, 0.125),
    }
    for loss_type, (short, long) in wanted.items():
        _, gradient = value_and_gradient(
            lambda x, kind=loss_type: grpo_loss(x, log_probs, ones, mask, loss_type=kind).loss,
            log_probs,
        )
        assert gradient[0, 0].item() == pytest.approx(-short)
        assert gradient[1].tolist() == pytest.approx([-long] * 4)
    _, gradient = value_and_gradient(
        lambda x: (
            grpo_loss(x, log_probs, ones, mask, loss_type="dr_grpo", max_completion_length=10).loss
        ),
        log_probs,
    )
    assert gradient[1].tolist() == pytest.approx([-0.05] * 4)


@pytest.mark.equation("eq:grpo-loss")
def test_advantages_by_sequence_or_by_token_are_the_same():
    """Oracle: the same number repeated along the row."""
    log_probs, old, both = ppo_batch()
    wide = both[:, :1].expand_as(both)
    for loss_type in GRPO_TYPES:
        found = grpo_loss(log_probs, old, both[:, 0], MASK, loss_type=loss_type)
        assert torch.equal(
            torch.stack(found),
            torch.stack(grpo_loss(log_probs, old, wide, MASK, loss_type=loss_type)),
        )


def test_garbage_behind_the_mask_changes_nothing():
    """Oracle: the loss and gradient of the clean batch."""
    log_probs, old, both = ppo_batch()
    ref = old + 0.1
    clean = value_and_gradient(
        lambda x: grpo_loss(x, old, both[:, 0], MASK, ref_log_probs=ref, beta=0.1).loss, log_probs
    )
    for garbage in GARBAGE:
        dirty = [x.masked_fill(~MASK.bool(), garbage) for x in (log_probs, old, ref)]
        value, gradient = value_and_gradient(
            lambda x, d=dirty: (
                grpo_loss(x, d[1], both[:, 0], MASK, ref_log_probs=d[2], beta=0.1).loss
            ),
            dirty[0],
        )
        assert value.item() == clean[0].item()
        assert torch.equal(gradient, clean[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss_type": "ppo"}, "use one of 'grpo'"),
        ({"importance": "word"}, "use one of 'token'"),
        ({"beta": -0.1}, "beta=-0.1"),
        ({"beta": 0.1}, "ref_log_probs is needed"),
        ({"clip": 0.0}, "clip=0.0"),
        ({"advantages": torch.zeros(2)}, "advantages has shape"),
        ({"mask": torch.zeros(3, 4)}, "mask is empty"),
        ({"ref_log_probs": torch.zeros(3, 5)}, "shapes differ"),
        ({"loss_type": "dr_grpo", "max_completion_length": 0}, "max_completion_length=0"),
        ({"advantages": torch.full((3,), math.nan)}, "must be finite"),
    ],
)
def test_bad_input_of_grpo_is_named(change, message):
    given = {"advantages": torch.zeros(3), "mask": MASK} | change
    with pytest.raises(ValueError, match=message):
        grpo_loss(torch.zeros(3, 4), torch.zeros(3, 4), **given)
