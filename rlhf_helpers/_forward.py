"""One forward pass of a language model over prompts and completions: what log-probabilities, values
and sampling share. Names without an underscore are for the package alone."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from rlhf_helpers._validate import as_mask, in_range, same_shape

# Whether a model's logits are its output embedding applied to the hidden states, and no more.
_PLAIN_HEADS: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def checked_mask(
    model: nn.Module, tokens: Tensor, attention_mask: Tensor, completion_length: int
) -> Tensor:
    if tokens.dim() != 2:
        raise ValueError(f"tokens has shape {tuple(tokens.shape)}; pass [sequences, tokens]")
    same_shape(tokens=tokens, attention_mask=attention_mask)
    in_range(completion_length, "completion_length", 1, tokens.shape[1] - 1)
    mask = attention_mask.long()
    check_left_padded(mask[:, :-completion_length], "attention_mask")
    as_mask(mask[:, -completion_length:], tokens[:, -completion_length:], "attention_mask")
    check_vocabulary(model, tokens, "tokens")
    check_context(model, mask.sum(-1).max().item(), "tokens", "shorten the completions or prompts")
    return mask


def check_left_padded(prompt_mask: Tensor, name: str) -> None:
    wrong = (prompt_mask[:, -1] == 0) | (prompt_mask.diff(dim=1) < 0).any(-1)
    if wrong.any():
        raise ValueError(
            f"{name} does not end row {wrong.nonzero()[0].item()}'s prompt with a run of 1s; "
            "pad prompts on the left, where the mask is 0"
        )


def check_vocabulary(model: nn.Module, tokens: Tensor, name: str) -> None:
    size = language_model(model).get_input_embeddings().num_embeddings
    if tokens.numel() and (tokens.min() < 0 or tokens.max() >= size):
        raise ValueError(f"{name} holds an index outside [0, {size}), the model's vocabulary")


def check_context(model: nn.Module, length: int, name: str, fix: str) -> None:
    config = language_model(model).config
    context = getattr(config, "max_position_embeddings", None)
    if context is not None and length > context:
        raise ValueError(
            f"{name}: {length} tokens do not fit the model's context of {context}; {fix}"
        )


def check_groups(tokens: Tensor, mask: Tensor, completion_length: int, group: int) -> None:
    if group < 1 or len(tokens) % group:
        raise ValueError(
            f"samples_per_prompt={group} must be positive and divide the {len(tokens)} rows"
        )
    prompts = torch.where(mask == 1, tokens, -1)[:, :-completion_length].unflatten(0, (-1, group))
    different = (prompts != prompts[:, :1]).flatten(1).any(-1)
    if different.any():
        first = different.nonzero()[0].item()
        raise ValueError(
            f"samples_per_prompt={group}, but group {first} (rows {first * group} to "
            f"{(first + 1) * group - 1}) holds different prompts; make rows of a prompt neighbours"
        )


def language_model(model: nn.Module) -> Any:
    """The model itself, without the wrapper of an adapter; its layers carry the adapter."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _accepted(model: nn.Module) -> frozenset[str]:
    forward = language_model(model).forward
    return _argument_names(getattr(forward, "__func__", forward))


@lru_cache
def _argument_names(function: Callable) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off inside; afterwards each submodule is in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


def trunk_and_head(model: nn.Module) -> tuple[nn.Module, nn.Module] | None:
    """What makes the hidden states, and what makes logits of them; None if there is more to it."""
    base = language_model(model)
    # virtual tokens are put in front by the wrapper, so that the trunk alone is not the model
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        return None
    if not hasattr(base, "get_decoder"):
        return None
    trunk, head = base.get_decoder(), base.get_output_embeddings()
    if base not in _PLAIN_HEADS:
        _PLAIN_HEADS[base] = head is not None and _is_plain(base, trunk, head)
    return (trunk, head) if _PLAIN_HEADS[base] else None


def _is_plain(base: nn.Module, trunk: nn.Module, head: nn.Module) -> bool:
    """Whether logits = head(hidden), tried on one token.

    The hidden state is replaced by one with large logits: a soft cap hardly changes small ones.
    """
    large = []

    def enlarge(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        hidden = output["last_hidden_state"]
        large.append(hidden * (100 / head(hidden).abs().max()))
        output["last_hidden_state"] = large[0]
        return output

    token = torch.zeros(1, 1, dtype=torch.long, device=next(base.parameters()).device)
    hook = trunk.register_forward_hook(enlarge)
    try:
        with evaluating(base), torch.no_grad():
            logits = base(token, attention_mask=torch.ones_like(token)).logits
            expected = head(large[0]) if large else logits.new_empty(0)
    finally:
        hook.remove()
    return logits.shape == expected.shape and torch.allclose(
        logits.float(), expected.float(), rtol=1e-3, atol=1e-2
    )


def run_model(
    model: nn.Module,
    tokens: Tensor,
    attention_mask: Tensor,
    positions: Tensor,
    keep: int,
    past: Any = None,
    use_cache: bool = False,
) -> tuple[Tensor, Any]:
    """The last `keep` outputs (logits, or the hidden states of a trunk) and the cache.

    `tokens` are the new ones, `attention_mask` covers those in the cache too.
    """
    wanted = {"position_ids": positions[:, -tokens.shape[1] :], "logits_to_keep": keep}
    wanted |= {"past_key_values": past, "use_cache": use_cache}
    accepted = _accepted(model)
    inputs = {name: value for name, value in wanted.items() if name in accepted}
    output = model(input_ids=tokens, attention_mask=attention_mask, **inputs)
    states = output.logits if hasattr(output, "logits") else output.last_hidden_state
    return states[:, -keep:], getattr(output, "past_key_values", None)


def completion_states(
    model: nn.Module, tokens: Tensor, mask: Tensor, completion_length: int, group: int
) -> Tensor:
    """The outputs that predict the completion, [N, C, ...]: those of the tokens one to the left."""
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    after_prompt = mask[:, -completion_length - 1 :]
    if (after_prompt.diff(dim=1) <= 0).all():
        # nothing that counts looks at what follows a completion's end; unmasked, an unpadded batch
        # takes the faster attention without a mask
        mask = torch.cat(
            [mask[:, :-completion_length], torch.ones_like(after_prompt[:, 1:])], dim=1
        )
    if group > 1 and has_cache(model):
        shared = _shared_states(model, tokens, mask, positions, completion_length, group)
        if shared is not None:
            return shared
    return run_model(model, tokens[:, :-1], mask[:, :-1], positions[:, :-1], completion_length)[0]


def _shared_states(
    model: nn.Module,
    tokens: Tensor,
    mask: Tensor,
    positions: Tensor,
    completion_length: int,
    group: int,
) -> Tensor | None:
    first = slice(None, -completion_length)
    prompts = (each[::group, first] for each in (tokens, mask, positions))
    states, past = run_model(model, *prompts, keep=1, use_cache=True)
    states = states.repeat_interleave(group, dim=0)
    if completion_length == 1:
        return states
    if not repeatable(past):
        return None
    for layer in past.layers:
        _repeat_when_used(layer, group)
    rest = slice(-completion_length, -1)
    later, _ = run_model(
        model,
        tokens[:, rest],
        mask[:, :-1],
        positions[:, rest],
        completion_length - 1,
        past,
        use_cache=True,
    )
    return torch.cat([states, later], dim=1)


def _repeat_when_used(layer: Any, group: int) -> None:
    """Repeat the layer's keys and values just before it gets those of the completions.

    Repeated all at once, they and, in the backward pass, their gradients would lie in memory for
    every layer together.
    """

    def repeat_and_update(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        # the class's own method again: a layer that held this function would never be freed at once
        del layer.update
        layer.batch_repeat_interleave(group)
        return layer.update(*args, **kwargs)

    layer.update = repeat_and_update


def has_cache(model: nn.Module) -> bool:
    # a layer that is checkpointed drops its cache in training
    dropped = any(
        module.training and getattr(module, "gradient_checkpointing", False)
        for module in model.modules()
    )
    return "past_key_values" in _accepted(model) and not dropped


def repeatable(past: Any) -> bool:
    """Whether every layer of the cache is keys and values alone, which can be repeated by row."""
    return all(
        hasattr(layer, "batch_repeat_interleave") and not hasattr(layer, "update_conv_state")
        for layer in getattr(past, "layers", [None])
    )
