"""One forward pass of a language model over prompts and completions: what log-probabilities, values
and sampling share. Names without an underscore are for the package alone."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from rlhf_helpers._validate import (
    as_mask,
    check_model,
    in_range,
    integers,
    same_shape,
    tensors,
)

# What was found out about a model, or a function, for as long as it lives.
# Whether a model's logits are its output embedding applied to the hidden states, and no more.
_PLAIN_HEADS: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
# Whether masked tokens on the left change what it says.
_MINDS_PADDING: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
# Whether a later token changes what it says about an earlier one.
_LOOKS_AHEAD: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
# The first weights of models that run without their cache, which was said once.
_WITHOUT_CACHE: WeakIdKeyDictionary = WeakIdKeyDictionary()
# The names of a function's arguments, and whether it takes any others.
_SIGNATURES: WeakKeyDictionary[Callable, tuple[frozenset[str], bool]] = WeakKeyDictionary()

# What the library calls the cache in a forward pass: since 5.24, and before.
_CACHE_NAMES = ("cache", "past_key_values")


def checked_mask(
    model: nn.Module, tokens: Tensor, attention_mask: Tensor, completion_length: int
) -> Tensor:
    check_model(model)
    integers(tokens=tokens)
    tensors(attention_mask=attention_mask)
    if tokens.dim() != 2:
        raise ValueError(f"tokens has shape {tuple(tokens.shape)}; pass [sequences, tokens]")
    same_shape(tokens=tokens, attention_mask=attention_mask)
    in_range(completion_length, "completion_length", 1, tokens.shape[1] - 1)
    mask = as_mask(attention_mask, tokens, "attention_mask").long()
    check_left_padded(mask[:, :-completion_length], "attention_mask")
    as_mask(mask[:, -completion_length:], tokens[:, -completion_length:], "attention_mask")
    check_causal(model)
    check_vocabulary(model, tokens, "tokens")
    check_context(model, mask.sum(-1).max().item(), "tokens", "shorten the completions or prompts")
    return mask


def check_causal(model: nn.Module) -> None:
    """Refuse a model that reads in both directions: it has no probability of a next token."""
    base = language_model(model)
    # the families that can do both have this setting, and some of one direction have it too
    if getattr(base.config, "is_decoder", None) is False and _looks_ahead(model):
        raise ValueError(
            f"model: {type(base).__name__} reads in both directions, so that it has no probability "
            "of a next token; make it with is_decoder=True in its configuration"
        )


def _looks_ahead(model: nn.Module) -> bool:
    if model not in _LOOKS_AHEAD:
        tokens = torch.tensor([[1, 2, 3], [1, 2, 0]], device=next(model.parameters()).device)
        places = torch.arange(3, device=tokens.device).expand_as(tokens)
        with evaluating(model), torch.no_grad():
            first, other = run_model(model, tokens, torch.ones_like(tokens), places, 3)[0]
        _LOOKS_AHEAD[model] = _differ(first[:2], other[:2])
    return _LOOKS_AHEAD[model]


def check_left_padded(prompt_mask: Tensor, name: str) -> None:
    wrong = (prompt_mask[:, -1] == 0) | (prompt_mask.diff(dim=1) < 0).any(-1)
    if wrong.any():
        raise ValueError(
            f"{name} does not end row {wrong.nonzero()[0].item()}'s prompt with a run of 1s; "
            "pad prompts on the left, where the mask is 0"
        )


def check_padding(model: nn.Module, mask: Tensor, name: str) -> None:
    """Refuse masked tokens to the left of others if the model reads them all the same."""
    if (mask.diff(dim=1) > 0).any() and _minds_padding(model):
        raise ValueError(
            f"{name} holds padding, and {type(language_model(model)).__name__} reads it as text: "
            "its numbers would change; pass prompts of one length, without padding"
        )


def _minds_padding(model: nn.Module) -> bool:
    if model not in _MINDS_PADDING:
        _MINDS_PADDING[model] = not _masks_attention(model) and _padding_changes(model)
    return _MINDS_PADDING[model]


def _masks_attention(model: nn.Module) -> bool:
    """Whether this is a model of the library that remembers nothing but keys and values, and is
    told the positions: what is masked cannot reach it, and no trial is needed."""
    base = _bare(model)
    return (
        type(base).__module__.startswith("transformers.")
        and "forward" not in vars(base)
        and "position_ids" in _taken(model)
        and not _has_state(base)
        and not _has_virtual_tokens(model)
    )


def _padding_changes(model: nn.Module) -> bool:
    """Two masked tokens before three that count, against the three alone."""
    device = next(model.parameters(), torch.empty(0)).device
    tokens = torch.tensor([[0, 0, 1, 2, 3]], device=device) % (vocabulary_of(model) or 4)
    mask = torch.tensor([[0, 0, 1, 1, 1]], device=device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    try:
        with evaluating(model), torch.no_grad():
            padded, alone = (
                run_model(model, tokens[:, i:], mask[:, i:], positions[:, i:], 3)[0] for i in (0, 2)
            )
    except Exception:
        # this text may be none that it can read; what is wrong with it the call itself will say
        return False
    return _differ(padded, alone)


def _differ(found: Tensor, expected: Tensor) -> bool:
    """Whether outputs differ by more than rounding, measured by their own spread: a shift of all
    logits changes no probability, and flat and peaked ones need a ruler of their own."""
    tolerance = max(3e-4, torch.finfo(expected.dtype).eps ** 0.5)
    found, expected = (x.float() - x.float().mean(-1, keepdim=True) for x in (found, expected))
    return bool((found - expected).norm() > tolerance * expected.norm())


def check_vocabulary(model: nn.Module, tokens: Tensor, name: str) -> None:
    size = vocabulary_of(model)
    if size is not None and tokens.numel() and (tokens.min() < 0 or tokens.max() >= size):
        raise ValueError(f"{name} holds an index outside [0, {size}), the model's vocabulary")


def vocabulary_of(model: nn.Module) -> int | None:
    """How many rows the input embedding has, or None if the model does not show it."""
    try:
        # an adapter may have wrapped it: only the weight has the same name everywhere
        return len(language_model(model).get_input_embeddings().weight)
    except (AttributeError, NotImplementedError):
        return None


def context_of(config: Any) -> int | None:
    """How many tokens a model reads at most, or None if its configuration does not say."""
    # a model of text and images keeps what belongs to its text one level below
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    for part in (text, config):
        context = getattr(part, "max_position_embeddings", None)
        if isinstance(context, int) and context > 0:
            return context
    return None


def check_context(model: nn.Module, length: int, name: str, fix: str) -> None:
    context = context_of(language_model(model).config)
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
    """The model itself, with its configuration and its embeddings, whatever it is wrapped in."""
    base = _bare(model)
    if not hasattr(base, "get_input_embeddings"):
        for child in base.children():
            inner = language_model(child)
            if hasattr(inner, "get_input_embeddings"):
                return inner
    return base


def _bare(model: nn.Module) -> Any:
    """The model without the wrappers that change nothing but its layers: an adapter's (the layers
    carry it) and the compiler's."""
    if hasattr(model, "get_base_model"):
        return _bare(model.get_base_model())
    compiled = vars(model).get("_modules", {}).get("_orig_mod")
    return model if compiled is None else _bare(compiled)


def _has_state(model: nn.Module) -> bool:
    """Whether the library says of the model that it remembers more than keys and values."""
    return getattr(_bare(model), "_is_stateful", False)


def _has_virtual_tokens(model: nn.Module) -> bool:
    return getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False)


def _taken(model: nn.Module) -> frozenset[str]:
    """The names of the arguments that the forward pass takes.

    A forward with **kwargs may hand them on: to the class above it, or to what it wraps. Those of
    the library name all that they know.
    """
    base, names = _bare(model), frozenset()
    kinds = [kind for kind in type(base).__mro__ if kind is not nn.Module]
    for holder in (base, *kinds):
        forward = vars(holder).get("forward")
        if forward is None:
            continue
        found, hands_on = _signature(getattr(forward, "__func__", forward))
        names |= found
        library = str(getattr(forward, "__module__", "")).startswith("transformers.")
        if not hands_on or ("input_ids" in found and library):
            return names
    for child in base.children():
        inner = _taken(child)
        if "input_ids" in inner:
            return names | inner
    # what it hands them on to cannot be seen; without positions the numbers would be wrong
    return names | {"position_ids", "logits_to_keep"}


def _signature(function: Callable) -> tuple[frozenset[str], bool]:
    if function not in _SIGNATURES:
        parameters = inspect.signature(function).parameters
        hands_on = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
        _SIGNATURES[function] = frozenset(parameters), hands_on
    return _SIGNATURES[function]


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
    base = _bare(model)
    # virtual tokens are put in front by the wrapper, so that the trunk alone is not the model
    if _has_virtual_tokens(model):
        return None
    if base not in _PLAIN_HEADS:
        try:
            _PLAIN_HEADS[base] = _is_plain(base, base.get_decoder(), base.get_output_embeddings())
        except Exception:
            # built in another way, whichever that is: then its own logits are taken
            _PLAIN_HEADS[base] = False
    return (base.get_decoder(), base.get_output_embeddings()) if _PLAIN_HEADS[base] else None


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
        with evaluating(base), torch.no_grad(), _named_answers(base):
            logits = base(token, attention_mask=torch.ones_like(token)).logits
            expected = head(large[0]) if large else logits.new_empty(0)
    finally:
        hook.remove()
    return logits.shape == expected.shape and torch.allclose(
        logits.float(), expected.float(), rtol=1e-3, atol=1e-2
    )


@contextmanager
def _named_answers(model: nn.Module) -> Iterator[None]:
    """Parts of a model call each other by the names of their answers, whatever its configuration
    asks the whole for."""
    config = getattr(language_model(model), "config", None)
    if getattr(config, "return_dict", True):
        yield
        return
    try:
        config.return_dict = True
        yield
    finally:
        config.return_dict = False


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
    names = _taken(model)
    wanted = {"position_ids": positions[:, -tokens.shape[1] :], "logits_to_keep": keep}
    wanted |= {"use_cache": use_cache}
    if past is not None:
        wanted |= {next(name for name in _CACHE_NAMES if name in names): past}
    inputs = {name: value for name, value in wanted.items() if name in names}
    with _named_answers(model):
        output = model(input_ids=tokens, attention_mask=attention_mask, **inputs)
    if isinstance(output, tuple):
        states, *others = output
    else:
        states = output.logits if hasattr(output, "logits") else output.last_hidden_state
        others = [getattr(output, name, None) for name in _CACHE_NAMES]
    return states[:, -keep:], next((each for each in others if hasattr(each, "layers")), None)


def completion_states(
    model: nn.Module, tokens: Tensor, mask: Tensor, completion_length: int, group: int
) -> Tensor:
    """The outputs that predict the completion, [N, C, ...]: those of the tokens one to the left."""
    check_padding(model, mask, "attention_mask")
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
    prompts = [each[::group, first] for each in (tokens, mask, positions)]
    states, past = run_model(model, *prompts, keep=1, use_cache=True)
    states = states.repeat_interleave(group, dim=0)
    if completion_length == 1:
        return states
    if not (repeatable(past) and remembers(past, prompts[0])):
        say_without_cache(model)
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
    """Whether the model can be given a cache; what comes of it only `remembers` can say."""
    # a layer that is checkpointed drops its cache in training
    if any(
        module.training and getattr(module, "gradient_checkpointing", False)
        for module in model.modules()
    ):
        return False
    if next(model.parameters(), model) in _WITHOUT_CACHE:
        return False
    names = _taken(model)
    if not names.isdisjoint(_CACHE_NAMES) and not _has_state(model):
        return True
    if "use_cache" in names:
        say_without_cache(model)
    return False


def say_without_cache(model: nn.Module) -> None:
    """Warn once a model, which from then on has no cache for `has_cache`."""
    weight = next(model.parameters(), model)
    if weight not in _WITHOUT_CACHE:
        _WITHOUT_CACHE[weight] = True
        warnings.warn(
            f"{type(language_model(model)).__name__} runs without a cache: none that can be passed "
            "to it holds keys and values alone. The numbers are the same, it takes longer.",
            stacklevel=2,
        )


def remembers(past: Any, tokens: Tensor) -> bool:
    """Whether the cache holds what was run, and nothing else."""
    return past.get_seq_length() == tokens.shape[1]


def repeatable(past: Any) -> bool:
    """Whether every layer of the cache is keys and values alone, which can be repeated by row.

    A model with a cache of its own may keep more in it, or elsewhere.
    """
    layers = getattr(past, "layers", [None])
    known = all(type(part).__module__ == "transformers.cache_utils" for part in (past, *layers))
    return known and not any(hasattr(layer, "update_conv_state") for layer in layers)
