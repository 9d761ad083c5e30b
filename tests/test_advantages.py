"""Returns, GAE, group-relative and leave-one-out advantages against definitions written as double
loops."""

import statistics
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.signal import lfilter

from rlhf_helpers.advantages import (
    discounted_returns,
    gae,
    group_relative_advantages,
    leave_one_out_advantages,
)

modest = settings(max_examples=40, deadline=None, derandomize=True)
GARBAGE = [float("nan"), float("inf"), -float("inf"), 1e30]


def prefix_mask(lengths, width):
    return torch.arange(width) < torch.tensor(lengths)[:, None]


def random_batch(lengths=(5, 3, 1), width=5, seed=0):
    """Rewards and values everywhere, also after the end, where neither must count."""
    generator = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, len(lengths), width, generator=generator, dtype=torch.float64)
    return rewards, values, prefix_mask(lengths, width)


def loop_returns(rewards, lengths, gamma):
    result = np.zeros(rewards.shape)
    for row, length in enumerate(lengths):
        for t in range(length):
            result[row, t] = sum(gamma ** (k - t) * rewards[row, k] for k in range(t, length))
    return result


def loop_gae(rewards, values, lengths, gamma, lam):
    """Sum of (gamma lam)^l delta_{t+l}, each delta from its definition, no recursion."""
    result = np.zeros(rewards.shape)
    for row, length in enumerate(lengths):
        following = [values[row, t + 1] if t + 1 < length else 0.0 for t in range(length)]
        delta = [rewards[row, t] + gamma * following[t] - values[row, t] for t in range(length)]
        for t in range(length):
            result[row, t] = sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, length))
    return result


# discounted_returns


@pytest.mark.equation("eq:returns")
@pytest.mark.parametrize("gamma", [0.0, 0.5, 0.97, 1.0])
def test_returns_equal_the_double_loop(gamma):
    """Oracle: a float64 NumPy double loop over the definition, rows of different length."""
    lengths = (5, 3, 1)
    rewards, _, mask = random_batch(lengths)
    expected = loop_returns(rewards.numpy(), lengths, gamma)
    np.testing.assert_allclose(
        discounted_returns(rewards, mask, gamma).numpy(), expected, rtol=1e-12, atol=1e-14
    )


@pytest.mark.equation("eq:returns")
def test_returns_by_hand():
    """Oracle: 1 + 2/2 + 4/4 = 3, 2 + 4/2 = 4, 4; the 100 after the end does not count; gamma
    defaults to 1."""
    rewards, mask = torch.tensor([[1.0, 2.0, 4.0, 100.0]]), torch.tensor([[1, 1, 1, 0]])
    assert discounted_returns(rewards, mask, 0.5).tolist() == [[3.0, 4.0, 4.0, 0.0]]
    assert discounted_returns(rewards, mask).tolist() == [[7.0, 6.0, 4.0, 0.0]]


def test_returns_equal_the_recursive_filter():
    """Oracle: scipy.signal.lfilter run backwards over each row."""
    rewards, _, mask = random_batch((6, 6), 6)
    expected = lfilter([1], [1, -0.9], rewards.numpy()[:, ::-1], axis=1)[:, ::-1]
    np.testing.assert_allclose(discounted_returns(rewards, mask, 0.9).numpy(), expected, rtol=1e-12)


def test_reward_on_the_last_real_token_reaches_every_earlier_one():
    """Oracle: the closed form gamma^(last - t) R."""
    rewards = torch.zeros(2, 4, dtype=torch.float64)
    rewards[0, 3] = rewards[1, 1] = 2.0
    result = discounted_returns(rewards, prefix_mask((4, 2), 4), 0.5)
    assert result.tolist() == [[0.25, 0.5, 1.0, 2.0], [1.0, 2.0, 0.0, 0.0]]


# gae


@pytest.mark.equation("eq:gae")
@pytest.mark.parametrize(
    ("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (0.99, 1.0), (0.7, 0.0), (0.0, 0.5)]
)
def test_gae_equals_the_double_loop(gamma, lam):
    """Oracle: a float64 NumPy double loop over sums of discounted TD errors, rows of different
    length."""
    lengths = (5, 3, 1)
    rewards, values, mask = random_batch(lengths)
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    expected = loop_gae(rewards.numpy(), values.numpy(), lengths, gamma, lam)
    np.testing.assert_allclose(advantages.numpy(), expected, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(
        returns.numpy(), (expected + values.numpy()) * mask.numpy(), rtol=1e-12, atol=1e-14
    )


@pytest.mark.equation("eq:gae")
def test_gae_is_an_upper_triangular_matrix_times_td_errors():
    """Oracle: delta @ M^T with M[i, j] = (gamma lam)^(j - i) for j >= i, on full rows, at the
    default settings."""
    rewards, values, mask = random_batch((6, 6, 6), 6)
    following = torch.cat([values[:, 1:], torch.zeros(3, 1, dtype=torch.float64)], dim=1)
    delta = rewards + following - values
    steps = torch.arange(6)[None, :] - torch.arange(6)[:, None]
    matrix = torch.where(steps >= 0, 0.95 ** steps.double(), 0.0)
    torch.testing.assert_close(
        gae(rewards, values, mask)[0], delta @ matrix.T, rtol=1e-12, atol=1e-13
    )


@pytest.mark.equation("eq:gae")
def test_gae_by_hand():
    """Oracle: two steps on paper: deltas 0 + 0.5*4 - 2 = 0 and 6 - 4 = 2; A = (0 + 0.25*2, 2)."""
    rewards = torch.tensor([[0.0, 6.0, 0.0]])
    values = torch.tensor([[2.0, 4.0, 9.0]])
    advantages, returns = gae(rewards, values, torch.tensor([[1, 1, 0]]), gamma=0.5, lam=0.5)
    assert advantages.tolist() == [[0.5, 2.0, 0.0]]
    assert returns.tolist() == [[2.5, 6.0, 0.0]]


@pytest.mark.equation("eq:gae")
@pytest.mark.equation("eq:returns")
@pytest.mark.parametrize("gamma", [1.0, 0.8])
def test_with_lambda_one_advantage_plus_value_is_the_return_to_go(gamma):
    """Oracle: the telescoping identity, right side from the double loop over rewards alone."""
    lengths = (4, 2, 5)
    rewards, values, mask = random_batch(lengths)
    advantages, returns = gae(rewards, values, mask, gamma, lam=1.0)
    to_go = loop_returns(rewards.numpy(), lengths, gamma)
    np.testing.assert_allclose(
        ((advantages + values) * mask).numpy(), to_go, rtol=1e-12, atol=1e-13
    )
    np.testing.assert_allclose(returns.numpy(), to_go, rtol=1e-12, atol=1e-13)


@pytest.mark.equation("eq:gae")
def test_with_lambda_zero_the_advantage_is_the_td_error():
    """Oracle: r + gamma V(next) - V, with V = 0 after the last real token."""
    rewards, values, mask = random_batch((3, 2), 3)
    advantages, _ = gae(rewards, values, mask, gamma=0.9, lam=0.0)
    r, v = rewards, values
    expected = [
        [r[0, 0] + 0.9 * v[0, 1] - v[0, 0], r[0, 1] + 0.9 * v[0, 2] - v[0, 1], r[0, 2] - v[0, 2]],
        [r[1, 0] + 0.9 * v[1, 1] - v[1, 0], r[1, 1] - v[1, 1], 0.0],
    ]
    torch.testing.assert_close(
        advantages, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-14
    )


def test_gae_equals_torchrl():
    """Oracle: torchrl's generalized_advantage_estimate, which computes in single precision."""
    functional = pytest.importorskip("torchrl.objectives.value.functional")
    rewards, values, mask = random_batch((5, 3, 1))
    following = torch.cat([values[:, 1:], torch.zeros(3, 1, dtype=torch.float64)], dim=1)
    done = mask & ~torch.cat([mask[:, 1:], torch.zeros(3, 1, dtype=torch.bool)], dim=1)
    arguments = [x[..., None] for x in (values, following, rewards, done)]
    expected, _ = functional.generalized_advantage_estimate(
        0.9, 0.8, *arguments, terminated=done[..., None]
    )
    found = gae(rewards, values, mask, 0.9, 0.8)[0]
    torch.testing.assert_close(found, (expected[..., 0] * mask).double(), rtol=1e-5, atol=1e-5)


def test_a_perfect_critic_leaves_no_advantage():
    """Oracle: with V equal to the return-to-go every TD error is zero, so the advantages are
    too."""
    rewards, _, mask = random_batch((5, 3, 1))
    values = torch.from_numpy(loop_returns(rewards.numpy(), (5, 3, 1), 0.9))
    assert gae(rewards, values, mask, 0.9, 0.95)[0].abs().max() < 1e-13


@modest
@given(data=st.data(), gamma=st.floats(0, 1), lam=st.floats(0, 1))
def test_returns_and_gae_equal_the_double_loop_for_any_shape(data, gamma, lam):
    """Oracle: the same float64 NumPy double loops, over drawn shapes, lengths and values."""
    rows, width = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 5))
    lengths = data.draw(st.lists(st.integers(0, width), min_size=rows, max_size=rows).filter(any))
    numbers = hnp.arrays(np.float64, (rows, width), elements=st.floats(-1e3, 1e3))
    rewards, values = data.draw(numbers), data.draw(numbers)
    mask = prefix_mask(lengths, width)
    returns = discounted_returns(torch.from_numpy(rewards), mask, gamma)
    advantages, targets = gae(torch.from_numpy(rewards), torch.from_numpy(values), mask, gamma, lam)
    expected = loop_gae(rewards, values, lengths, gamma, lam)
    np.testing.assert_allclose(
        returns.numpy(), loop_returns(rewards, lengths, gamma), rtol=1e-9, atol=1e-9
    )
    np.testing.assert_allclose(advantages.numpy(), expected, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(
        targets.numpy(), expected + values * mask.numpy(), rtol=1e-9, atol=1e-9
    )


# Shared by both sequence functions


def test_rows_that_start_late_give_the_same_numbers():
    """Oracle: the same rows moved to the left edge."""
    rewards, values, mask = random_batch((3, 2), 4)
    moved = [torch.roll(x * mask, 1, dims=1) for x in (rewards, values, mask)]
    expected = [discounted_returns(rewards, mask, 0.9), *gae(rewards, values, mask, 0.9, 0.8)]
    found = [discounted_returns(moved[0], moved[2], 0.9), *gae(*moved, 0.9, 0.8)]
    for ours, aligned in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, torch.roll(aligned, 1, dims=1), rtol=1e-14, atol=0)


def test_whole_number_rewards_are_numbers():
    """Oracle: the same rewards as floats; truncated halves would differ."""
    rewards, values, mask = torch.tensor([[1, 2, 3]]), torch.zeros(1, 3), torch.ones(1, 3)
    assert discounted_returns(rewards, mask, 0.5).tolist() == [[2.75, 3.5, 3.0]]
    assert gae(rewards, values, mask, 0.5, 1.0)[0].tolist() == [[2.75, 3.5, 3.0]]
    assert group_relative_advantages(torch.tensor([1, 0]), 2, "none").tolist() == [0.5, -0.5]
    assert leave_one_out_advantages(torch.tensor([1, 0, 0]), 3).tolist() == [1.0, -0.5, -0.5]


@pytest.mark.parametrize("garbage", GARBAGE)
def test_garbage_after_the_end_does_not_leak(garbage):
    """Oracle: the same calls with zeros after the end; what comes out after the end is exactly
    zero."""
    rewards, values, mask = random_batch((4, 2, 1), 5)
    clean_rewards, clean_values = rewards * mask, values * mask
    dirty_rewards, dirty_values = (torch.where(mask, x, garbage) for x in (rewards, values))
    found = [
        discounted_returns(dirty_rewards, mask, 0.9),
        *gae(dirty_rewards, dirty_values, mask, 0.9, 0.8),
    ]
    expected = [
        discounted_returns(clean_rewards, mask, 0.9),
        *gae(clean_rewards, clean_values, mask, 0.9, 0.8),
    ]
    for ours, clean in zip(found, expected, strict=True):
        assert torch.equal(ours, clean)
        assert (ours[~mask] == 0).all()


def test_advantages_and_returns_carry_no_gradient():
    """Oracle: autograd's own bookkeeping: nothing that comes out asks for a gradient."""
    rewards, values, mask = random_batch()
    rewards.requires_grad_(), values.requires_grad_()
    outputs = [discounted_returns(rewards, mask), *gae(rewards, values, mask)]
    flat = rewards[:, 0][[0, 1, 2, 0]]
    outputs += [group_relative_advantages(flat, 2), leave_one_out_advantages(flat, 2)]
    assert not any(output.requires_grad for output in outputs)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_masks_of_any_type_mean_the_same(dtype):
    """Oracle: the hand-computed return 1 + 2 = 3 and advantage 3 - 1 = 2."""
    rewards, values = torch.tensor([[1.0, 2.0, 5.0]]), torch.tensor([[1.0, 1.0, 1.0]])
    mask = torch.tensor([[1, 1, 0]]).to(dtype)
    assert discounted_returns(rewards, mask).tolist() == [[3.0, 2.0, 0.0]]
    assert gae(rewards, values, mask, lam=1.0)[0].tolist() == [[2.0, 1.0, 0.0]]


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"mask": torch.ones(2, 4)}, "mask"),
        ({"mask": torch.ones(3)}, "mask"),
        ({"mask": torch.zeros(2, 3)}, "mask"),
        ({"rewards": torch.tensor([[0.0, float("nan"), 0.0]] * 2)}, "rewards"),
        ({"rewards": torch.tensor([[0.0, float("inf"), 0.0]] * 2)}, "rewards"),
        ({"gamma": -0.1}, "gamma"),
        ({"gamma": 1.1}, "gamma"),
        ({"values": torch.zeros(2, 4)}, "values"),
        ({"values": torch.zeros(3)}, "values"),
        ({"lam": -0.1}, "lam"),
        ({"lam": 1.1}, "lam"),
    ],
)
def test_bad_input_is_named(change, name):
    """Oracle: the specification: ValueError that names the argument."""
    good = {"rewards": torch.zeros(2, 3), "values": torch.zeros(2, 3), "mask": torch.ones(2, 3)}
    with pytest.raises(ValueError, match=name):
        gae(**good | change)
    if name in ("mask", "rewards", "gamma"):
        del good["values"]
        with pytest.raises(ValueError, match=name):
            discounted_returns(**good | change)


# group_relative_advantages


@pytest.mark.equation("eq:group-advantages")
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("eps", [1e-4, 0.5])
def test_group_advantages_equal_exact_statistics(scale, eps):
    """Oracle: Python's statistics.stdev (n - 1 in the denominator, exact fractions) over lists."""
    rewards = [1.0, 0.0, 0.25, 4.0, -2.0, 3.5]
    spread = {"group": None, "batch": statistics.stdev(rewards) + eps, "none": 1.0}[scale]
    expected = []
    for group in (rewards[:3], rewards[3:]):
        divisor = spread or statistics.stdev(group) + eps
        expected += [(reward - statistics.mean(group)) / divisor for reward in group]
    result = group_relative_advantages(torch.tensor(rewards, dtype=torch.float64), 3, scale, eps)
    assert result.tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.equation("eq:group-advantages")
def test_one_right_answer_among_eight():
    """Oracle: the published numbers 2.47 and -0.35 (mean 1/8, std sqrt(1/8)), at the default
    settings."""
    result = group_relative_advantages(torch.tensor([1.0] + [0.0] * 7), 8)
    root = 8**-0.5
    assert result.tolist() == pytest.approx(
        [0.875 / (root + 1e-4)] + [-0.125 / (root + 1e-4)] * 7, rel=1e-6
    )
    assert [round(x, 2) for x in result.tolist()[:2]] == [2.47, -0.35]


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("value", [0.1, 1 / 3, -2.7, 1e6 + 0.1, 0.0])
@pytest.mark.parametrize("group_size", [2, 3, 7])
def test_a_constant_group_gives_exactly_zero(scale, value, group_size):
    """Oracle: r - mean(r) is zero in exact arithmetic; in float32 the mean of 0.1 seven times is
    not 0.1."""
    constant, varied = (
        torch.full((group_size,), value),
        torch.arange(group_size, dtype=torch.float32),
    )
    result = group_relative_advantages(torch.cat([constant, varied]), group_size, scale)
    assert (result[:group_size] == 0).all()
    assert (result[group_size:] != 0).any()
    assert (
        group_relative_advantages(torch.cat([constant, constant]), group_size, scale) == 0
    ).all()


def test_groups_are_neighbours():
    """Oracle: each group of two centred by hand; interleaved groups would give other numbers."""
    result = group_relative_advantages(torch.tensor([1.0, 3.0, 10.0, 20.0]), 2, "none")
    assert result.tolist() == [-1.0, 1.0, -5.0, 5.0]


@modest
@given(
    rewards=hnp.arrays(np.float64, (3, 4), elements=st.floats(-1e4, 1e4)),
    shift=st.floats(-1e3, 1e3),
    scale=st.sampled_from(["group", "batch", "none"]),
)
def test_group_advantages_sum_to_zero_and_ignore_a_shift(rewards, shift, scale):
    """Oracle: two properties of centring: zero sum in each group, no change when every reward moves
    by a constant."""
    flat = torch.from_numpy(rewards).flatten()
    result = group_relative_advantages(flat, 4, scale, eps=1.0)
    torch.testing.assert_close(
        result.reshape(3, 4).sum(-1), torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-7
    )
    torch.testing.assert_close(
        group_relative_advantages(flat + shift, 4, scale, eps=1.0), result, rtol=1e-6, atol=1e-7
    )


def test_unknown_scale_lists_the_known_ones():
    """Oracle: the specification: ValueError that names the argument and the choices."""
    with pytest.raises(ValueError, match="scale") as caught:
        group_relative_advantages(torch.zeros(4), 2, "std")
    assert all(scale in str(caught.value) for scale in ("group", "batch", "none"))


# leave_one_out_advantages


@pytest.mark.equation("eq:leave-one-out")
def test_leave_one_out_subtracts_the_mean_of_the_others():
    """Oracle: exact fractions: each reward less the mean of the other rewards of its group."""
    groups = [[1, 5, 9, 0], [2, 2, 7, 4]]
    expected = []
    for group in groups:
        for i, reward in enumerate(group):
            others = group[:i] + group[i + 1 :]
            expected.append(float(reward - Fraction(sum(others), len(others))))
    result = leave_one_out_advantages(torch.tensor(groups, dtype=torch.float64).flatten(), 4)
    assert result.tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.equation("eq:leave-one-out")
@modest
@given(rewards=hnp.arrays(np.float64, (2, 5), elements=st.floats(-1e4, 1e4)))
def test_leave_one_out_is_the_centred_reward_times_g_over_g_minus_one(rewards):
    """Oracle: the identity r_i - mean of the others = G / (G - 1) (r_i - mean)."""
    expected = 5 / 4 * (rewards - rewards.mean(-1, keepdims=True))
    result = leave_one_out_advantages(torch.from_numpy(rewards).flatten(), 5)
    np.testing.assert_allclose(result.numpy(), expected.flatten(), rtol=1e-9, atol=1e-8)


CONSTANTS = [0.1, 0.3, 1 / 3, 0.7, 0.9, -2.7, 1e6 + 0.1, 1e-30, 0.0, 0.5, 1.0]


@pytest.mark.equation("eq:leave-one-out")
@pytest.mark.parametrize("value", CONSTANTS)
@pytest.mark.parametrize("group_size", [2, 3, 7, 8, 16, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_leaving_one_out_of_equal_rewards_gives_exactly_zero(value, group_size, dtype):
    """Oracle: r - mean of the others is zero in exact arithmetic; in floats eight rewards of 0.7
    leave 6e-8, of which Adam makes full steps."""
    constant = torch.full((group_size,), value, dtype=dtype)
    varied = torch.arange(group_size).to(dtype)
    result = leave_one_out_advantages(torch.cat([constant, varied]), group_size)
    assert (result[:group_size] == 0).all()
    assert (result[group_size:] != 0).any()


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_without_eps_a_constant_group_still_gives_exactly_zero(scale):
    """Oracle: the limit of (r - mean) / (std + eps), which is 0 for every eps above 0."""
    result = group_relative_advantages(torch.full((6,), 0.7), 3, scale, eps=0.0)
    assert (result == 0).all()


# Shared by both group functions


@pytest.mark.parametrize("function", [group_relative_advantages, leave_one_out_advantages])
@pytest.mark.parametrize(
    ("rewards", "group_size", "name"),
    [
        (torch.zeros(7), 2, "group_size"),
        (torch.zeros(4), 0, "group_size"),
        (torch.zeros(4), -2, "group_size"),
        (torch.zeros(2), 4, "group_size"),
        (torch.tensor([0.0, float("nan")]), 2, "rewards"),
        (torch.tensor([0.0, -float("inf")]), 2, "rewards"),
        (torch.zeros(2, 2), 2, "rewards"),
    ],
)
def test_bad_groups_are_named(function, rewards, group_size, name):
    """Oracle: the specification: ValueError that names the argument."""
    with pytest.raises(ValueError, match=name):
        function(rewards, group_size)


@pytest.mark.parametrize("function", [group_relative_advantages, leave_one_out_advantages])
def test_a_group_of_one_is_refused(function):
    """Oracle: one reward has neither others to average nor an unbiased standard deviation."""
    with pytest.raises(ValueError, match="group_size"):
        function(torch.zeros(4), 1)


def test_inputs_are_left_as_they_were():
    """Oracle: copies made before the calls."""
    rewards, values, mask = random_batch()
    before = [rewards.clone(), values.clone(), mask.clone()]
    discounted_returns(rewards, mask)
    gae(rewards, values, mask)
    flat = rewards[:2].flatten()
    for scale in ("group", "batch", "none"):
        group_relative_advantages(flat, 5, scale)
    leave_one_out_advantages(flat, 5)
    assert all(torch.equal(a, b) for a, b in zip(before, [rewards, values, mask], strict=True))
    assert torch.equal(flat, rewards[:2].flatten())
