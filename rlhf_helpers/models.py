"""Language models: loading them safely, LoRA, the frozen reference, the value head.

Two habits of this file are used everywhere else: prompts are padded on the left, and a mask is
made from lengths, never from `tokens != pad`, because the pad token may be the end-of-sequence
token too.
"""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D

from rlhf_helpers import settings
from rlhf_helpers._forward import check_groups, completion_states
from rlhf_helpers._validate import in_range, same_shape

TINY = settings.TINY
# Names that model families give to the projections of the attention to query, key and value.
_ATTENTION = ("c_attn", "query_key_value", "q_proj", "k_proj", "v_proj")


def load(
    source: str | os.PathLike | PreTrainedModel,
    tokenizer: str | os.PathLike | PreTrainedTokenizerBase | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model and its tokenizer, both ready for batches of prompts.

    The model is in eval mode. The tokenizer pads on the left, with a token that the model knows:
    its own pad token if that is not also the end-of-sequence token, else another special token
    (unk, bos), else the end-of-sequence token. The last is GPT-2's case and harmless here, since
    masks are made from lengths. Model and tokenizer objects are changed in place.

    Only safetensors weights are read (a pickle file can run code), and never code from the hub.

    Args:
        source: a name on the hub, the path of a folder, or a model that is already loaded.
        tokenizer: the same for the tokenizer; None takes the one that belongs to `source`.
        device: where the model goes.
        dtype: of the weights; None means float32, or unchanged for a model that is already loaded.
    Returns: (model, tokenizer).
    Raises: OSError if the model or its tokenizer is not there, or has no safetensors weights;
        ValueError if no tokenizer can be found for a loaded model, if it has no special token, or
        if the model needs code of its own.
    """
    if isinstance(source, str | os.PathLike):
        tokenizer = source if tokenizer is None else tokenizer
        model = _from_pretrained(source, dtype or torch.float32)
    else:
        model = source if dtype is None else source.to(dtype)
        tokenizer = model.config.name_or_path if tokenizer is None else tokenizer
        if tokenizer == "":
            raise ValueError("tokenizer is None and the model has no name; pass tokenizer")
    if isinstance(tokenizer, str | os.PathLike):
        tokenizer = load_tokenizer(tokenizer)
    _make_safe(tokenizer, model)
    return model.to(device).eval(), tokenizer


def _from_pretrained(source: str | os.PathLike, dtype: torch.dtype) -> PreTrainedModel:
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except OSError as error:
        raise OSError(no_such("model", source)) from error
    try:
        return AutoModelForCausalLM.from_pretrained(
            source, config=config, dtype=dtype, use_safetensors=True, trust_remote_code=False
        )
    except OSError as error:
        raise OSError(
            f"{str(source)!r} has no safetensors weights here; pickle files are not loaded.\n"
            "Connect to the hub once, or save the model again with save_pretrained."
        ) from error


def load_tokenizer(source: str | os.PathLike) -> PreTrainedTokenizerBase:
    """The tokenizer of a name on the hub or a folder, as it is stored.

    Raises: OSError, with what to do, if there is none.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except OSError as error:
        raise OSError(no_such("tokenizer", source)) from error
    # from a folder without a tokenizer's files comes one without words
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        raise OSError(no_such("tokenizer", source))
    return tokenizer


def no_such(what: str, name: str | os.PathLike) -> str:
    """What to tell a reader whose model, tokenizer or classifier is neither here nor on the hub."""
    return (
        f"No {what} {str(name)!r}: no folder and no cache has it, and the hub gave none.\n"
        "Connect to the hub once, or set RLHF_SCALE=tiny, or pass the path of a saved model."
    )


def _make_safe(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    rows = model.get_input_embeddings().num_embeddings
    eos = tokenizer.eos_token
    # a token that was added to the tokenizer alone has no row in the model's embedding
    safe = [
        token
        for token in (tokenizer.pad_token, tokenizer.unk_token, tokenizer.bos_token)
        if token not in (None, eos) and tokenizer.convert_tokens_to_ids(token) in range(rows)
    ]
    pad = safe[0] if safe else eos
    if pad is None:
        raise ValueError("tokenizer has no special token to pad with; give it a pad_token")
    tokenizer.padding_side = "left"
    tokenizer.pad_token = pad
    model.config.pad_token_id = tokenizer.pad_token_id
    if model.generation_config is not None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    device: str | torch.device = "cpu",
) -> tuple[Tensor, Tensor]:
    """Tokens of a batch of prompts, padded on the left so that completions start in one column.

    No special token is added, whatever the tokenizer's habit. An empty prompt becomes one
    beginning-of-sequence token (end-of-sequence if there is no other), since a model needs
    something to continue.

    Args:
        tokenizer: as `load` returns it.
        prompts: B texts.
        device: where the tensors go.
    Returns: (tokens [B, P], mask [B, P]), int64; mask 1 on the prompt, by its length.
    Raises: ValueError on no prompts, one text in place of a list, or an empty prompt without a
        token to stand for it, naming its index.
    """
    if isinstance(prompts, str) or len(prompts) == 0:
        raise ValueError("prompts must be a list of at least one text")
    rows = tokenizer(list(prompts), add_special_tokens=False)["input_ids"]
    start = tokenizer.bos_token_id
    if start is None:
        start = tokenizer.eos_token_id
    for i, row in enumerate(rows):
        if not row:
            if start is None:
                raise ValueError(f"prompts[{i}] is empty and the tokenizer has no bos or eos token")
            row.append(start)
    width = max(map(len, rows))
    tokens = torch.full((len(rows), width), tokenizer.pad_token_id)
    mask = torch.zeros_like(tokens)
    for i, row in enumerate(rows):
        tokens[i, width - len(row) :] = torch.tensor(row)
        mask[i, width - len(row) :] = 1
    return tokens.to(device), mask.to(device)


def decode(tokenizer: PreTrainedTokenizerBase, tokens: Tensor, mask: Tensor) -> list[str]:
    """Texts of the tokens that count, without special tokens.

    Args:
        tokenizer: as `load` returns it.
        tokens: [N, C], e.g. completions.
        mask: [N, C]; 1 or True counts.
    Returns: N texts, exactly as the tokens spell them: spaces before punctuation stay.
    Raises: ValueError on unequal shapes.
    """
    same_shape(tokens=tokens, mask=mask)
    return [
        tokenizer.decode(
            row[counts.bool()].tolist(),
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )
        for row, counts in zip(tokens, mask, strict=True)
    ]


def lora_policy(
    model: PreTrainedModel,
    rank: int = 8,
    alpha: float = 16,
    target_modules: Sequence[str] | str | None = None,
) -> PeftModel:
    """The model with its weights frozen and a low-rank update to train: x W + (α/r) x Aᵀ Bᵀ.

    A is random (from torch's global generator) and B is zero, so the policy starts as the model.
    There is no dropout: the probability ratio of an unchanged policy has to be one. The adapter
    alone is saved by `policy.save_pretrained(folder)` and read by
    `PeftModel.from_pretrained(model, folder)`. The given model is changed in place.

    Args:
        model: a causal language model.
        rank: r, the inner size of the update.
        alpha: the update is scaled by alpha / rank.
        target_modules: endings of the names of the layers to update; "all-linear" means every
            matrix but the output embedding, None the attention's projections to query, key and
            value.
    Returns: the policy; only the A and B matrices require gradients.
    Raises: ValueError if the model carries an adapter already, or has no such layers.
    Source: Hu et al. 2022, "LoRA: Low-Rank Adaptation of Large Language Models", section 4.1.
    """
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError(
            "model carries an adapter already; train that one, or call merge_and_unload() on it"
            " first"
        )
    if isinstance(target_modules, str) and target_modules != "all-linear":
        raise ValueError(f"target_modules={target_modules!r} is one text; pass a list of names")
    if target_modules is None:
        endings = {name.rpartition(".")[2] for name, _ in model.named_modules()}
        target_modules = [name for name in _ATTENTION if name in endings]
        if not target_modules:
            raise ValueError(f"target_modules: {type(model).__name__} has none of {_ATTENTION}")
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=alpha,
        lora_dropout=0.0,
        target_modules=target_modules,
        # GPT-2 keeps these weights as [in, out], the transpose of a linear layer's
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )
    return get_peft_model(model, config)


def reference(policy: nn.Module) -> Callable[[], AbstractContextManager[nn.Module]]:
    """Fix the policy as it is now as the reference of a training run.

    Call it once, before the first update: `frozen = reference(policy)`. Whenever log-probabilities
    of the reference are needed, write `with frozen() as model:` and score with `model`.

    For a plain model the reference is a frozen copy. A policy from `lora_policy` needs none: with
    its adapter switched off it is the model that it started from. Inside the block the model is in
    eval mode and records no gradients; the policy's own mode is restored afterwards.

    Args:
        policy: the model that will be trained, before its first update.
    Returns: a function; each call gives a context manager that yields the reference model.
    Raises: ValueError if the policy has an adapter that was trained before: switched off, it would
        give the base model and not the policy that this run starts from.
    Source: Ziegler et al. 2019, "Fine-Tuning Language Models from Human Preferences", section 2.
    """
    if not isinstance(policy, PeftModel):
        frozen = copy.deepcopy(policy).eval().requires_grad_(False)
        return lambda: _no_gradients(frozen)
    if not _adapter_is_no_op(policy):
        raise ValueError(
            "the policy's adapter is not a fresh one from lora_policy, so switching it off gives"
            " the base model and not the policy that this run starts from; call"
            " lora_policy(policy.merge_and_unload()) to start a new adapter, or take"
            " reference(copy.deepcopy(policy).merge_and_unload())"
        )
    return lambda: _adapter_off(policy)


def weights_digest(policy: nn.Module) -> str:
    """16 letters that tell one reference from another: of all weights of a plain model, of those
    under the adapter for a policy from `lora_policy`."""
    frozen = isinstance(policy, PeftModel)
    found = hashlib.sha256()
    for name, parameter in policy.named_parameters():
        if not (frozen and parameter.requires_grad):
            found.update(name.encode())
            found.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy())
    return found.hexdigest()[:16]


def _adapter_is_no_op(policy: PeftModel) -> bool:
    # the factor that starts at zero: B for a linear layer, A for an embedding
    starts = [
        parameter
        for name, parameter in policy.named_parameters()
        if "lora_B" in name or "lora_embedding_A" in name
    ]
    return bool(starts) and not any(parameter.any() for parameter in starts)


@contextmanager
def _no_gradients(model: nn.Module) -> Iterator[nn.Module]:
    with torch.no_grad():
        yield model


@contextmanager
def _adapter_off(policy: PeftModel) -> Iterator[nn.Module]:
    modes = [(module, module.training) for module in policy.modules()]
    try:
        with torch.no_grad(), policy.disable_adapter():
            yield policy.eval()
    finally:
        for module, training in modes:
            module.training = training


class ValueModel(nn.Module):
    """A language model's trunk with a scalar head: the value of the state before each token.

    The head starts at zero, so the first values are 0 and the first advantages are made of
    rewards alone.

    Args:
        model: the language model (or LoRA policy) whose trunk is taken, adapter included. What it
            freezes stays frozen here.
        share_trunk: False copies the trunk; True uses the same weights, so that the value loss
            moves the policy too, and `parameters()` contains the policy's trunk.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, share_trunk: bool = False) -> None:
        super().__init__()
        language_model = model.get_base_model() if isinstance(model, PeftModel) else model
        trunk = language_model.base_model
        self.trunk = trunk if share_trunk else copy.deepcopy(trunk)
        rows = language_model.get_output_embeddings().weight
        self.head = nn.Linear(rows.shape[1], 1, device=rows.device, dtype=rows.dtype)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.train(model.training)

    def forward(
        self,
        tokens: Tensor,
        attention_mask: Tensor,
        completion_length: int,
        samples_per_prompt: int = 1,
    ) -> Tensor:
        """Values of the states that the completion's tokens were chosen in.

        Args:
            tokens: [N, P + C], prompts padded on the left, then completions.
            attention_mask: [N, P + C]; 1 or True counts.
            completion_length: C; 1 ≤ C < P + C.
            samples_per_prompt: as in `completion_log_probs`.
        Returns: [N, C]; at t the value before completion token t; 0 where the mask is 0.
        Raises: ValueError on unequal shapes, a completion_length outside its range, or rows of a
            group with unequal prompts.
        """
        same_shape(tokens=tokens, attention_mask=attention_mask)
        in_range(completion_length, "completion_length", 1, tokens.shape[1] - 1)
        mask = attention_mask.long()
        check_groups(tokens, mask, completion_length, samples_per_prompt)
        # the state before token t has seen tokens up to t − 1, so the last token is not needed
        hidden = completion_states(self.trunk, tokens, mask, completion_length, samples_per_prompt)
        values = self.head(hidden).squeeze(-1)
        return values.masked_fill(mask[:, -completion_length:] == 0, 0.0)
