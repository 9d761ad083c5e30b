"""Log-probabilities, entropy, and the masked statistics that every loss is built from.

Log-probabilities are in nats. In a mask, 1 or True means that the entry counts; numbers
other than 0 and 1 are refused.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rlhf_helpers._forward import check_groups, checked_mask, completion_states, trunk_and_head
from rlhf_helpers._validate import (
    all_equal,
    as_float,
    as_mask,
    check_temperature,
    in_range,
    tensors,
    true_or_false,
)

# Logits that are upcast, divided by the temperature and exponentiated at a time: 4 MiB in float32.
_CHUNK_LOGITS = 2**20
# Completion tokens that the output embedding is applied to at a time.
_CHUNK_TOKENS = 1024


def token_log_probs(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probability of each given token under softmax(logits / temperature).

    Equation: eq:token-log-probs

    The logit of the token minus the log-sum-exp of its row, a few positions at a time: no second
    [N, T, V] tensor is built in the forward pass. Half-precision logits are computed in float32.

    Args:
        logits: [N, T, V] (any leading shape works). The row at t predicts tokens[..., t].
        tokens: [N, T], integers in [0, V).
        temperature: > 0; the softmax is that of logits / temperature.
    Returns: [N, T], nats; float32 or, for float64 logits, float64.
    Raises: ValueError on unequal leading shapes, a token outside the vocabulary, temperature ≤ 0 or
        so small that the division would overflow.
    Source: the definition of the softmax.
    """
    check_temperature(temperature)
    tensors(logits=logits, tokens=tokens)
    if logits.shape[:-1] != tokens.shape:
        raise ValueError(
            f"tokens has shape {tuple(tokens.shape)}, logits {tuple(logits.shape)}; "
            "tokens must have the shape of logits without the vocabulary"
        )
    if tokens.is_floating_point() or tokens.dtype == torch.bool:
        raise ValueError(f"tokens has dtype {tokens.dtype}; pass integers, e.g. tokens.long()")
    vocabulary = logits.shape[-1]
    if tokens.numel() and (tokens.min() < 0 or tokens.max() >= vocabulary):
        raise ValueError(
            f"tokens holds an index outside [0, {vocabulary}), the vocabulary of logits"
        )
    if tokens.numel() == 0:
        return as_float(logits.sum(-1))  # no row, but the type and the graph of all others
    # a view of [sequences, positions, V], cut along both so that every piece stays a view of the
    # logits
    shape = (
        (1,) * (3 - logits.dim()) + logits.shape if logits.dim() < 3 else (-1, *logits.shape[-2:])
    )
    logits, columns = logits.reshape(shape), tokens.reshape(shape[:-1])
    rows = max(1, _CHUNK_LOGITS // vocabulary)
    sequences = max(1, min(len(logits), rows))
    blocks = zip(logits.split(sequences), columns.split(sequences), strict=True)
    return torch.cat(
        [_block_log_probs(*block, rows // sequences, temperature) for block in blocks]
    ).view(tokens.shape)


def _block_log_probs(logits: Tensor, tokens: Tensor, positions: int, temperature: float) -> Tensor:
    upcast = logits.dtype in (torch.float16, torch.bfloat16)

    def piece_log_probs(logits: Tensor, tokens: Tensor) -> Tensor:
        scaled = logits.float() if upcast else logits
        if temperature != 1.0:
            scaled = scaled / temperature
        return scaled.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - scaled.logsumexp(-1)

    pieces = zip(logits.split(positions, dim=1), tokens.split(positions, dim=1), strict=True)
    if logits.requires_grad and (upcast or temperature != 1.0):
        # autograd would keep every scaled piece, together a second [N, T, V]; scale them again in
        # the backward pass instead
        kept = [
            checkpoint(piece_log_probs, *p, use_reentrant=False, preserve_rng_state=False)
            for p in pieces
        ]
        return torch.cat(kept, dim=1)
    return torch.cat([piece_log_probs(*piece) for piece in pieces], dim=1)


def entropy(logits: Tensor) -> Tensor:
    """Entropy of softmax(logits) at each position, over the whole vocabulary.

    Equation: eq:entropy

    A logit of −inf is a token of probability zero and adds nothing. Half-precision logits are
    computed in float32.

    Args:
        logits: [N, T, V] (any leading shape works); divide by the temperature first if you sample
            with one.
    Returns: [N, T], nats, in [0, log V]; float32 or, for float64 logits, float64.
    Raises: ValueError if logits is a scalar or has no vocabulary.
    Source: Shannon 1948, "A Mathematical Theory of Communication", section 6.
    """
    tensors(logits=logits)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(
            f"logits has shape {tuple(logits.shape)}; the last dimension must be the vocabulary"
        )
    log_probs = as_float(logits).log_softmax(-1)
    probs = log_probs.exp()
    # 0 · (−inf) is NaN where the limit is 0
    return -(probs * log_probs.masked_fill(probs == 0, 0.0)).sum(-1)


def masked_mean(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean over the entries that count.

    Equation: eq:masked-mean

    What stands under the mask never reaches the result or the gradient, NaN included. Half
    precision is summed in float32.

    Args:
        values: any shape.
        mask: the same shape; 1 or True counts.
        dim: the dimension to average over; None means all.
    Returns: a scalar, or `values` without `dim`; float32 or, for float64 values, float64.
    Raises: ValueError on unequal shapes, a mask of anything but 0 and 1, a dimension that `values`
        does not have, or if no entry counts (with `dim`, in any slice).
    Source: the definition of the mean.
    """
    tensors(values=values)
    mask = as_mask(mask, values)
    kept = as_float(values).masked_fill(~mask, 0.0)
    if dim is None:
        return kept.sum() / mask.sum()
    in_range(dim, "dim", -values.dim(), values.dim() - 1)
    counts = mask.sum(dim)
    if (counts == 0).any():
        raise ValueError(
            f"mask is empty along dim={dim} for at least one slice; drop that slice or average"
            " over all"
        )
    return kept.sum(dim) / counts


def masked_whiten(
    values: Tensor, mask: Tensor, shift_mean: bool = True, eps: float = 1e-8
) -> Tensor:
    """Scale the entries that count to unit variance, and (by default) shift them to mean zero.

    Equation: eq:masked-whiten

    Args:
        values: any shape, e.g. advantages [N, T].
        mask: the same shape; 1 or True counts.
        shift_mean: False scales the spread and keeps the mean, as is done for rewards.
        eps: added to the variance, ≥ 0.
    Returns: the shape of `values`; 0 where the mask is 0; entries that are all equal have no
        spread, and come out as exactly 0, or their mean. Float32 or, for float64 values, float64.
    Raises: ValueError on unequal shapes, a mask of anything but 0 and 1, fewer than two entries
        that count (no variance exists), or eps < 0.
    Source: Huang et al. 2024, "The N+ Implementation Details of RLHF with PPO", detail on
        whitening; the variance is the unbiased one (n − 1).
    """
    tensors(values=values)
    true_or_false(shift_mean, "shift_mean")
    in_range(eps, "eps", 0.0)
    mask = as_mask(mask, values)
    count = mask.sum()
    if count < 2:
        raise ValueError("mask counts one entry; a variance needs at least two")
    values = as_float(values)
    mean = masked_mean(values, mask)
    centred = (values - mean).masked_fill(~mask, 0.0)
    # a power of two leaves every digit as it is, and lets large numbers be squared
    scale = _power_of_two(centred)
    variance = (centred / scale).square().sum() / (count - 1)
    whitened = centred / scale * torch.rsqrt(variance + eps / scale / scale)
    # rounding of the mean would otherwise leave a residue that a small eps blows up
    whitened = whitened.masked_fill(all_equal(values[mask][None]).squeeze(), 0.0)
    if not shift_mean:
        whitened = whitened + mean
    return whitened.masked_fill(~mask, 0.0)


def _power_of_two(values: Tensor) -> float:
    """The highest power of two that is not above the largest size, and at least 1."""
    largest = values.detach().abs().max().item()
    return 2.0 ** (math.frexp(largest)[1] - 1) if 1.0 < largest < math.inf else 1.0


def completion_log_probs(
    model: nn.Module,
    tokens: Tensor,
    attention_mask: Tensor,
    completion_length: int,
    temperature: float = 1.0,
    chunk_size: int | None = None,
    samples_per_prompt: int = 1,
) -> Tensor:
    """Log-probability of each completion token given all tokens before it.

    Equation: eq:completion-log-probs

    Positions are counted from the mask, so a row gives the same numbers padded or alone. The
    output embedding is applied to `chunk_size` completion tokens at a time, and again in the
    backward pass: memory grows with the chunk, not with N · T · V. A model that changes its logits
    afterwards (soft-capping, a scale) is noticed and gives its own logits, [N, C, V] at once.

    Gradients flow. The model's mode is left to the caller: dropout must be off (`model.eval()`)
    for the ratio to the sampler's log-probabilities to start at 1.

    Args:
        model: a Hugging Face causal language model, LoRA or not.
        tokens: [N, P + C], prompts padded on the left, then completions.
        attention_mask: [N, P + C]; 0 on the left padding and after a completion's end.
        completion_length: C, the columns at the end that are completion.
        temperature: > 0; what the tokens were sampled with.
        chunk_size: completion tokens that the output embedding is applied to at once; None: 1024.
        samples_per_prompt: G, the rows that share a prompt; they must be neighbours. The prompt is
            then run once for all of them, with the same gradient, where the model has a cache.
    Returns: [N, C], nats; float32 or, for a float64 model, float64; exactly 0 where the mask is 0,
        which costs no work in the output embedding.
    Raises: ValueError on unequal shapes, C outside [1, P + C − 1], a prompt that is padded on the
        right, or at all for a model that reads padding as text, a model that reads in both
        directions, a token outside the vocabulary, a sequence longer than the model's context,
        rows of a group with unequal prompts, a mask of anything but 0 and 1, temperature ≤ 0 or so
        small that the division would overflow, chunk_size < 1.
    Source: the chain rule of probability.
    """
    mask = checked_mask(model, tokens, attention_mask, completion_length)
    check_temperature(temperature)
    chunk_size = _CHUNK_TOKENS if chunk_size is None else chunk_size
    in_range(chunk_size, "chunk_size", 1)
    in_range(samples_per_prompt, "samples_per_prompt", 1)
    check_groups(tokens, mask, completion_length, samples_per_prompt)
    targets, counted = tokens[:, -completion_length:], mask[:, -completion_length:].bool()
    parts = trunk_and_head(model)
    states = completion_states(
        parts[0] if parts else model, tokens, mask, completion_length, samples_per_prompt
    )
    if parts is None:
        return token_log_probs(states, targets, temperature).masked_fill(~counted, 0.0)
    values = _head_log_probs(parts[1], states[counted], targets[counted], temperature, chunk_size)
    return values.new_zeros(targets.shape).masked_scatter(counted, values)


def _head_log_probs(
    head: nn.Module, hidden: Tensor, tokens: Tensor, temperature: float, chunk_size: int
) -> Tensor:
    """Log-probabilities of tokens [M] from hidden states [M, H], a chunk at a time."""

    def piece(hidden: Tensor, tokens: Tensor) -> Tensor:
        return token_log_probs(head(hidden), tokens, temperature)

    *early, last = zip(hidden.split(chunk_size), tokens.split(chunk_size), strict=True)
    if torch.is_grad_enabled():
        # the backward pass begins with the last chunk: only the others are worth computing again
        values = [checkpoint(piece, *each, use_reentrant=False) for each in early]
    else:
        values = [piece(*each) for each in early]
    return torch.cat([*values, piece(*last)])
