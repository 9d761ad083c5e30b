"""Language models: loading them safely, LoRA, the frozen reference, the value head.

Two habits of this file are used everywhere else: prompts are padded on the left, and a mask is
made from lengths, never from `tokens != pad`, because the pad token may be the end-of-sequence
token too.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D
from transformers.utils import cached_file

from rlhf_helpers import settings
from rlhf_helpers._forward import (
    check_groups,
    checked_mask,
    completion_states,
    language_model,
)
from rlhf_helpers._validate import (
    check_list,
    check_model,
    check_path,
    check_texts,
    check_tokenizer,
    has,
    in_range,
    integers,
    same_shape,
    true_or_false,
    zero_or_one,
)
from rlhf_helpers.conversations import Conversation, Prompt, conversation_problem, messages_of

TINY = settings.TINY
_OF_A_MODEL = ("parameters", "get_input_embeddings", "eval")
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

    Only safetensors weights are read (a pickle file can run code), and never code from the hub. A
    model is read whole or not at all: no weight is left at random, none in the file is dropped.

    Args:
        source: a name on the hub, the path of a folder, or a model that is already loaded.
        tokenizer: the same for the tokenizer; None takes the one that belongs to `source`.
        device: where the model goes.
        dtype: of the weights; None means float32, or unchanged for a model that is already loaded.
    Returns: (model, tokenizer).
    Raises: OSError if the model or its tokenizer is not there, cannot be read, or has no
        safetensors weights; ValueError if the file lacks weights of the model, has others, or has
        some that are not finite, if no tokenizer can be found for a loaded model, if it has no
        special token or more words than the model, if the model needs code of its own, or if there
        is no such device.
    """
    check_device(device)
    _check_dtype(dtype)
    if isinstance(source, str | os.PathLike):
        tokenizer = source if tokenizer is None else tokenizer
        model = from_files(AutoModelForCausalLM, source, dtype or torch.float32)
    else:
        has(source, "source", "a name, a folder or a model", "config", *_OF_A_MODEL)
        model = source if dtype is None else source.to(dtype)
        tokenizer = model.config.name_or_path if tokenizer is None else tokenizer
        if tokenizer == "":
            raise ValueError("tokenizer is None and the model has no name; pass tokenizer")
    if isinstance(tokenizer, str | os.PathLike):
        tokenizer = load_tokenizer(tokenizer)
    check_tokenizer(tokenizer)
    _make_safe(tokenizer, model)
    return model.to(device).eval(), tokenizer


def check_device(device: str | torch.device) -> None:
    """Raises: ValueError on a device that is not here."""
    try:
        torch.empty(0, device=device)
    except Exception as error:
        raise ValueError(f"device={str(device)!r} is not here: {_reason(error)}") from error


def _check_dtype(dtype: torch.dtype | None) -> None:
    if dtype is not None and not isinstance(dtype, torch.dtype):
        kind = type(dtype).__name__
        raise TypeError(f"dtype is of type {kind}; pass one of torch, such as torch.bfloat16")
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype={dtype} cannot be that of weights; pass a float, or None")


def from_files(
    kind: Any, source: str | os.PathLike, dtype: torch.dtype, what: str = "model"
) -> PreTrainedModel:
    """A model from the hub or a folder, whole: what is in the files, all of it and nothing else.

    Args:
        kind: the library's class that chooses the class, e.g. AutoModelForCausalLM.
        source: a name on the hub, or the path of a folder.
        dtype: of the weights.
        what: what to call it where there is none.
    Raises: as `load`.
    """
    config = load_config(source, what)
    _check_files(source, config)
    try:
        model, report = kind.from_pretrained(
            source,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
        )
    except OSError as error:
        raise OSError(
            _told_of_gguf(source)
            or f"{str(source)!r} has no safetensors weights here; pickle files are not loaded.\n"
            "Connect to the hub once, or save the model again with save_pretrained."
        ) from error
    except Exception as error:
        raise _unreadable(what, source, error) from error
    _check_whole(source, model, report)
    return model


def load_config(source: str | os.PathLike, what: str = "model") -> PretrainedConfig:
    """The configuration of a model on the hub or in a folder.

    Raises: OSError, with what to do, if there is none, or it cannot be read; ValueError if it needs
        code of its own.
    """
    return _read(what, source, lambda: AutoConfig.from_pretrained(source, trust_remote_code=False))


def load_tokenizer(source: str | os.PathLike) -> PreTrainedTokenizerBase:
    """The tokenizer of a name on the hub or a folder, as it is stored.

    Raises: OSError, with what to do, if there is none, or it cannot be read.
    """
    tokenizer = _read(
        "tokenizer",
        source,
        lambda: AutoTokenizer.from_pretrained(source, trust_remote_code=False),
    )
    # from a folder without a tokenizer's files comes one without words
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        raise OSError(no_such("tokenizer", source))
    return tokenizer


def _read(what: str, source: str | os.PathLike, read: Callable[[], Any]) -> Any:
    check_path(source, "source")
    try:
        return read()
    except OSError as error:
        if os.path.exists(source):
            raise _unreadable(what, source, error) from error
        raise OSError(no_such(what, source)) from error
    except Exception as error:
        raise _unreadable(what, source, error) from error


def _unreadable(what: str, source: str | os.PathLike, error: Exception) -> Exception:
    if "trust_remote_code" in str(error):
        return ValueError(f"{what} {str(source)!r} needs code of its own, never run here: {error}")
    told = _told_of_gguf(source)
    if told is not None:
        return OSError(told)
    if os.path.isfile(source):
        return OSError(f"{str(source)!r} is a file; pass the folder of a saved {what}")
    return OSError(
        f"the {what} in {str(source)!r} cannot be read: {_reason(error)}\n"
        "A file in it is missing, damaged or of another kind; save or download it again."
    )


def _told_of_gguf(source: str | os.PathLike) -> str | None:
    """How to read a GGUF file, for which transformers has another call; None if none is there."""
    path = Path(source)
    found = [path] if path.suffix == ".gguf" and path.is_file() else sorted(path.glob("*.gguf"))
    if not found:
        return None
    folder, name = str(found[0].parent), found[0].name
    return (
        f"{str(found[0])!r} is a GGUF file, the format of llama.cpp with rounded weights; only"
        " safetensors are read here. Convert it once (pip install gguf):\n"
        f"  read = AutoModelForCausalLM.from_pretrained({folder!r}, gguf_file={name!r})\n"
        "  settings = read.config.to_dict(); settings.pop('quantization_config', None)\n"
        "  model = type(read)(type(read.config)(**settings))\n"
        "  model.load_state_dict(read.state_dict()); model.save_pretrained(new_folder)\n"
        f"  AutoTokenizer.from_pretrained({folder!r}, gguf_file={name!r})"
        ".save_pretrained(new_folder)\n"
        "and load new_folder."
    )


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


def _check_files(source: str | os.PathLike, config: PretrainedConfig) -> None:
    """Refuse a model whose files name other weights than safetensors in its own folder.

    Raises: OSError that names the folder and the file.
    """
    quiet = {
        "_raise_exceptions_for_gated_repo": False,
        "_raise_exceptions_for_missing_entries": False,
        "_raise_exceptions_for_connection_errors": False,
    }
    if os.path.isfile(os.path.join(source, "adapter_config.json")):
        raise OSError(
            f"{str(source)!r} holds an adapter; load its base model, then read the adapter with "
            "PeftModel.from_pretrained(model, folder)"
        )
    chosen = getattr(config, "transformers_weights", None)
    named = [] if chosen is None else [chosen]
    index = "model.safetensors.index.json" if chosen is None else chosen
    if str(index).endswith(".index.json") and "/" not in index and "\\" not in index:
        named = []
        path = cached_file(source, index, **quiet)
        if path is not None:
            named = _named_by(Path(path), source)
    for name in named:
        if not _is_weights(name):
            raise OSError(
                f"{str(source)!r} names {name!r} as a file of weights; only safetensors files in "
                "the model's own folder are read"
            )


def _named_by(index: Path, source: str | os.PathLike) -> list[Any]:
    """The files that an index names; one that is a link out of the folder is named by its aim."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except Exception as error:
        raise _unreadable("model", source, error) from error
    # the hub's cache keeps its files beside its folders, and links to them
    homes = {index.parent.resolve(), (index.parent.parent.parent / "blobs").resolve()}
    paths = [index.parent / name if _is_weights(name) else None for name in names]
    return [
        name if path is None or path.resolve().parent in homes else str(path.resolve().parent)
        for name, path in zip(names, paths, strict=True)
    ]


def _is_weights(name: Any) -> bool:
    return isinstance(name, str) and name.endswith(".safetensors") and not set(name) & set("/\\:")


def _check_whole(source: str | os.PathLike, model: PreTrainedModel, report: dict) -> None:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    buffers = [name for name, _ in model.named_buffers()]
    missing = sorted(set(report["missing_keys"]) & set(parameters))
    # old files hold buffers that are made anew today
    extra = sorted(
        key
        for key in report["unexpected_keys"]
        if not any(name == key or name.endswith(f".{key}") for name in buffers)
    )
    other = sorted(each[0] for each in report["mismatched_keys"])
    broken = [name for name, each in parameters.items() if not each.isfinite().all()]
    kind = type(model).__name__
    for names, what in (
        (missing, f"has no trained weights for {{}} of a {kind}"),
        (extra, f"has weights that a {kind} has no place for: {{}}"),
        (other, f"has weights of another shape than a {kind} of its config.json: {{}}"),
        (broken, "has weights that are not finite: {}"),
    ):
        if names:
            listed = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if names[3:] else "")
            raise ValueError(
                f"{str(source)!r} {what.format(listed)}; load it with the class that it was saved "
                "from, or save it again"
            )


def no_such(what: str, name: str | os.PathLike) -> str:
    """What to tell a reader whose model, tokenizer or classifier is neither here nor on the hub."""
    return (
        f"No {what} {str(name)!r}: no folder and no cache has it, and the hub gave none.\n"
        "Connect to the hub once, or set RLHF_SCALE=tiny, or pass the path of a saved model."
    )


def _make_safe(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    rows = len(model.get_input_embeddings().weight)
    _check_words(tokenizer, rows)
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
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id


def _check_words(tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {token.content for token in added.values() if token.special}
    words = {
        token: index
        for token, index in tokenizer.get_vocab().items()
        if index >= rows and token not in special
    }
    if words:
        token = min(words, key=words.get)
        raise ValueError(
            f"tokenizer: {len(words)} of its words, from {token!r} = {words[token]} on, have no "
            f"row in the model's embedding of {rows}; pass the tokenizer that belongs to the "
            "model, or call model.resize_token_embeddings"
        )


class Cut(str):
    """A text that was cut before it ended: what makes tokens of it puts no end behind it.

    Any other text counts as ended. What is made of a cut text by slicing, stripping or adding is a
    plain text again.
    """


def turn_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token with which the chat template ends the assistant's turn: of what it writes behind an
    answer, the first that is special or was added to the vocabulary. What it writes behind that,
    such as a line end, is no part of a response.

    Returns: None without a template, or if it writes no such token.
    """
    check_tokenizer(tokenizer)
    found = _turn(tokenizer)
    if found is None:
        return None
    marks = {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", {})}
    return next((one for one in found[1] if one in marks), None)


# --- texts and tokens ----------------------------------------------------------------------------


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    device: str | torch.device = "cpu",
) -> tuple[Tensor, Tensor]:
    """Tokens of a batch of prompts, padded on the left so that completions start in one column.

    No special token is added to a text, whatever the tokenizer's habit, and none is made of one
    that spells it. An empty text becomes one beginning-of-sequence token (end-of-sequence if there
    is no other), since a model needs something to continue. A conversation is written out by the
    tokenizer's chat template, up to where the assistant begins to speak; its special tokens are
    those of the template and no others.

    Args:
        tokenizer: as `load` returns it.
        prompts: B texts or conversations; see `conversations.chat`.
        device: where the tensors go.
    Returns: (tokens [B, P], mask [B, P]), int64; mask 1 on the prompt, by its length.
    Raises: ValueError on no prompts, one prompt in place of a list, an entry that is neither text
        nor conversation, a text that becomes a special token, an empty text without a token to
        stand for it, a conversation as in
        `conversations.conversation_problem`, without a template, or that the
        template refuses or that spells a special token; naming its index.
    """
    check_tokenizer(tokenizer)
    if not isinstance(prompts, str):
        check_list(prompts, "prompts")
    if isinstance(prompts, str) or len(prompts) == 0:
        raise ValueError("prompts must be a list of at least one text")
    rows = prompt_ids(tokenizer, prompts)
    width = max(map(len, rows))
    tokens = torch.full((len(rows), width), tokenizer.pad_token_id)
    mask = torch.zeros_like(tokens)
    for i, row in enumerate(rows):
        tokens[i, width - len(row) :] = torch.tensor(row)
        mask[i, width - len(row) :] = 1
    return tokens.to(device), mask.to(device)


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], name: str = "prompts"
) -> list[list[int]]:
    """Tokens of each prompt, by the rules of `encode_prompts`.

    Raises: ValueError as there; `name` is what its messages call the list.
    """
    check_tokenizer(tokenizer)
    if isinstance(prompts, str):
        raise ValueError(f"{name} is one text; put it into a list")
    check_list(prompts, name)
    if isinstance(next(iter(prompts), None), Mapping):
        raise ValueError(f"{name} is one conversation; put it into a list")
    found = {i: messages_of(one) for i, one in enumerate(prompts)}
    talks = {i: messages for i, messages in found.items() if messages is not None}
    rows = _text_ids(tokenizer, ["" if i in talks else p for i, p in enumerate(prompts)], name)
    if talks:
        where = [f"{name}[{i}]" for i in talks]
        for i, ids in zip(talks, _conversation_ids(tokenizer, talks.values(), where), strict=True):
            rows[i] = ids
    start = tokenizer.bos_token_id
    if start is None:
        start = tokenizer.eos_token_id
    for i, row in enumerate(rows):
        if not row:
            if start is None:
                raise ValueError(f"{name}[{i}] is empty and the tokenizer has no bos or eos token")
            row.append(start)
    return rows


def response_ids(
    tokenizer: PreTrainedTokenizerBase,
    responses: Sequence[str],
    name: str = "responses",
    prompts: Sequence[Prompt] | None = None,
) -> list[list[int]]:
    """Tokens of responses as they stand behind a prompt, with one end token where a text has ended:
    the end-of-text token, or behind a conversation the end of a turn in the chat template.

    Each is tokenised by itself: together with its prompt, letters on both sides of the border could
    merge into one token, and the prompt would no longer be the prompt that is sampled from. A space
    that the tokenizer puts in front of every text is taken away again. Behind a conversation, too,
    a response is what the model writes, letter by letter: a template that puts something between
    prompt and response (Llama 2's a space) expects it in the response, and a warning says so.

    Args:
        tokenizer: with an end-of-text token.
        responses: N texts; a `Cut` one gets no end. One that spells the end itself, as in many
            public sets, gets one and not two.
        name: what messages call the list.
        prompts: N prompts, of which only is asked which are conversations; None: all are texts.
    Returns: N lists; that of an empty `Cut` is empty.
    Raises: ValueError on a tokenizer without an end-of-text token, an entry that is no text or
        becomes another special token, or a tokenizer whose added space cannot be told from the
        text, naming the index.
    """
    if isinstance(responses, str):
        raise ValueError(f"{name} is one text; put it into a list")
    check_tokenizer(tokenizer)
    check_list(responses, name)
    ends = _ends_of(tokenizer, responses, prompts)
    texts = [
        text if isinstance(text, Cut) else _without_end(tokenizer, text, end)
        for text, end in zip(responses, ends, strict=True)
    ]
    found = _text_ids(tokenizer, texts, name)
    for i, (ids, text) in enumerate(zip(found, texts, strict=True)):
        if _has_spaces_of_its_own(tokenizer, ids, text):
            found[i] = _ids_behind(tokenizer, text, f"{name}[{i}]")
    rows = zip(found, responses, ends, strict=True)
    return [ids if isinstance(text, Cut) else [*ids, end] for ids, text, end in rows]


def decode(tokenizer: PreTrainedTokenizerBase, tokens: Tensor, mask: Tensor) -> list[str]:
    """Texts of the tokens that count. A text ends at the first token that is special, such as the
    end, or that the tokenizer has no word for: what comes behind it is no part of the text.

    Args:
        tokenizer: as `load` returns it.
        tokens: [N, C], e.g. completions.
        mask: [N, C]; 1 or True counts.
    Returns: N texts, exactly as the tokens spell them behind a prompt: spaces in front and before
        punctuation stay.
    Raises: ValueError on unequal shapes.
    """
    check_tokenizer(tokenizer)
    same_shape(tokens=tokens, mask=mask)
    integers(tokens=tokens)
    mask = zero_or_one(mask)
    if tokens.numel() and tokens.min() < 0:
        raise ValueError("tokens holds a number below 0; pass tokens of this tokenizer")
    special = _special_ids(tokenizer)
    rows = (row[counts].tolist() for row, counts in zip(tokens, mask, strict=True))
    return [_spelt_behind(tokenizer, _up_to_end(tokenizer, ids, special)) for ids in rows]


# --- between text and tokens ---------------------------------------------------------------------

# how vocabularies write the space in front of a word
_SPACES = ("▁", "Ġ")
# texts that stand in front of a response while it is tokenised, so that no space is put there
_ANCHORS = ("\n", ".", ":", "a", "e", "0", "1")


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    # a tokenizer of one's own need not know more than its end
    special = set(getattr(tokenizer, "all_special_ids", [tokenizer.eos_token_id]))
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special |= {index for index, token in added.items() if token.special}
    # what ends a turn is an end, even where it was added as a word
    return special | ({turn_end(tokenizer)} - {None})


def _conversation_ids(
    tokenizer: PreTrainedTokenizerBase, talks: Iterable[Conversation], where: Sequence[str]
) -> list[list[int]]:
    """Conversations as the template writes them. What spells a special token would become one
    among those of the template, so it is refused."""
    special = tokenizer.convert_ids_to_tokens(sorted(_special_ids(tokenizer)))
    texts, contents, places = [], [], []
    for messages, place in zip(talks, where, strict=True):
        problem = conversation_problem(messages)
        if problem:
            raise ValueError(f"{place} {problem}")
        for i, message in enumerate(messages):
            contents.append(message["content"])
            places.append(f"{place}[{i}]")
            spelt = next((one for one in special if one and one in contents[-1]), None)
            if spelt is not None:
                raise ValueError(
                    f"{places[-1]} spells the special token {spelt!r}, which a chat template alone"
                    " may write; take it out of the text"
                )
        texts.append(_rendered(tokenizer, messages, place, add_generation_prompt=True))
        if messages[-1]["content"].strip() not in texts[-1]:
            raise ValueError(
                f"{place}: the tokenizer's chat template leaves the content of the last message"
                " out; take one that is made for texts"
            )
    _text_ids(tokenizer, contents, places)
    gap, _ = _turn(tokenizer) or ("", [])
    if any(one and one in gap for one in special):
        raise ValueError(
            f"tokenizer: its chat template begins an answer with {gap!r}, but does not write that"
            " when asked for one (add_generation_prompt); mend the template"
        )
    return tokenizer(texts, add_special_tokens=False, split_special_tokens=False)["input_ids"]


def _rendered(
    tokenizer: PreTrainedTokenizerBase, messages: Conversation, where: str, **how: bool
) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"{where} is a conversation and the tokenizer has no chat template; take a model that"
            " was trained on conversations, set tokenizer.chat_template, or pass texts"
        )
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **how)
    except Exception as error:
        raise ValueError(
            f"{where}: the tokenizer's chat template does not take it: {_reason(error)}"
        ) from error


# letters that no template writes by itself
_PROBE = "qxzvjk"


def _turn(tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[int]] | None:
    """What a template puts between a prompt and the response, and the tokens behind the response;
    None without a template, or if it writes no response."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    asked = [{"role": "user", "content": "a"}]
    answered = [*asked, {"role": "assistant", "content": _PROBE}]
    try:
        prompt = _rendered(tokenizer, asked, "", add_generation_prompt=True)
        before, found, after = _rendered(tokenizer, answered, "").rpartition(_PROBE)
    except ValueError:
        return None
    if not found:
        return None
    gap = before.removeprefix(prompt) if before.startswith(prompt) else ""
    return gap, tokenizer(after, add_special_tokens=False)["input_ids"]


def _ends_of(
    tokenizer: PreTrainedTokenizerBase, responses: Sequence[str], prompts: Sequence[Prompt] | None
) -> list[int]:
    """The end token of each response."""
    end = tokenizer.eos_token_id
    if end is None:
        raise ValueError("tokenizer has no end-of-text token, so a response could never end")
    talks = [messages_of(prompt) is not None for prompt in (() if prompts is None else prompts)]
    if not any(talks):
        return [end] * len(responses)
    gap, _ = _turn(tokenizer) or ("", [])
    marks = gap.split()  # of thoughts, which need not be empty
    for talk, text in zip(talks, responses, strict=True):
        if not talk or not isinstance(text, str) or text.startswith(gap):
            continue
        if not marks or marks[0] not in text:
            warnings.warn(
                f"the tokenizer's chat template writes {gap!r} between a prompt and its response,"
                " and a response does not begin so; put it there, for the model expects it",
                stacklevel=4,
            )
            break
    turn = turn_end(tokenizer)
    return [turn if talk and turn is not None else end for talk in talks]


def _text_ids(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], name: str | Sequence[str]
) -> list[list[int]]:
    """Tokens of each text alone; what spells a special token stays letters. Messages call text i
    name[i], or by its own name."""
    if not texts:
        return []
    names = [f"{name}[{i}]" for i in range(len(texts))] if isinstance(name, str) else name
    for where, text in zip(names, texts, strict=True):
        if not isinstance(text, str):
            raise ValueError(f"{where} is a {type(text).__name__}; pass a text")
    # tokenizers take a plain text faster and without a doubt
    plain = [str(text) for text in texts]
    rows = tokenizer(plain, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    # an unknown letter may be read as such, unless that is the end too
    unknown = getattr(tokenizer, "unk_token_id", None)
    forbidden = (_special_ids(tokenizer) - {unknown}) | {tokenizer.eos_token_id}
    for i, row in enumerate(rows):
        if not forbidden.isdisjoint(row):
            found = next(index for index in row if index in forbidden)
            token = tokenizer.convert_ids_to_tokens(found)
            raise ValueError(
                f"{names[i]} holds what this tokenizer reads as its special token {token!r}; take"
                " it out of the text"
            )
    return rows


def _without_end(tokenizer: PreTrainedTokenizerBase, text: str, end: int) -> str:
    ends = {getattr(tokenizer, "eos_token", None)} - {None, ""}
    if end != tokenizer.eos_token_id:
        ends.add(tokenizer.convert_ids_to_tokens(end))
    while isinstance(text, str) and text.rstrip().endswith(tuple(ends)):
        text = text.rstrip()
        text = text.removesuffix(next(one for one in ends if text.endswith(one)))
    return text


def _has_spaces_of_its_own(tokenizer: PreTrainedTokenizerBase, ids: list[int], text: str) -> bool:
    """Whether the tokens of a text begin with more or fewer spaces than the text, in a vocabulary
    that marks them."""
    if not ids or not hasattr(tokenizer, "convert_ids_to_tokens"):
        return False
    if not tokenizer.convert_ids_to_tokens(ids[:1])[0].startswith(_SPACES):
        return False
    return _spaces_in_front(_spelt_behind(tokenizer, ids)) != _spaces_in_front(text)


def _spaces_in_front(text: str) -> int:
    return len(text) - len(text.lstrip(" "))


def _ids_behind(tokenizer: PreTrainedTokenizerBase, text: str, where: str) -> list[int]:
    """Tokens of a text as it stands behind another, from a tokenizer that would begin it with a
    space: something is put in front, and its tokens are taken away."""
    for anchor in _ANCHORS:
        alone, both = _text_ids(tokenizer, [anchor, anchor + text], where)
        found = both[len(alone) :]
        if tokenizer.unk_token_id in alone or both[: len(alone)] != alone:
            continue
        if not _has_spaces_of_its_own(tokenizer, found, text):
            return found
    raise ValueError(
        f"{where}: this tokenizer puts a space in front of a text, which cannot be told from the"
        " text here; take a tokenizer of bytes, or leave the text out"
    )


def _up_to_end(tokenizer: PreTrainedTokenizerBase, ids: list[int], special: set[int]) -> list[int]:
    words = ids
    if hasattr(tokenizer, "convert_ids_to_tokens"):
        words = tokenizer.convert_ids_to_tokens(ids)
    pairs = enumerate(zip(ids, words, strict=True))
    end = next((i for i, (one, word) in pairs if one in special or word is None), len(ids))
    return ids[:end]


def _spelt_behind(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """What tokens spell behind others. Alone, some decoders drop the space of the first word, and
    it belongs to the text; so a word is put in front, and taken away."""
    front = []
    if ids and hasattr(tokenizer, "convert_ids_to_tokens"):
        # only in a vocabulary that marks where words begin or end: in others no token has a space
        names = tokenizer.convert_ids_to_tokens(ids)
        ends = ([one] for one, name in zip(ids, names, strict=True) if name.endswith("</w>"))
        front = ids[:1] if names[0].startswith("▁") else next(ends, [])
    # no special token is among the ids, so none is shown
    plain = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    begin = tokenizer.decode(front, **plain) if front else ""
    return tokenizer.decode([*front, *ids], **plain)[len(begin) :]


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
    check_model(model)
    in_range(rank, "rank", 1)
    in_range(alpha, "alpha", 0.0, open_low=True)
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError(
            "model carries an adapter already; train that one, or call merge_and_unload() on it"
            " first"
        )
    if isinstance(target_modules, str) and target_modules != "all-linear":
        raise ValueError(f"target_modules={target_modules!r} is one text; pass a list of names")
    if target_modules is not None and not isinstance(target_modules, set | str):
        check_texts(target_modules=target_modules)
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
    its adapter switched off it is the model that it started from. If anything is trained beside
    the adapter (biases, an unfrozen layer), switching off would not bring that back, so it is a
    copy again. Inside the block the model is in eval mode and records no gradients; the policy's
    own mode is restored afterwards.

    Args:
        policy: the model that will be trained, before its first update.
    Returns: a function; each call gives a context manager that yields the reference model.
    Raises: ValueError if the policy has an adapter that was trained before: switched off, it would
        give the base model and not the policy that this run starts from.
    Source: Ziegler et al. 2019, "Fine-Tuning Language Models from Human Preferences", section 2.
    """
    check_model(policy, "policy")
    moving = [name for name, p in policy.named_parameters() if p.requires_grad]
    if not isinstance(policy, PeftModel) or not all(map(_of_adapter, moving)):
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
    """16 letters that tell one reference from another: of all weights that change what the model
    says. Those of an adapter that is fresh or switched off do not."""
    idle = adapter_is_idle(policy)
    found = hashlib.sha256()
    for name, parameter in policy.named_parameters():
        if not (idle and _of_adapter(name)):
            found.update(name.encode())
            flat = parameter.detach().cpu().contiguous().view(-1)
            found.update(flat.view(torch.uint8).numpy())
    return found.hexdigest()[:16]


def adapter_is_idle(policy: nn.Module) -> bool:
    """Whether the policy says what it would say without its adapter: it is fresh or off."""
    check_model(policy, "policy")
    layers = [module for module in policy.modules() if isinstance(module, BaseTunerLayer)]
    off = bool(layers) and all(layer.disable_adapters for layer in layers)
    return off or (isinstance(policy, PeftModel) and _adapter_is_no_op(policy))


def _of_adapter(name: str) -> bool:
    """Whether a parameter of this name belongs to an adapter, so that it is off when that is."""
    prefixes = ("lora_", "modules_to_save", "trainable_tokens_")
    return any(part.startswith(prefixes) for part in name.split("."))


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
        check_model(model)
        true_or_false(share_trunk, "share_trunk")
        base = language_model(model)
        trunk = base.base_model
        self.trunk = trunk if share_trunk else copy.deepcopy(trunk)
        rows = base.get_output_embeddings().weight
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
        Raises: ValueError as `completion_log_probs`.
        """
        mask = checked_mask(self.trunk, tokens, attention_mask, completion_length)
        check_groups(tokens, mask, completion_length, samples_per_prompt)
        # the state before token t has seen tokens up to t − 1, so the last token is not needed
        hidden = completion_states(self.trunk, tokens, mask, completion_length, samples_per_prompt)
        values = self.head(hidden).squeeze(-1)
        return values.masked_fill(mask[:, -completion_length:] == 0, 0.0)
