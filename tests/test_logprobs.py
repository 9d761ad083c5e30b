"""Token log-probabilities, entropy and masked statistics against torch.distributions, NumPy and
TRL."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch.distributions import Categorical

from rlhf_helpers.logprobs import entropy, masked_mean, masked_whiten, token_log_probs

modest = settings(max_examples=30, deadline=None, derandomize=True)


def random_logits(*shape, seed=0, spread=3.0):
    generator = torch.Generator().manual_seed(seed)
    return spread * torch.randn(*shape, generator=generator, dtype=torch.float64)


def random_tokens(shape, vocabulary, seed=1):
    return torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(seed))


def gradient(function, value):
    """Gradient of the sum of function(value), times fixed weights so that no entry cancels
    another."""
    value = value.detach().clone().requires_grad_()
    result = function(value)
    weights = torch.arange(1, result.numel() + 1, dtype=result.dtype).reshape(result.shape)
    (result * weights).sum().backward()
    return value.grad


# token_log_probs


@pytest.mark.equation("eq:token-log-probs")
@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.5])
def test_token_log_probs_equal_a_categorical_distribution(temperature):
    """Oracle: torch.distributions.Categorical(logits / temperature), value and gradient by
    autograd."""
    logits, tokens = random_logits(3, 4, 7), random_tokens((3, 4), 7)

    def oracle(z):
        return Categorical(logits=z / temperature).log_prob(tokens)

    def ours(z):
        return token_log_probs(z, tokens, temperature)

    torch.testing.assert_close(ours(logits), oracle(logits), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        gradient(ours, logits), gradient(oracle, logits), rtol=1e-12, atol=1e-12
    )


@pytest.mark.equation("eq:token-log-probs")
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_gradient_is_one_hot_minus_softmax_over_temperature(temperature):
    """Oracle: the closed form (1[v = token] - softmax(z / T)_v) / T, and finite differences."""
    logits, tokens = random_logits(2, 3, 5), random_tokens((2, 3), 5)
    z = logits.clone().requires_grad_()
    token_log_probs(z, tokens, temperature).sum().backward()
    one_hot = torch.nn.functional.one_hot(tokens, 5).double()
    expected = (one_hot - torch.softmax(logits / temperature, -1)) / temperature
    torch.testing.assert_close(z.grad, expected, rtol=1e-12, atol=1e-12)
    z.grad = None
    assert torch.autograd.gradcheck(lambda z: token_log_probs(z, tokens, temperature), z)


@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_token_log_probs_equal_trl(temperature):
    """Oracle: trl.trainer.utils.selective_log_softmax."""
    utils = pytest.importorskip("trl.trainer.utils")
    logits, tokens = random_logits(4, 6, 11, seed=3), random_tokens((4, 6), 11)
    expected = utils.selective_log_softmax(logits, tokens, temperature=temperature)
    torch.testing.assert_close(
        token_log_probs(logits, tokens, temperature), expected, rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(
    "shape", [(1, 1, 2), (1, 4200, 260), (4200, 1, 260), (3, 1025, 350), (1000, 3, 370)]
)
def test_chunking_changes_nothing(shape, temperature):
    """Oracle: Categorical on the whole tensor, from two logits to a million; value and gradient."""
    logits, tokens = random_logits(*shape), random_tokens(shape[:2], shape[2])

    def oracle(z):
        return Categorical(logits=z / temperature).log_prob(tokens)

    def ours(z):
        return token_log_probs(z, tokens, temperature)

    torch.testing.assert_close(ours(logits), oracle(logits), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        gradient(ours, logits), gradient(oracle, logits), rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_half_precision_logits_are_scored_in_higher_precision(dtype, temperature):
    """Oracle: the float64 distribution of the same rounded logits; log-softmax inside bfloat16 is
    off by up to 0.07."""
    logits = random_logits(8, 16, 300).to(dtype)
    tokens = random_tokens((8, 16), 300)
    expected = Categorical(logits=logits.double() / temperature).log_prob(tokens)
    result = token_log_probs(logits, tokens, temperature).double()
    assert (result - expected).abs().max() < 1e-2


def peak_new_memory(function):
    """Highest number of bytes alive at once that `function` allocated, from the profiler's
    allocation events."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as record:
        result = function()
    events = [
        event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"
    ]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    del result
    return int(np.cumsum(changes).max())


def test_the_memory_meter_sees_a_second_copy():
    """Oracle: a function known to allocate one tensor of the same size, so that the next test can
    fail."""
    logits = torch.zeros(8, 512, 256)
    assert peak_new_memory(lambda: logits / 0.7) >= logits.nbytes


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(8, 1024, 1024), (4096, 2, 1024)])
def test_forward_pass_makes_no_second_logits_tensor(shape, dtype, temperature, requires_grad):
    """Oracle: the profiler's count of bytes alive, which stays below one copy of the N x T x V
    logits.

    What autograd keeps for the backward pass counts too: chunks that are all kept are a second
        copy.
    """
    sequences, length, vocabulary = shape
    model_output = torch.zeros(
        sequences, length + 1, vocabulary, dtype=dtype, requires_grad=requires_grad
    )
    logits = model_output[
        :, :-1
    ]  # as it comes from a language model: shifted, hence not contiguous
    tokens = torch.zeros(sequences, length, dtype=torch.int64)
    limit = logits.nbytes
    assert peak_new_memory(lambda: token_log_probs(logits, tokens, temperature)) < limit


@modest
@given(
    logits=hnp.arrays(np.float32, (2, 3, 4), elements=st.floats(-1e4, 1e4, width=32)),
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
)
def test_extreme_logits_stay_finite(logits, temperature):
    """Oracle: float64 log-sum-exp shifted by the maximum, in NumPy; the gradient is bounded by 1 /
    T."""
    z = torch.from_numpy(logits).requires_grad_()
    tokens = torch.tensor([[0, 1, 2], [3, 0, 1]])
    result = token_log_probs(z, tokens, temperature)
    scaled = logits.astype(np.float64) / temperature
    top = scaled.max(-1, keepdims=True)
    log_normaliser = (top + np.log(np.exp(scaled - top).sum(-1, keepdims=True)))[..., 0]
    expected = np.take_along_axis(scaled, tokens.numpy()[..., None], -1)[..., 0] - log_normaliser
    np.testing.assert_allclose(result.detach().numpy(), expected, rtol=1e-5, atol=5e-3)
    result.sum().backward()
    assert z.grad.isfinite().all()
    assert z.grad.abs().max() <= (1 + 1e-5) / temperature


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_token_ruled_out_by_its_logit_changes_nothing_for_the_others(temperature):
    """Oracle: the same distribution without that token, value and gradient; the ruled-out logit
    gets no gradient."""
    logits, tokens = random_logits(2, 3, 5), random_tokens((2, 3), 4)
    ruled_out = torch.cat(
        [logits[..., :4], torch.full((2, 3, 1), -float("inf"), dtype=torch.float64)], -1
    )

    def ours(z):
        return token_log_probs(z, tokens, temperature)

    torch.testing.assert_close(ours(ruled_out), ours(logits[..., :4]), rtol=1e-12, atol=1e-12)
    slope = gradient(ours, ruled_out)
    torch.testing.assert_close(
        slope[..., :4], gradient(ours, logits[..., :4]), rtol=1e-12, atol=1e-12
    )
    assert (slope[..., 4] == 0).all()


@pytest.mark.parametrize("tokens_shape", [(2, 4), (3, 3), (2,), (2, 3, 1)])
def test_token_log_probs_rejects_tokens_of_another_shape(tokens_shape):
    """Oracle: the specification: ValueError that names the argument."""
    with pytest.raises(ValueError, match="tokens"):
        token_log_probs(torch.zeros(2, 3, 5), torch.zeros(tokens_shape, dtype=torch.int64))


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_token_log_probs_rejects_temperature(temperature):
    """Oracle: the specification: ValueError that names the argument."""
    with pytest.raises(ValueError, match="temperature"):
        token_log_probs(torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.int64), temperature)


# entropy


@pytest.mark.equation("eq:entropy")
def test_entropy_equals_a_categorical_distribution():
    """Oracle: torch.distributions.Categorical.entropy, and the closed-form gradient -p (log p +
    H)."""
    logits = random_logits(3, 4, 7)
    expected = Categorical(logits=logits).entropy()
    torch.testing.assert_close(entropy(logits), expected, rtol=1e-12, atol=1e-12)
    z = logits.clone().requires_grad_()
    entropy(z).sum().backward()
    log_p = torch.log_softmax(logits, -1)
    torch.testing.assert_close(
        z.grad, -log_p.exp() * (log_p + expected[..., None]), rtol=1e-11, atol=1e-12
    )


def test_entropy_equals_trl():
    """Oracle: trl.trainer.utils.entropy_from_logits."""
    utils = pytest.importorskip("trl.trainer.utils")
    logits = random_logits(4, 6, 11)
    torch.testing.assert_close(
        entropy(logits), utils.entropy_from_logits(logits), rtol=1e-11, atol=1e-12
    )


@pytest.mark.equation("eq:entropy")
def test_entropy_of_known_distributions():
    """Oracle: log V for a uniform distribution, log 2 for a fair coin among impossible tokens, 0
    for certainty."""
    coin = [0.0, 0.0, -1e4, -1e4]
    certain = [1e4, 0.0, 0.0, 0.0]
    result = entropy(torch.tensor([[[3.0] * 4, coin, certain]], dtype=torch.float64))
    expected = torch.tensor([[math.log(4), math.log(2), 0.0]], dtype=torch.float64)
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


def test_tokens_of_probability_zero_add_no_entropy():
    """Oracle: the entropy of the remaining tokens, value and gradient; 0 log 0 counts as 0."""
    logits = random_logits(2, 3, 4)
    ruled_out = torch.cat([logits, torch.full((2, 3, 1), -float("inf"), dtype=torch.float64)], -1)
    torch.testing.assert_close(
        entropy(ruled_out), Categorical(logits=logits).entropy(), rtol=1e-12, atol=1e-12
    )
    slope = gradient(entropy, ruled_out)
    torch.testing.assert_close(slope[..., :4], gradient(entropy, logits), rtol=1e-11, atol=1e-12)
    assert (slope[..., 4] == 0).all()


@modest
@given(logits=hnp.arrays(np.float32, (2, 3, 5), elements=st.floats(-1e4, 1e4, width=32)))
def test_entropy_lies_between_zero_and_log_v_for_extreme_logits(logits):
    """Oracle: the bounds 0 <= H <= log V, and a finite gradient."""
    z = torch.from_numpy(logits).requires_grad_()
    result = entropy(z)
    assert (result >= 0).all()
    assert (result <= math.log(5) + 1e-5).all()
    result.sum().backward()
    assert z.grad.isfinite().all()


# masked_mean


@pytest.mark.equation("eq:masked-mean")
@pytest.mark.parametrize("dim", [None, 0, 1, -1])
def test_masked_mean_equals_numpy_masked_arrays(dim):
    """Oracle: numpy.ma.mean for the value; mask / count for the gradient."""
    values = random_logits(3, 5)
    mask = torch.tensor([[1, 1, 0, 1, 0], [0, 1, 1, 0, 0], [1, 0, 0, 1, 1]])
    expected = np.ma.array(values.numpy(), mask=~mask.bool().numpy()).mean(axis=dim)
    np.testing.assert_allclose(
        masked_mean(values, mask, dim).numpy(), np.asarray(expected), rtol=1e-13
    )
    x = values.clone().requires_grad_()
    masked_mean(x, mask, dim).sum().backward()
    count = mask.sum() if dim is None else mask.sum(dim, keepdim=True)
    torch.testing.assert_close(x.grad, mask.double() / count, rtol=1e-13, atol=0)


def test_masked_mean_counts_tokens_not_rows():
    """Oracle: four ones and a nine make 13 / 5 = 2.6, not the mean of row means, 5."""
    values = torch.tensor([[1.0, 1.0, 1.0, 1.0], [9.0, 0.0, 0.0, 0.0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]])
    assert masked_mean(values, mask).item() == pytest.approx(2.6)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32, torch.float64])
def test_masks_of_any_type_mean_the_same(dtype):
    """Oracle: the hand-computed mean (1 + 3) / 2 and whitened values (-1, 1) / sqrt(2)."""
    values = torch.tensor([[1.0, 100.0, 3.0]], dtype=torch.float64)
    mask = torch.tensor([[1, 0, 1]]).to(dtype)
    assert masked_mean(values, mask).item() == pytest.approx(2.0)
    white = masked_whiten(values, mask)[0]
    assert white[[0, 2]].tolist() == pytest.approx([-math.sqrt(0.5), math.sqrt(0.5)], rel=1e-7)


@modest
@given(
    values=hnp.arrays(np.float64, (3, 4), elements=st.floats(-1e6, 1e6)),
    mask=hnp.arrays(np.bool_, (3, 4)).filter(lambda mask: mask.any()),
)
def test_masked_mean_equals_the_mean_of_what_is_left(values, mask):
    """Oracle: NumPy's mean of the selected entries."""
    result = masked_mean(torch.from_numpy(values), torch.from_numpy(mask))
    assert result.item() == pytest.approx(values[mask].mean(), rel=1e-9, abs=1e-7)


# masked_whiten


def subset_whiten(values, mask, shift_mean, eps):
    chosen = values[mask.bool()]
    mean = chosen.mean()
    return (chosen - mean) / torch.sqrt(chosen.var(unbiased=True) + eps) + (
        0.0 if shift_mean else mean
    )


@pytest.mark.equation("eq:masked-whiten")
@pytest.mark.parametrize("shift_mean", [True, False])
@pytest.mark.parametrize("eps", [1e-8, 0.5])
def test_masked_whiten_equals_whitening_the_selected_entries(shift_mean, eps):
    """Oracle: torch.var(unbiased=True) on the one-dimensional tensor of unmasked entries, value and
    gradient."""
    values = random_logits(3, 4)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 0]])

    def oracle(x):
        return subset_whiten(x, mask, shift_mean, eps)

    def ours(x):
        return masked_whiten(x, mask, shift_mean, eps)[mask.bool()]

    torch.testing.assert_close(ours(values), oracle(values), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        gradient(ours, values), gradient(oracle, values), rtol=1e-10, atol=1e-11
    )


@pytest.mark.parametrize("shape", [(6,), (2, 3), (1, 2, 3), (6, 1)])
def test_whitening_keeps_the_shape(shape):
    """Oracle: the same six numbers as a vector, by NumPy."""
    values = random_logits(6)
    expected = (values.numpy() - values.numpy().mean()) / values.numpy().std(ddof=1)
    found = masked_whiten(values.reshape(shape), torch.ones(shape))
    assert found.shape == shape
    np.testing.assert_allclose(found.flatten().numpy(), expected, rtol=1e-7)


@pytest.mark.equation("eq:masked-whiten")
def test_whitened_values_have_mean_zero_and_unbiased_variance_one():
    """Oracle: numpy.ma.var(ddof=1) of the result."""
    values, mask = 40 + 7 * random_logits(5, 6, spread=1.0), random_logits(5, 6, seed=9) > 0
    white = np.ma.array(masked_whiten(values, mask).numpy(), mask=~mask.numpy())
    assert white.mean() == pytest.approx(0.0, abs=1e-12)
    assert white.var(ddof=1) == pytest.approx(1.0, rel=1e-9)


def test_whitening_without_the_shift_keeps_the_mean():
    """Oracle: the mean of the unmasked input, 2 of (1, 2, 3)."""
    values, mask = torch.tensor([[1.0, 2.0, 3.0, 50.0]]).double(), torch.tensor([[1, 1, 1, 0]])
    white = masked_whiten(values, mask, shift_mean=False)
    assert white[0].tolist() == pytest.approx([1.0, 2.0, 3.0, 0.0], rel=1e-7)
    assert masked_whiten(values, mask)[0, :3].tolist() == pytest.approx([-1.0, 0.0, 1.0], abs=1e-7)


def test_whitening_a_constant_gives_zero():
    """Oracle: (x - mean) is zero, so the result is zero whatever eps is; float32, where the mean is
    rounded."""
    values = torch.full((3, 7), 0.1)
    white = masked_whiten(values, torch.ones(3, 7))
    assert white.abs().max() < 1e-3


# Shared by both masked functions


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), -float("inf"), 1e30])
@pytest.mark.parametrize("function", [masked_mean, masked_whiten])
def test_garbage_under_the_mask_leaks_into_neither_value_nor_gradient(function, garbage):
    """Oracle: the same call with zeros under the mask."""
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]]).bool()
    clean = torch.where(mask, random_logits(2, 4), 0.0)
    dirty = torch.where(mask, clean, garbage)
    torch.testing.assert_close(function(dirty, mask), function(clean, mask), rtol=1e-14, atol=0)
    found, expected = (gradient(lambda x: function(x, mask), values) for values in (dirty, clean))
    assert found.isfinite().all()
    assert (found[~mask] == 0).all()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("function", [masked_mean, masked_whiten])
@pytest.mark.parametrize(
    "mask", [torch.zeros(2, 3), torch.ones(2, 4), torch.ones(3), torch.ones(2, 1)]
)
def test_masked_functions_reject_an_empty_or_misshapen_mask(function, mask):
    """Oracle: the specification: ValueError that names the argument."""
    with pytest.raises(ValueError, match="mask"):
        function(torch.ones(2, 3), mask)


def test_masked_mean_rejects_an_empty_row():
    """Oracle: the specification: a mean over nothing is an empty mask, not a NaN."""
    with pytest.raises(ValueError, match="mask"):
        masked_mean(torch.ones(2, 3), torch.tensor([[1, 1, 0], [0, 0, 0]]), dim=1)


def test_one_entry_cannot_be_whitened():
    """Oracle: the unbiased variance of one number does not exist."""
    with pytest.raises(ValueError, match="mask"):
        masked_whiten(torch.ones(1, 3), torch.tensor([[1, 0, 0]]))


def test_inputs_are_left_as_they_were():
    """Oracle: copies made before the calls."""
    logits, tokens, mask = (
        random_logits(2, 3, 5),
        random_tokens((2, 3), 5),
        torch.tensor([[1, 1, 0], [1, 0, 0]]),
    )
    before = [logits.clone(), tokens.clone(), mask.clone()]
    token_log_probs(logits, tokens, 0.7)
    entropy(logits)
    masked_mean(logits[..., 0], mask)
    masked_whiten(logits[..., 0], mask)
    assert all(torch.equal(a, b) for a, b in zip(before, [logits, tokens, mask], strict=True))
