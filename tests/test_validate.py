"""Argument checks: masks, numbers and tensors that are none, over every public function of the
mathematics. What is refused is named."""

import inspect
import math
import re

import numpy as np
import pytest
import torch
from architectures import build

from rlhf_helpers import _validate, advantages, kl, logprobs, losses, trust_region
from rlhf_helpers.algorithms import ppo
from rlhf_helpers.worlds.arithmetic import pass_at_k

REFUSED = (ValueError, TypeError)


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


MASK = torch.tensor([[1, 1, 0], [1, 1, 1]])
TOKENS = torch.tensor([[3, 5, 7, 9], [2, 4, 6, 8]])
A, B, C = numbers(3, 2, 3)
PAIRS = dict(
    zip(
        (
            "chosen_log_probs",
            "rejected_log_probs",
            "ref_chosen_log_probs",
            "ref_rejected_log_probs",
        ),
        -numbers(4, 5).abs(),
        strict=True,
    )
)
MODEL = build("gpt2").eval()
UPDATE = kl.AdaptiveKLController().update
WEIGHT = numbers(3).requires_grad_()
# Every public function of the mathematics, with arguments that it takes.
GOOD = {
    logprobs.token_log_probs: {"logits": numbers(2, 3, 5), "tokens": TOKENS[:, 1:] % 5},
    logprobs.entropy: {"logits": A},
    logprobs.masked_mean: {"values": A, "mask": MASK},
    logprobs.masked_whiten: {"values": A, "mask": MASK},
    logprobs.completion_log_probs: {
        "model": MODEL,
        "tokens": TOKENS,
        "attention_mask": torch.tensor([[0, 1, 1, 1], [1, 1, 1, 0]]),
        "completion_length": 2,
    },
    kl.kl_estimate: {"log_probs": A, "ref_log_probs": B},
    kl.exact_kl: {"logits": A, "ref_logits": B},
    kl.AdaptiveKLController: {},
    UPDATE: {"kl": 1.0, "num_steps": 5},
    advantages.discounted_returns: {"rewards": A, "mask": MASK},
    advantages.gae: {"rewards": A, "values": B, "mask": MASK},
    advantages.group_relative_advantages: {"rewards": A.flatten(), "group_size": 3},
    advantages.leave_one_out_advantages: {"rewards": A.flatten(), "group_size": 3},
    losses.policy_gradient_loss: {"log_probs": A, "advantages": B, "mask": MASK},
    losses.ppo_clip_loss: {
        "log_probs": A,
        "old_log_probs": B,
        "advantages": C,
        "mask": MASK,
        "clip_high": 0.3,
        "dual_clip": 3.0,
    },
    losses.grpo_loss: {
        "log_probs": A,
        "old_log_probs": B,
        "advantages": C[:, 0],
        "mask": MASK,
        "clip_high": 0.3,
        "ref_log_probs": C,
        "beta": 0.1,
        "loss_type": "dr_grpo",
        "max_completion_length": 7,
    },
    losses.value_loss: {"values": A, "old_values": B, "returns": C, "mask": MASK, "clip": 0.5},
    losses.bradley_terry_loss: {
        "chosen_scores": A,
        "rejected_scores": B,
        "margin": 0.5,
        "preference": 0.7,
        "weight": C.abs(),
    },
    losses.plackett_luce_loss: {"scores": A},
    losses.rao_kupper_loss: {
        "scores_a": A,
        "scores_b": B,
        "outcome": torch.tensor([[0, 0.5, 1], [1, 0, 0.5]]),
        "threshold": 0.3,
    },
    losses.dpo_loss: PAIRS,
    losses.simpo_loss: {
        "chosen_log_probs": PAIRS["chosen_log_probs"],
        "rejected_log_probs": PAIRS["rejected_log_probs"],
        "chosen_lengths": torch.arange(1, 6),
        "rejected_lengths": torch.arange(2, 7),
    },
    losses.kto_loss: {
        "log_probs": PAIRS["chosen_log_probs"],
        "ref_log_probs": PAIRS["ref_chosen_log_probs"],
        "desirable": torch.arange(5) % 2,
        "kl": 0.3,
        "beta": 0.1,
    },
    trust_region.conjugate_gradient: {"matvec": lambda v: 2 * v, "b": A[0]},
    trust_region.hessian_vector_product: {
        "scalar_fn": lambda: (WEIGHT**3).sum(),
        "parameters": [WEIGHT],
        "vector": A[0],
    },
    pass_at_k: {"right": MASK, "k": 2},
}
MASKED = [
    (logprobs.masked_mean, "mask"),
    (logprobs.masked_whiten, "mask"),
    (logprobs.completion_log_probs, "attention_mask"),
    (advantages.discounted_returns, "mask"),
    (advantages.gae, "mask"),
    (losses.policy_gradient_loss, "mask"),
    (losses.ppo_clip_loss, "mask"),
    (losses.grpo_loss, "mask"),
    (losses.value_loss, "mask"),
    (ppo.completion_logits, "attention_mask"),
    (pass_at_k, "right"),
]
GOOD[ppo.completion_logits] = GOOD[logprobs.completion_log_probs]
NAMED = [(f, name) for f, values in GOOD.items() for name in inspect.signature(f).parameters]


def default(function, name):
    """What the function gets for that argument if nobody says otherwise."""
    return GOOD[function].get(name, inspect.signature(function).parameters[name].default)


def of_kind(kind):
    return [
        pytest.param(f, name, id=f"{f.__qualname__}-{name}")
        for f, name in NAMED
        if isinstance(default(f, name), kind) and not isinstance(default(f, name), bool)
    ]


def refused(function, name, value):
    with pytest.raises(REFUSED, match=re.escape(name)):
        function(**GOOD[function] | {name: value})


def test_every_public_function_of_the_mathematics_is_looked_at():
    """Oracle: the names that the five modules define."""
    for module in (logprobs, kl, advantages, losses, trust_region):
        for name, function in inspect.getmembers(module, inspect.isfunction):
            if function.__module__ == module.__name__ and not name.startswith("_"):
                assert function in GOOD, name


@pytest.mark.parametrize("function", GOOD, ids=lambda f: f.__qualname__)
def test_the_arguments_of_the_tables_are_taken(function):
    """Oracle: no exception, so that a refusal in the other tests is due to the one change."""
    function(**GOOD[function])


# masks


def odd_masks(mask):
    first = torch.zeros_like(mask, dtype=torch.bool)
    first[0, -1] = True
    return {
        "twos": 2 * mask,
        "minus one": mask.masked_fill(first, -1),
        "half": mask.float().masked_fill(first, 0.5),
        "NaN": mask.float().masked_fill(first, math.nan),
        "additive": torch.where(mask == 1, 0.0, -math.inf),
        "additive, large": torch.where(mask == 1, 0.0, torch.finfo(torch.float32).min),
        "a list": mask.tolist(),
    }


@pytest.mark.parametrize("odd", odd_masks(MASK))
@pytest.mark.parametrize(("function", "name"), MASKED, ids=lambda f: getattr(f, "__name__", f))
def test_a_mask_of_anything_but_zero_and_one_is_refused(function, name, odd):
    """Oracle: the specification: a mask says which entries count, and is named if it does not."""
    refused(function, name, odd_masks(GOOD[function][name])[odd])


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float16])
@pytest.mark.parametrize(("function", "name"), MASKED, ids=lambda f: getattr(f, "__name__", f))
def test_a_mask_of_zeros_and_ones_is_taken_in_any_type(function, name, dtype):
    """Oracle: the same call with whole numbers."""
    mask = GOOD[function][name].to(dtype)
    found, expected = function(**GOOD[function] | {name: mask}), function(**GOOD[function])
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


# numbers

ODD_NUMBERS = {
    "a text": "1",
    "None": None,
    "True": True,
    "NumPy's True": np.bool_(True),
    "NaN": math.nan,
    "infinity": math.inf,
    "complex": 1j,
    "a list": [1],
    "three numbers": torch.ones(3),
}
MAY_BE_NONE = {"clip", "clip_high", "dual_clip", "dim", "chunk_size", "max_completion_length"}
MAY_BE_INFINITE = {"clip", "clip_high"}  # there it turns clipping off
MAY_BE_TENSORS = {"margin", "preference", "label_smoothing"}


@pytest.mark.parametrize("odd", ODD_NUMBERS)
@pytest.mark.parametrize(("function", "name"), of_kind((int, float)))
def test_a_number_that_is_none_is_refused(function, name, odd):
    """Oracle: the specification: ValueError or TypeError that names the argument."""
    maybe = {"None": MAY_BE_NONE | MAY_BE_TENSORS, "infinity": MAY_BE_INFINITE}.get(odd, set())
    value_clip = function is losses.value_loss and odd == "infinity"
    if name not in maybe or value_clip:
        refused(function, name, ODD_NUMBERS[odd])


@pytest.mark.parametrize(("function", "name"), of_kind(int))
def test_a_fraction_for_a_whole_number_is_refused(function, name):
    """Oracle: the specification: nothing is rounded."""
    if name != "horizon":  # any positive number of samples
        refused(function, name, default(function, name) + 0.5)


@pytest.mark.parametrize("scalar", [np.float64, np.float32, torch.tensor])
@pytest.mark.parametrize(("function", "name"), of_kind(float))
def test_scalars_of_numpy_and_torch_are_numbers(function, name, scalar):
    """Oracle: the same call with Python's number, to the precision of float32."""
    value = default(function, name)
    found = function(**GOOD[function] | {name: scalar(value)})
    expected = function(**GOOD[function] | {name: value})
    if function not in (kl.AdaptiveKLController, UPDATE):  # which is no function of its input
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("scalar", [np.int64, np.int32, torch.tensor])
@pytest.mark.parametrize(("function", "name"), of_kind(int))
def test_whole_scalars_of_numpy_and_torch_are_whole_numbers(function, name, scalar):
    """Oracle: no exception."""
    function(**GOOD[function] | {name: scalar(default(function, name))})


ONE_LOW, ONE_HIGH = torch.full((2, 3), 0.5), torch.full((2, 3), 0.5)
ONE_LOW[0, 1], ONE_HIGH[1, 2] = -0.01, 1.01
HALF, ONE = torch.full((5,), 0.5), torch.tensor([0.0, 0.0, 0.0, 0.0, 0.51])
# Values just outside what each docstring promises.
OUTSIDE = [
    (logprobs.token_log_probs, "temperature", [0.0, -1.0, 1e-30, 1e-300]),
    (logprobs.completion_log_probs, "temperature", [0.0, 1e-30]),
    (logprobs.completion_log_probs, "chunk_size", [0, -1]),
    (logprobs.completion_log_probs, "completion_length", [0, 4]),
    (logprobs.completion_log_probs, "samples_per_prompt", [0, 3]),
    (logprobs.masked_whiten, "eps", [-1e-9]),
    (logprobs.masked_mean, "dim", [2, -3]),
    (kl.AdaptiveKLController, "coefficient", [0.0, -1.0]),
    (kl.AdaptiveKLController, "target", [0.0, -1.0]),
    (kl.AdaptiveKLController, "horizon", [0, -1]),
    (UPDATE, "num_steps", [0, -1, 50_000, 10**9]),
    (advantages.discounted_returns, "gamma", [-0.01, 1.01]),
    (advantages.gae, "gamma", [-0.01, 1.01]),
    (advantages.gae, "lam", [-0.01, 1.01]),
    (advantages.group_relative_advantages, "eps", [-1e-9, -1.0]),
    (advantages.group_relative_advantages, "group_size", [1, 0, -3, 4]),
    (advantages.leave_one_out_advantages, "group_size", [1, 0, -3, 4]),
    (losses.ppo_clip_loss, "clip", [0.0, -0.1]),
    (losses.ppo_clip_loss, "clip_high", [0.0, -0.1]),
    (losses.ppo_clip_loss, "dual_clip", [1.0, 0.5]),
    (losses.grpo_loss, "beta", [-0.1]),
    (losses.grpo_loss, "max_completion_length", [0]),
    (losses.value_loss, "clip", [0.0, -0.1]),
    (losses.bradley_terry_loss, "preference", [-0.01, 1.01, ONE_LOW, ONE_HIGH]),
    (losses.bradley_terry_loss, "weight", [torch.tensor([[1.0, 1, 1], [1, 1, -0.01]]), 0 * A]),
    (losses.rao_kupper_loss, "threshold", [-0.01]),
    (losses.dpo_loss, "beta", [0.0, -0.1]),
    (losses.dpo_loss, "label_smoothing", [-0.01, 1.01, HALF - ONE, HALF + ONE]),
    (losses.simpo_loss, "beta", [0.0, -0.1]),
    (losses.kto_loss, "beta", [0.0, -0.1]),
    (losses.kto_loss, "kl", [-0.1]),
    (losses.simpo_loss, "chosen_lengths", [torch.tensor([1, 1, 0, 1, 1])]),
    (losses.simpo_loss, "rejected_lengths", [torch.tensor([1, 1, 1, 1, -1])]),
    (trust_region.conjugate_gradient, "iterations", [0]),
    (trust_region.conjugate_gradient, "tolerance", [-1e-12]),
    (trust_region.hessian_vector_product, "damping", [-1e-9]),
    (pass_at_k, "k", [0, 4]),
]


@pytest.mark.parametrize(
    ("function", "name", "value"), [(f, name, v) for f, name, values in OUTSIDE for v in values]
)
def test_a_value_outside_its_range_is_refused(function, name, value):
    """Oracle: the ranges that the docstrings promise."""
    refused(function, name, value)


# tensors


@pytest.mark.parametrize(("function", "name"), of_kind(torch.Tensor))
@pytest.mark.parametrize("kind", [list, np.array, lambda x: x.to(torch.complex64)])
def test_what_is_no_tensor_of_real_numbers_is_refused(function, name, kind):
    """Oracle: the specification: TypeError or ValueError that names the argument."""
    if kind is np.array:
        value = default(function, name).numpy()
    else:
        value = default(function, name).tolist() if kind is list else kind(default(function, name))
    refused(function, name, value)


@pytest.mark.parametrize(("function", "name"), of_kind(torch.Tensor))
def test_nothing_for_a_tensor_is_refused(function, name):
    """Oracle: the specification: TypeError or ValueError that names the argument, unless it may be
    None; without a mask all counts."""
    if name != "mask" and inspect.signature(function).parameters[name].default is not None:
        refused(function, name, None)


SHAPES = [
    (advantages.gae, {"rewards": A[0], "values": A[0], "mask": MASK[0]}, "rewards"),
    (advantages.discounted_returns, {"rewards": A[0], "mask": MASK[0]}, "rewards"),
    (
        losses.grpo_loss,
        dict.fromkeys(("log_probs", "old_log_probs", "ref_log_probs", "advantages"), A[0])
        | {"mask": MASK[0]},
        "log_probs",
    ),
    (losses.dpo_loss, dict.fromkeys(PAIRS, A), "chosen_log_probs"),
    (losses.dpo_loss, dict.fromkeys(PAIRS, A[0, 0]), "chosen_log_probs"),
    (losses.kto_loss, {"log_probs": A, "ref_log_probs": A, "desirable": MASK}, "log_probs"),
    (
        losses.simpo_loss,
        {"chosen_log_probs": A, "rejected_log_probs": A}
        | dict.fromkeys(("chosen_lengths", "rejected_lengths"), MASK + 1),
        "chosen_log_probs",
    ),
    (pass_at_k, {"right": MASK[0]}, "right"),
    (pass_at_k, {"right": MASK[:0]}, "right"),
    (pass_at_k, {"right": MASK[:, :0]}, "right"),
    (kl.exact_kl, {"logits": A[:, :0], "ref_logits": B[:, :0]}, "logits"),
    (kl.exact_kl, {"logits": A[0, 0], "ref_logits": B[0, 0]}, "logits"),
    (logprobs.entropy, {"logits": A[0, 0]}, "logits"),
    (logprobs.entropy, {"logits": A[:, :0]}, "logits"),
    (logprobs.token_log_probs, {"tokens": TOKENS[:, 1:] + 5}, "tokens"),
    (logprobs.token_log_probs, {"tokens": TOKENS[:, 1:] % 5 - 1}, "tokens"),
    (logprobs.token_log_probs, {"tokens": TOKENS[:, 1:].float() % 5}, "tokens"),
    (logprobs.token_log_probs, {"tokens": TOKENS[:, 1:] > 5}, "tokens"),
    (
        logprobs.completion_log_probs,
        {"attention_mask": torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]])},
        "attention_mask",
    ),
    (
        logprobs.completion_log_probs,
        {"attention_mask": torch.tensor([[1, 0, 1, 1], [1, 1, 1, 0]])},
        "attention_mask",
    ),
    (logprobs.completion_log_probs, {"tokens": TOKENS + 1000}, "tokens"),
    (logprobs.completion_log_probs, {"tokens": TOKENS[0]}, "tokens"),
    (trust_region.conjugate_gradient, {"b": A}, "b must"),
    (trust_region.conjugate_gradient, {"b": A[0, :0]}, "b must"),
    (trust_region.conjugate_gradient, {"b": math.inf * A[0]}, "b must"),
    (trust_region.conjugate_gradient, {"b": A[0].half()}, "b has dtype"),
    (trust_region.conjugate_gradient, {"b": MASK[0]}, "b has dtype"),
    (trust_region.conjugate_gradient, {"matvec": lambda v: v[:2]}, "matvec returned shape"),
    (trust_region.conjugate_gradient, {"matvec": lambda v: 0 * v}, "matvec is not positive"),
    (trust_region.conjugate_gradient, {"matvec": lambda v: -v}, "matvec is not positive"),
    (trust_region.conjugate_gradient, {"matvec": lambda v: math.nan * v}, "matvec is not positive"),
    (trust_region.conjugate_gradient, {"matvec": lambda v: math.inf * v}, "matvec is not positive"),
    (trust_region.hessian_vector_product, {"vector": A[0].bfloat16()}, "vector has dtype"),
    (trust_region.hessian_vector_product, {"vector": A[0, :2]}, "vector has shape"),
    (trust_region.hessian_vector_product, {"parameters": [A[0]]}, "parameters must hold"),
    (trust_region.hessian_vector_product, {"parameters": []}, "parameters must hold"),
    (trust_region.hessian_vector_product, {"scalar_fn": lambda: WEIGHT**3}, "scalar_fn returned"),
    (trust_region.hessian_vector_product, {"scalar_fn": lambda: A.sum()}, "scalar_fn returned a"),
    (advantages.gae, {"values": A.masked_fill(A[1, 1] == A, math.nan)}, "values"),
    (losses.policy_gradient_loss, {"advantages": math.inf * A}, "advantages"),
    (losses.grpo_loss, {"advantages": A[0]}, "advantages"),
    (losses.value_loss, {"returns": math.inf * A}, "returns"),
]


@pytest.mark.parametrize(("function", "change", "name"), SHAPES)
def test_other_shapes_and_contents_are_refused(function, change, name):
    """Oracle: the specification: ValueError that names the argument."""
    with pytest.raises(ValueError, match=name):
        function(**GOOD[function] | change)


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0,), (4, 0, 3)])
def test_no_tokens_have_no_log_probabilities(shape):
    """Oracle: the shape and the type of the specification."""
    logits = torch.zeros(*shape, 5, dtype=torch.bfloat16, requires_grad=True)
    found = logprobs.token_log_probs(logits, torch.zeros(shape, dtype=torch.int64))
    assert (found.shape, found.dtype) == (shape, torch.float32)
    found.sum().backward()


@pytest.mark.parametrize("odd", ["no", 1, 0.0, None, torch.ones(2), [True]])
@pytest.mark.parametrize(
    ("function", "name"),
    [(logprobs.masked_whiten, "shift_mean"), (losses.grpo_loss, "bias_correct_kl")],
)
def test_what_is_neither_true_nor_false_is_refused(function, name, odd):
    """Oracle: the specification: a text like "no" would count as yes."""
    refused(function, name, odd)
    function(**GOOD[function] | {name: np.bool_(False)})


@pytest.mark.parametrize("odd", [None, 1, ["grpo"], torch.ones(2), np.array(["grpo", "dapo"])])
def test_what_is_no_name_is_refused(odd):
    """Oracle: the specification: the message names the argument and the choices."""
    with pytest.raises(ValueError, match=r"loss_type=.*'dr_grpo'"):
        _validate.one_of(odd, losses.GRPO_TYPES, "loss_type")
