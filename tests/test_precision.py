"""The mathematics in half precision, in single precision with large numbers, and at log-ratios
whose exponential overflows: against double precision and decimals of the same numbers."""

import itertools
import math
from decimal import Decimal, getcontext

import pytest
import torch
from numbers_and_words import normal, value_and_gradient

from rlhf_helpers import advantages, kl, logprobs, losses

X, Y, Z = normal(3, 2, 600)
LONG = torch.ones(2, 600, dtype=torch.int64)
LONG[1, 400:] = 0
TOKENS = torch.randint(300, (2, 600), generator=torch.Generator().manual_seed(1))
LOGITS = X[..., None] * torch.linspace(-3, 3, 300)
OUTCOME = torch.tensor([0.0, 0.5, 1.0]).repeat(400).view(2, 600)
LENGTHS = torch.arange(1, 601)
SUMS = list(100 * normal(4, 600) - 300)

# Each function with many numbers to add up, of sizes that half precision can hold.
CASES = [
    (logprobs.token_log_probs, [LOGITS, TOKENS], {"temperature": 0.7}),
    (logprobs.entropy, [LOGITS], {}),
    (logprobs.masked_mean, [100 * X, LONG], {}),
    (logprobs.masked_mean, [100 * X, LONG, 1], {}),
    (logprobs.masked_whiten, [300 * X, LONG], {}),
    (logprobs.masked_whiten, [X + 9, LONG], {"shift_mean": False}),
    *((kl.kl_estimate, [X - 9, Y - 9], {"kind": kind}) for kind in kl.KL_KINDS),
    (kl.exact_kl, [LOGITS, LOGITS + 0.1 * normal(2, 600, 300, seed=1)], {}),
    (advantages.discounted_returns, [X.abs(), LONG], {"gamma": 0.999}),
    (advantages.gae, [X.abs(), Y, LONG], {"lam": 1.0}),
    *(
        (advantages.group_relative_advantages, [9000 * X.flatten(), 8], {"scale": scale})
        for scale in advantages.ADVANTAGE_SCALES
    ),
    (advantages.leave_one_out_advantages, [9000 * X.flatten(), 8], {}),
    (losses.policy_gradient_loss, [-X.abs(), 100 * Y, LONG], {}),
    (losses.ppo_clip_loss, [X, Y, Z, LONG], {}),
    *(
        (
            losses.grpo_loss,
            [X, Y, Z[:, 0], LONG],
            {
                "ref_log_probs": X - 0.1 * Z,
                "beta": 0.1,
                "loss_type": loss_type,
                "importance": importance,
                "bias_correct_kl": correct,
            },
        )
        for loss_type, importance, correct in itertools.product(
            losses.GRPO_TYPES, losses.IMPORTANCE, (False, True)
        )
    ),
    (losses.value_loss, [300 * X, 300 * Y, 200 * Z, LONG], {"clip": 5.0}),
    (losses.bradley_terry_loss, [9 * X, 9 * Y, 0.3, Z.sigmoid(), Z.abs()], {}),
    (losses.plackett_luce_loss, [9 * X.view(-1, 8)], {}),
    (losses.rao_kupper_loss, [9 * X, 9 * Y, OUTCOME, 0.3], {}),
    *((losses.dpo_loss, SUMS, {"variant": variant}) for variant in losses.DPO_VARIANTS),
    (losses.simpo_loss, [*SUMS[:2], LENGTHS, LENGTHS + 1], {}),
    (losses.kto_loss, [*SUMS[:2], LENGTHS % 2, 0.3, 0.1], {}),
]


def in_dtype(dtype, values):
    """Tensors of real numbers in that type, the rest as it is."""
    real = [isinstance(v, torch.Tensor) and v.is_floating_point() for v in values]
    return [v.to(dtype) if is_real else v for v, is_real in zip(values, real, strict=True)]


def called(function, values, options):
    """The results as a list, and the gradient of the first by the first argument."""
    first, *others = values
    first = first.detach().clone().requires_grad_()
    found = function(first, *others, **options)
    found = list(found) if isinstance(found, tuple) else [found]
    if not found[0].requires_grad:
        return found, None
    return [each.detach() for each in found], torch.autograd.grad(found[0].sum(), first)[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "case", CASES, ids=lambda c: "-".join([c[0].__name__, *map(str, c[2].values())])[:60]
)
def test_half_precision_is_computed_in_single(case, dtype):
    """Oracle: the same function of the same (rounded) numbers in float64."""
    function, values, options = case
    keys, extra = list(options), list(options.values())
    half = [*in_dtype(dtype, values), *in_dtype(dtype, extra)]
    double = in_dtype(torch.float64, half)
    n = len(values)
    found, slope = called(function, half[:n], dict(zip(keys, half[n:], strict=True)))
    expected, exact = called(function, double[:n], dict(zip(keys, double[n:], strict=True)))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), theirs, rtol=2e-5, atol=2e-5)
    if slope is not None:
        largest = exact.abs().max().item()
        rounding = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 1e-3 * largest + 1e-7}
        torch.testing.assert_close(slope.double(), exact, **rounding)


BIG, BIGGER = 1e20 * X, 3e20 * Y
LARGE = [
    (logprobs.masked_mean, [BIG, LONG], {}),
    (kl.kl_estimate, [BIG, BIGGER, "k1"], {}),
    (kl.kl_estimate, [BIG, BIGGER, "abs"], {}),
    (advantages.discounted_returns, [BIG, LONG], {}),
    (advantages.gae, [BIG, BIGGER, LONG], {}),
    *(
        (advantages.group_relative_advantages, [BIG.flatten(), 8, scale], {})
        for scale in advantages.ADVANTAGE_SCALES
    ),
    (advantages.leave_one_out_advantages, [BIG.flatten(), 8], {}),
    (losses.policy_gradient_loss, [-X.abs(), BIG, LONG], {}),
    (losses.ppo_clip_loss, [X, Y, BIG, LONG], {}),
    (losses.bradley_terry_loss, [BIG, BIGGER], {}),
    (losses.plackett_luce_loss, [BIG.view(-1, 8)], {}),
]


@pytest.mark.parametrize(
    "case", LARGE, ids=lambda c: "-".join([c[0].__name__, *(v for v in c[1] if type(v) is str)])
)
def test_large_numbers_whose_squares_overflow(case):
    """Oracle: float64 of the same numbers, where the squares can be held."""
    function, values, options = case
    single = in_dtype(torch.float32, values)
    found, slope = called(function, single, options)
    expected, exact = called(function, in_dtype(torch.float64, single), options)
    if slope is not None:
        found, expected = [*found, slope], [*expected, exact]
    for ours, theirs in zip(found, expected, strict=True):
        atol = 2e-5 * theirs.abs().max().item()
        torch.testing.assert_close(ours.double(), theirs, rtol=2e-5, atol=atol)


@pytest.mark.equation("eq:masked-whiten")
@pytest.mark.parametrize("size", [1e-3, 1e9, 1e19, 1e20, 1e37])
@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitening_of_large_numbers(size, shift_mean):
    """Oracle: the same numbers whitened in float64, where their squares can be held."""
    values, mask = (size * X).float(), LONG
    found = logprobs.masked_whiten(values, mask, shift_mean)
    expected = logprobs.masked_whiten(values.double(), mask, shift_mean)
    torch.testing.assert_close(found, expected.float(), rtol=2e-5, atol=2e-5)


@pytest.mark.equation("eq:masked-whiten")
@pytest.mark.parametrize("value", [0.1, 0.7, -1 / 3, 1e6 + 0.1, 0.0])
@pytest.mark.parametrize("eps", [1e-8, 0.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_equal_numbers_whiten_to_exactly_zero(value, eps, dtype):
    """Oracle: x - mean(x) is zero in exact arithmetic; in float32 the mean of 0.7 seven times is
    not 0.7, and 1 / sqrt(eps) makes 6e-4 of it."""
    values, mask = torch.full((2, 4), value).clamp(max=6e4).to(dtype), torch.ones(2, 4)
    mask[1, 3], values[1, 3] = 0, 5.0
    assert (logprobs.masked_whiten(values, mask, eps=eps) == 0).all()
    kept = logprobs.masked_whiten(values, mask, shift_mean=False, eps=eps)
    torch.testing.assert_close(kept, values.to(kept.dtype) * mask.to(kept.dtype))


# log-ratios whose exponential overflows

getcontext().prec = 60


def exact_loss(x, old, ref, advantage, beta):
    """Value and slope of min(ρA, clip(ρ)A), negated, plus β·ρ·k3 for one token, in decimals."""
    x, old, ref, advantage = (Decimal(v) for v in (x, old, ref, advantage))
    ratio, d = (x - old).exp(), ref - x
    kept = min(max(ratio, Decimal("0.8")), Decimal("1.2"))
    objective = min(ratio * advantage, kept * advantage)
    slope = ratio * advantage if ratio * advantage <= kept * advantage else Decimal(0)
    value = -objective + Decimal(beta) * ratio * (d.exp() - 1 - d)
    return value, -slope - Decimal(beta) * ratio * d


@pytest.mark.equation("eq:grpo-loss")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("loss_type", losses.GRPO_TYPES)
@pytest.mark.parametrize("importance", losses.IMPORTANCE)
@pytest.mark.parametrize("advantage", [0.0, 1.5, -1.5])
def test_the_corrected_kl_where_its_factors_overflow(dtype, loss_type, importance, advantage):
    """Oracle: decimals of 60 digits, one token a sequence: ρ·k3 is π_ref/π_old − ρ·(1 + d), finite
    where k3 is infinite and ρ is 0."""
    largest = torch.finfo(dtype).max
    for distance, ref in itertools.product(
        (-5000.0, -1000.0, -150.0, -95.0, -60.0, -21.0, -19.0, -3.0, 1e-3, 2.0, 30.0, 80.0),
        (-1.0, -4.0, 2.5),
    ):
        x = torch.tensor([[distance - 1.0]], dtype=dtype)
        old, reference = (torch.tensor([[v]], dtype=dtype) for v in (-1.0, ref))

        def loss(x, old=old, reference=reference):
            return losses.grpo_loss(
                *(x, old, torch.tensor([advantage], dtype=dtype), torch.ones(1, 1)),
                ref_log_probs=reference,
                beta=0.125,
                loss_type=loss_type,
                importance=importance,
                bias_correct_kl=True,
            ).loss

        value, slope = value_and_gradient(loss, x)
        exact = exact_loss(x.item(), -1.0, ref, advantage, 0.125)
        for found, true in zip((value, slope), exact, strict=True):
            assert abs(true) < Decimal(largest)
            size = 1e-4 if dtype == torch.float32 else 1e-10
            assert found.item() == pytest.approx(float(true), rel=size, abs=1e-6), (distance, ref)


@pytest.mark.equation("eq:ppo-clip")
@pytest.mark.parametrize("log_ratio", [88.0, 90.0, 300.0, 1e9])
def test_a_ratio_that_overflows_still_pulls_back_a_bad_action(log_ratio):
    """Oracle: for A < 0 nothing is clipped: loss and slope are as large as float32 can hold them,
    and not 0; for A > 0 the slope is 0."""
    bad, good = (
        value_and_gradient(
            lambda x, a=a: losses.ppo_clip_loss(x, torch.zeros(1), torch.tensor([a])).loss,
            torch.tensor([log_ratio]),
        )
        for a in (-1.0, 1.0)
    )
    assert all(1e37 < each.item() < math.inf for each in bad)
    assert [each.item() for each in good] == [pytest.approx(-1.2), 0.0]
