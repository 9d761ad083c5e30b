"""What one training step costs, counted: bytes of memory and floating-point operations.

The model has the shape of GPT-2: blocks of attention and a two-layer perceptron, learned positions,
an output embedding that is the input embedding. Counted is what this package's loops do, in
float32, without dropout: samples of one prompt share its pass, logits are made of completions
alone, and so many at a time. A product of matrices counts two operations a weight and token;
everything else, and the optimiser's own arithmetic, is left out.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from rlhf_helpers._validate import has, in_range, one_of, true_or_false

METHODS = ("sft", "reward", "dpo", "ppo", "grpo")
FLOAT = 4  # bytes
SAMPLING = ("ppo", "grpo")
SHARING = ("dpo", "ppo", "grpo")  # whose prompts run once for all their completions


class Batch(NamedTuple):
    """What a step learns from: B prompts of P tokens, G completions each of C tokens, all of full
    length. G is 1 for sft, and 2 for reward and dpo. `at_once` completion tokens have logits at a
    time."""

    prompts: int
    group: int
    prompt_tokens: int
    new_tokens: int
    epochs: int = 1
    at_once: int = 1024


class Memory(NamedTuple):
    """Bytes of an update; they sum to the whole. Not all of it is used at once, since the last
    gradients are made when most activations are gone; what lives within one operation comes on
    top."""

    policy: int
    reference: int
    value_model: int
    reward_model: int
    gradients: int
    moments: int  # Adam's two
    activations: int  # kept by the forward pass for the backward pass
    logits: int  # and their gradient


class Flops(NamedTuple):
    """Floating-point operations of a step; they sum to the whole."""

    rollout: int
    scoring: int  # by a reward model
    reference: int
    values: int  # at the rollout
    forward: int
    backward: int


# --- parameters ----------------------------------------------------------------------------------


def parameters(config: Any) -> int:
    """Numbers in a model: embeddings, blocks and the last layer norm.

    Args:
        config: a GPT-2 configuration.
    Raises: TypeError or ValueError if the config is not GPT-2's.
    """
    _check_config(config)
    width, inner = config.n_embd, _inner(config)
    biases_and_norms = 3 * width + width + inner + width + 4 * width
    block = _matrices(config) + biases_and_norms
    embeddings = (config.vocab_size + config.n_positions) * width
    return embeddings + config.n_layer * block + 2 * width


def adapter_parameters(config: Any, rank: int) -> int:
    """Numbers in a LoRA adapter on the attention's query, key and value, as `models.lora_policy`
    makes it: A [r, d] and B [3d, r] in each block.

    Raises: TypeError or ValueError if the config is not GPT-2's, or rank < 0.
    """
    _check_config(config)
    in_range(rank, "rank", 0)
    return config.n_layer * 4 * rank * config.n_embd


def _inner(config: Any) -> int:
    return config.n_inner or 4 * config.n_embd


def _matrices(config: Any) -> int:
    """Weights of a block that multiply every token: query, key and value; output; perceptron."""
    return 4 * config.n_embd**2 + 2 * config.n_embd * _inner(config)


# --- memory --------------------------------------------------------------------------------------


def memory(
    config: Any, method: str, batch: Batch, rank: int = 0, kl: bool = True, judge: bool = False
) -> Memory:
    """Bytes of the models that are held, and what an update adds, for one step.

    In micro-batches only `activations` and `logits` shrink: count those of a batch with as many
    prompts as a micro-batch has.

    Args:
        config: a GPT-2 configuration, e.g. `model.config`; all models have its shape.
        method: one of `METHODS`. DPO's reference is not held, since its log-probabilities are
            computed before the first step.
        batch: sizes of a step.
        rank: of a LoRA adapter; 0 trains all weights. With one, the frozen weights are the
            reference, so no second copy is held.
        kl: whether GRPO's loss has a KL term; without one it needs no reference. PPO always has.
        judge: whether a reward model is held too (PPO and GRPO).
    Returns: Memory.
    Raises: ValueError on an unknown method, a size below 1, a dpo group that is not 2, a reward
        model with an adapter, or a config that is not GPT-2's.
    Source: Kingma and Ba 2015, "Adam", algorithm 1 (two moments a parameter); the rest is counted.
    """
    _check(config, method, batch, rank, kl, judge)
    weights, adapter = parameters(config), adapter_parameters(config, rank)
    head = config.n_embd + 1  # of the value model: a row and a bias
    trained = (adapter or weights) + (config.n_embd if method == "reward" else 0)
    policy = weights + adapter + (config.n_embd if method == "reward" else 0)
    value_model = 0
    if method == "ppo":
        value_model = weights + adapter + head
        trained += (adapter or weights) + head
    reference = 0 if rank or not _has_reference(method, kl) else weights
    reward_model = weights + config.n_embd if judge and method in SAMPLING else 0
    held = (policy, reference, value_model, reward_model, trained, 2 * trained)
    floats = (*held, _activations(config, method, batch, rank), _logits(config, method, batch))
    return Memory(*(FLOAT * count for count in floats))


def rollout_memory(config: Any, batch: Batch) -> int:
    """Bytes of the cache of keys and values when the last token is sampled, next to the models;
    less than an update keeps for the same completions."""
    _check(config, "grpo", batch, 0)
    kept = batch.prompt_tokens + batch.new_tokens - 1
    return FLOAT * 2 * config.n_layer * config.n_embd * batch.prompts * batch.group * kept


def _has_reference(method: str, kl: bool) -> bool:
    return method == "ppo" or (method == "grpo" and kl)


def _logits(config: Any, method: str, batch: Batch) -> int:
    if method == "reward":
        return 0
    tokens = batch.prompts * batch.group * batch.new_tokens
    return 2 * min(tokens, batch.at_once) * config.vocab_size


def _activations(config: Any, method: str, batch: Batch, rank: int) -> int:
    """Numbers that autograd keeps, of a model whose attention is fused."""
    width, inner, one = config.n_embd, _inner(config), _update_pass(config, method, batch)
    # first norm 2 widths, query, key and value 3, attention 1, second norm 2; perceptron 2 inner
    a_token = 8 * width + 2 * inner
    if config.activation_function == "gelu_new":
        a_token += 3 * inner  # several operations, each of which keeps something
    if rank:
        # a frozen matrix needs no input: its gradient is not made
        a_token += rank - width - inner
    a_token += 4 + config.n_head  # means and deviations of the norms, normalisers of attention
    block = a_token * one.tokens
    sequences, later = batch.prompts * batch.group, batch.new_tokens - 1
    if _shared(method, batch):
        # keys and values are copied into a cache, and then for each completion; and a mask
        keys = batch.prompt_tokens + later if later else 0
        block += 2 * width * (batch.prompts * batch.prompt_tokens + sequences * keys)
        block += sequences * later * keys
    # of the last norm and the head; frozen, they and the first norm keep nothing of their own
    last = 0 if rank else width * (one.tokens + one.rows)
    return (2 if method == "ppo" else 1) * (config.n_layer * block + last)


# --- operations ----------------------------------------------------------------------------------


class _Pass(NamedTuple):
    """Tokens that go through the blocks, pairs of a token and a key in attention, rows that the
    head is applied to, and its width."""

    tokens: int
    pairs: int
    rows: int
    head: int


def flops(
    config: Any, method: str, batch: Batch, rank: int = 0, kl: bool = True, judge: bool = False
) -> Flops:
    """Operations of one step: sampling, the passes without a gradient, and the updates.

    The backward pass is twice the forward: a matrix has a gradient for its input and one for its
    weights, and frozen weights have none. Attention counts every key, those in the future too,
    which are multiplied and then masked. What diagnostics cost is left out.

    Args: as `memory`.
    Returns: Flops.
    Raises: ValueError as `memory`.
    Source: Kaplan et al. 2020, "Scaling Laws for Neural Language Models", section 2.1 (two
        operations a weight and token forward, four backward).
    """
    _check(config, method, batch, rank, kl, judge)
    one, samples = _update_pass(config, method, batch), method in SAMPLING
    rollout = _forward(config, _rollout_pass(config, batch), rank) if samples else 0
    scoring = _forward(config, _whole_texts(batch), 0) if samples and judge else 0
    needed = method == "dpo" or _has_reference(method, kl)
    reference = _forward(config, one, 0) if needed else 0
    forward, backward, values = _forward(config, one, rank), _backward(config, one, rank), 0
    # the logits of all but the last tokens are made again when their gradient is needed
    again = (one.rows - 1) // batch.at_once * batch.at_once
    if method != "reward":
        backward += 2 * config.n_embd * one.head * again
    if method == "ppo":
        value = one._replace(head=1)
        values = _forward(config, value, rank)
        forward, backward = forward + values, backward + _backward(config, value, rank)
    return Flops(
        rollout, scoring, reference, values, batch.epochs * forward, batch.epochs * backward
    )


def _forward(config: Any, one: _Pass, rank: int) -> int:
    width = config.n_embd
    weights = _matrices(config) + 4 * rank * width
    block = 2 * weights * one.tokens + 4 * width * one.pairs
    return config.n_layer * block + 2 * width * one.head * one.rows


def _backward(config: Any, one: _Pass, rank: int) -> int:
    width, whole = config.n_embd, 2 * _forward(config, one, rank)
    if not rank:
        return whole
    frozen_blocks = 2 * config.n_layer * _matrices(config) * one.tokens
    # nothing that is trained lies below the first block's projection
    lowest = 2 * (3 * width + rank) * width * one.tokens
    frozen_head = 2 * width * one.head * one.rows if one.head > 1 else 0
    return whole - frozen_blocks - lowest - frozen_head


def _update_pass(config: Any, method: str, batch: Batch) -> _Pass:
    """The pass that a gradient is taken of."""
    if method == "reward":
        return _whole_texts(batch)
    prompts, group, width, new = batch[:4]
    sequences, later = prompts * group, new - 1  # the last token predicts nothing
    rows, vocabulary = sequences * new, config.vocab_size
    if not _shared(method, batch):
        length = width + later
        return _Pass(sequences * length, sequences * length**2, rows, vocabulary)
    pairs = prompts * width**2 + sequences * later * (width + later)
    return _Pass(prompts * width + sequences * later, pairs, rows, vocabulary)


def _rollout_pass(config: Any, batch: Batch) -> _Pass:
    """All steps of sampling together: the prompts, then a token at a time with the cache."""
    prompts, group, width, new = batch[:4]
    sequences, later = prompts * group, new - 1
    pairs = prompts * width**2 + sequences * (later * width + later * (later + 1) // 2)
    rows = prompts + sequences * later
    return _Pass(prompts * width + sequences * later, pairs, rows, config.vocab_size)


def _whole_texts(batch: Batch) -> _Pass:
    """What a reward model reads: prompt and completion, the last token too."""
    sequences, length = batch.prompts * batch.group, batch.prompt_tokens + batch.new_tokens
    return _Pass(sequences * length, sequences * length**2, sequences, 1)


def _shared(method: str, batch: Batch) -> bool:
    return method in SHARING and batch.group > 1


def _check(
    config: Any, method: str, batch: Batch, rank: int, kl: bool = True, judge: bool = False
) -> None:
    one_of(method, METHODS, "method")
    true_or_false(kl, "kl")
    true_or_false(judge, "judge")
    has(batch, "batch", "a costs.Batch", "_asdict", *Batch._fields)
    for name, value in batch._asdict().items():
        in_range(value, f"batch.{name}", 1)
    in_range(rank, "rank", 0)
    if method == "dpo" and batch.group != 2:
        raise ValueError(
            f"batch.group={batch.group} must be 2 for dpo, the chosen and the rejected"
        )
    if rank and method == "reward":
        raise ValueError("rank must be 0 for a reward model, which is trained whole here")
    _check_config(config)


def _check_config(config: Any) -> None:
    if getattr(config, "model_type", None) != "gpt2" or not config.tie_word_embeddings:
        raise ValueError(
            f"config ({type(config).__name__}) must be that of a GPT-2 with tied embeddings, e.g."
            " model.config"
        )
