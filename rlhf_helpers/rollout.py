"""Sampling completions from a language model, with the log-probability of every sampled token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedTokenizerBase
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from rlhf_helpers._forward import (
    check_causal,
    check_context,
    check_left_padded,
    check_padding,
    check_vocabulary,
    evaluating,
    has_cache,
    language_model,
    remembers,
    repeatable,
    run_model,
    say_without_cache,
    vocabulary_of,
)
from rlhf_helpers._validate import (
    check_generator,
    check_model,
    check_tokenizer,
    has,
    in_range,
    integers,
    same_shape,
    token_ids,
    zero_or_one,
)
from rlhf_helpers.conversations import Prompt
from rlhf_helpers.logprobs import token_log_probs
from rlhf_helpers.models import Cut, decode, encode_prompts, turn_end


class Rollout(NamedTuple):
    """Prompts of P tokens and their sampled completions of up to C tokens.

    tokens [N, P + C] hold the pad token left of a prompt and after a completion's end, where
    attention_mask [N, P + C] is 0. completion_mask [N, C] is True on a completion, its end token
    included. log_probs [N, C] are those of the sampled tokens, in nats, at the temperature of
    sampling but before top-k and top-p; 0 after the end. prompt_length is P.
    """

    tokens: Tensor
    attention_mask: Tensor
    completion_mask: Tensor
    log_probs: Tensor
    prompt_length: int


def sample(
    model: nn.Module,
    prompt_tokens: Tensor,
    prompt_mask: Tensor,
    max_new_tokens: int,
    *,
    eos_token_id: int | Sequence[int] | None,
    pad_token_id: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    samples_per_prompt: int = 1,
    generator: torch.Generator | None = None,
) -> Rollout:
    """Sample completions; the samples of one prompt are neighbours.

    Each prompt is run once and its cache shared by its samples; a sequence that has ended leaves
    the batch. Dropout is off meanwhile, and no gradient is recorded. Masks come from where a
    sequence ended, never from token values, so that pad and end may be one token.

    Args:
        model: a Hugging Face causal language model, LoRA or not.
        prompt_tokens: [B, P], padded on the left.
        prompt_mask: [B, P]; 0 on the padding.
        max_new_tokens: at most so many; C is less if all sequences have ended before.
        eos_token_id: what ends a sequence: one token, several, or None for nothing.
        pad_token_id: what stands after the end; the end token itself will do.
        temperature: > 0; divides the logits. For the likeliest token (greedy) take top_k=1.
        top_k: sample among the k likeliest tokens; 0: among all.
        top_p: then sample among the likeliest tokens that together have this probability.
        samples_per_prompt: G; N = B · G.
        generator: on the model's device; with one, the global random state is untouched.
    Returns: a Rollout.
    Raises: ValueError on a prompt that is empty or padded on the right, prompts of unequal length
        for a model that reads padding as text, a model that reads in both directions, a mask of
        anything but 0 and 1, a token outside the vocabulary, prompt + max_new_tokens beyond the
        model's context, a number outside its range, or logits that are NaN or infinite, saying the
        step and the row.
    Source: Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration" (top-p); Fan et
        al. 2018, "Hierarchical Neural Story Generation" (top-k).
    """
    _check_numbers(max_new_tokens, temperature, top_k, top_p, samples_per_prompt)
    _check_prompts(model, prompt_tokens, prompt_mask, max_new_tokens)
    ends = _end_tokens(model, eos_token_id, pad_token_id, prompt_tokens.device)
    check_generator(generator, prompt_tokens.device)
    prompts, width = (prompt_tokens, prompt_mask.long()), prompt_tokens.shape[1]
    tokens, mask = (
        pad(each.repeat_interleave(samples_per_prompt, dim=0), (0, max_new_tokens), value=value)
        for each, value in zip(prompts, (pad_token_id, 0), strict=True)
    )
    luck = {"dtype": torch.float64, "device": tokens.device, "generator": generator}
    rows, log_probs = torch.arange(len(tokens), device=tokens.device), []
    with evaluating(model), torch.no_grad():
        logits, past = _start(model, *prompts, max_new_tokens, samples_per_prompt)
        for end in range(width + 1, width + max_new_tokens + 1):
            _check_logits(logits, rows, end - width)
            # drawn for every sequence, ended or not: which of them are left changes no other's luck
            uniforms = torch.rand(len(tokens), **luck)[rows]
            chosen = _choose(logits, uniforms, temperature, top_k, top_p)
            tokens[rows, end - 1], mask[rows, end - 1] = chosen, 1
            found = token_log_probs(logits, chosen, temperature)
            log_probs.append(found.new_zeros(len(tokens)).index_copy(0, rows, found))
            going = torch.isin(chosen, ends, invert=True)
            if end == tokens.shape[1] or not going.any():
                break
            if not going.all():
                rows = _drop(going, rows, past)
            logits, past = _next(model, tokens[rows, :end], mask[rows, :end], past)
    mask = mask[:, :end]
    return Rollout(tokens[:, :end], mask, mask[:, width:].bool(), torch.stack(log_probs, 1), width)


def write(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    **how: Any,
) -> list[str]:
    """Sampled completions as text.

    Args:
        model, tokenizer: as `models.load` returns them.
        prompts: B texts or conversations.
        max_new_tokens: at most so many a completion.
        how: temperature, top_k, top_p, samples_per_prompt and generator, as in `sample`.
    Returns: B · samples_per_prompt texts without the prompts; those of one prompt are neighbours.
        One without an end is a `models.Cut`.
    Raises: as `sample`, and ValueError as `models.encode_prompts`.
    """
    check_model(model)
    tokens, mask = encode_prompts(tokenizer, prompts, next(model.parameters()).device)
    ends, filler = end_tokens(model, tokenizer), tokenizer.pad_token_id
    rollout = sample(
        model, tokens, mask, max_new_tokens, eos_token_id=ends, pad_token_id=filler, **how
    )
    return texts_of(rollout, tokenizer, ended(rollout, ends))


def end_tokens(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """All tokens that end a completion: the tokenizer's, those of the model's settings for
    generation, of which chat models have several, and the end of a turn in the chat template. Those
    that the model has no row for are left out."""
    check_model(model)
    check_tokenizer(tokenizer)
    base = language_model(model)
    settings = getattr(base, "generation_config", None) or base.config
    ends = getattr(settings, "eos_token_id", None)
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    rows = vocabulary_of(model) or float("inf")
    ends = [tokenizer.eos_token_id, *ends, turn_end(tokenizer)]
    return list(dict.fromkeys(end for end in ends if end is not None and 0 <= end < rows))


def ended(rollout: Rollout, ends: Sequence[int]) -> Tensor:
    """Whether each completion came to one of the end tokens, [N]."""
    has(rollout, "rollout", "a Rollout, as sample returns it", *Rollout._fields)
    completions = rollout.tokens[:, rollout.prompt_length :]
    ends = torch.tensor(token_ids(ends, "ends"), dtype=torch.long, device=completions.device)
    found = torch.isin(completions, ends)
    return (found & rollout.completion_mask).any(1)


def texts_of(rollout: Rollout, tokenizer: PreTrainedTokenizerBase, whole: Tensor) -> list[str]:
    """The completions as text; where `whole` [N] is False, as a `models.Cut`."""
    has(rollout, "rollout", "a Rollout, as sample returns it", *Rollout._fields)
    whole = zero_or_one(whole, "whole")
    if whole.shape != rollout.tokens.shape[:1]:
        raise ValueError(
            f"whole has shape {tuple(whole.shape)}; pass one for each of the {len(rollout.tokens)}"
            " completions"
        )
    completions = rollout.tokens[:, rollout.prompt_length :]
    texts = decode(tokenizer, completions, rollout.completion_mask)
    return [text if done else Cut(text) for text, done in zip(texts, whole.tolist(), strict=True)]


def _check_numbers(
    max_new_tokens: int, temperature: float, top_k: int, top_p: float, samples_per_prompt: int
) -> None:
    in_range(max_new_tokens, "max_new_tokens", 1)
    in_range(temperature, "temperature", -math.inf, infinite=True)
    if temperature <= 0:
        raise ValueError(f"temperature={temperature} must be > 0; for greedy decoding take top_k=1")
    in_range(top_k, "top_k", 0)
    in_range(top_p, "top_p", 0.0, 1.0, open_low=True)
    in_range(samples_per_prompt, "samples_per_prompt", 1)


def _check_prompts(model: nn.Module, tokens: Tensor, mask: Tensor, max_new_tokens: int) -> None:
    check_model(model)
    integers(prompt_tokens=tokens)
    if tokens.dim() != 2 or tokens.numel() == 0:
        raise ValueError(
            f"prompt_tokens has shape {tuple(tokens.shape)}; pass [prompts, tokens] with at least "
            "one token each, e.g. the beginning-of-sequence token"
        )
    same_shape(prompt_tokens=tokens, prompt_mask=mask)
    mask = zero_or_one(mask, "prompt_mask").long()
    empty = ~mask.any(-1)
    if empty.any():
        raise ValueError(
            f"prompt_mask: row {empty.nonzero()[0].item()} is an empty prompt; "
            "give it one token, e.g. the beginning-of-sequence token"
        )
    check_left_padded(mask, "prompt_mask")
    check_causal(model)
    check_padding(model, mask, "prompt_mask")
    check_vocabulary(model, tokens, "prompt_tokens")
    longest = int(mask.sum(-1).max())
    check_context(
        model,
        longest + max_new_tokens,
        "max_new_tokens",
        f"the longest prompt has {longest}: lower max_new_tokens or shorten the prompts",
    )


def _end_tokens(
    model: nn.Module,
    eos_token_id: int | Sequence[int] | None,
    pad_token_id: int,
    device: torch.device,
) -> Tensor:
    if pad_token_id is None:
        raise ValueError("pad_token_id is None; pass a token, the end token will do")
    in_range(pad_token_id, "pad_token_id", 0)
    check_vocabulary(model, torch.tensor([pad_token_id]), "pad_token_id")
    ends = [] if eos_token_id is None else token_ids(eos_token_id, "eos_token_id")
    ends = torch.tensor(ends, dtype=torch.long, device=device)
    check_vocabulary(model, ends, "eos_token_id")
    return ends


def _check_logits(logits: Tensor, rows: Tensor, step: int) -> None:
    # the maximum is NaN if a logit is, +inf if a logit is, and −inf if nothing can be sampled
    wrong = ~logits.amax(-1).isfinite()
    if wrong.any():
        row = rows[wrong.nonzero()[0].item()].item()
        raise ValueError(
            f"the model's logits are NaN or infinite at step {step} in row {row}; "
            "look for a diverged update or half-precision overflow"
        )


def _choose(
    logits: Tensor, uniforms: Tensor, temperature: float, top_k: int, top_p: float
) -> Tensor:
    """One token a row, by inverting the cumulative distribution at a uniform number in [0, 1)."""
    order, vocabulary = None, logits.shape[-1]
    if 0 < top_k < vocabulary or top_p < 1:
        logits, order = logits.topk(min(top_k or vocabulary, vocabulary))
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    weights = (logits - logits.amax(-1, keepdim=True)).div_(temperature).exp_()
    cumulative = weights.cumsum(-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    if top_p < 1:
        # a token stays if those before it have not yet reached top_p
        inside = cumulative - weights < top_p * total
        total = cumulative.gather(-1, inside.sum(-1, keepdim=True) - 1)
    index = torch.searchsorted(cumulative, uniforms.unsqueeze(-1) * total, right=True)
    return (index if order is None else order.gather(-1, index)).squeeze(-1)


def _start(
    model: nn.Module, tokens: Tensor, mask: Tensor, max_new_tokens: int, group: int
) -> tuple[Tensor, Any]:
    """Logits of the first token for every sequence, and the prompts' cache, repeated for each."""
    logits, past = None, _new_cache(model, max_new_tokens - 1)
    if past is not None:
        # a model may take no cache but its own; any other error comes again below
        with suppress(ValueError):
            logits, _ = _logits(model, tokens, mask, past)
        if logits is not None and remembers(past, tokens):
            past.batch_repeat_interleave(group)
            return logits.repeat_interleave(group, dim=0), past
        say_without_cache(model)
    logits, _ = _logits(model, tokens, mask, None)
    return logits.repeat_interleave(group, dim=0), None


def _next(model: nn.Module, tokens: Tensor, mask: Tensor, past: Any) -> tuple[Tensor, Any]:
    return _logits(model, tokens if past is None else tokens[:, -1:], mask, past)


def _logits(model: nn.Module, tokens: Tensor, mask: Tensor, past: Any) -> tuple[Tensor, Any]:
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits, _ = run_model(model, tokens, mask, positions, 1, past, use_cache=past is not None)
    return logits.squeeze(1), past


def _drop(going: Tensor, rows: Tensor, past: Any) -> Tensor:
    """Ended sequences leave: the last ones that go on take their places, so that little moves."""
    size = int(going.sum())
    order = torch.arange(size, device=going.device)
    order[~going[:size]] = going[size:].nonzero().squeeze(-1) + size
    if past is not None:
        past.batch_select_indices(order)
    return rows[order]


def _new_cache(model: nn.Module, new_tokens: int) -> Any:
    """An empty cache, or None if the model has none whose rows can be repeated and dropped."""
    if not has_cache(model):
        return None
    try:
        cache = DynamicCache(config=language_model(model).config)
    except Exception:
        # layers of a kind that the library's own cache does not know
        cache = None
    if not repeatable(cache):
        say_without_cache(model)
        return None
    if all(type(layer) is DynamicLayer for layer in cache.layers):
        return Cache(layers=[_RoomyLayer(new_tokens) for _ in cache.layers])
    return cache


class _RoomyLayer(DynamicLayer):
    """Keys and values of a layer, with room for those to come: a new token is written in place,
    where a DynamicLayer copies all of them.

    Args:
        new_tokens: how many may follow the first update.
    """

    def __init__(self, new_tokens: int) -> None:
        super().__init__()
        self.new_tokens = new_tokens
        self.stores = []

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.is_initialized = True
            self.keys, self.values = key_states, value_states
            return key_states, value_states
        rows, _, start, _ = self.keys.shape
        end = start + key_states.shape[2]
        for store, states in zip(self.stores, (key_states, value_states), strict=True):
            store[:rows, :, start:end] = states
        self._look(rows, end)
        return self.keys, self.values

    def _look(self, rows: int, length: int) -> None:
        self.keys, self.values = (store[:rows, :, :length] for store in self.stores)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if not self.is_initialized:
            return  # a layer more than the model has
        rows, heads, length, _ = self.keys.shape
        for states in (self.keys, self.values):
            room = (rows, repeats, heads, length + self.new_tokens, states.shape[-1])
            store = states.new_empty(room)
            store[..., :length, :] = states.unsqueeze(1)
            self.stores.append(store.flatten(0, 1))
        self._look(rows * repeats, length)

    def batch_select_indices(self, indices: Tensor) -> None:
        if not self.is_initialized:
            return
        length, size = self.keys.shape[2], len(indices)
        moved = indices != torch.arange(size, device=indices.device)
        to, source = moved.nonzero().squeeze(-1), indices[moved]
        for store in self.stores:
            store[to, :, :length] = store[source, :, :length]
        self._look(size, length)
