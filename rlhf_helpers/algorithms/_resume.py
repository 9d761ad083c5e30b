"""Which run this is, and how it goes on: the identity of a run for all loops, and the state that a
checkpoint keeps. Names without an underscore are for the algorithms alone."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple, get_args, get_type_hints

import torch
from torch import Tensor, nn

from rlhf_helpers import checkpoint, models

# of a model's and an adapter's settings, those that say where it came from or how it is stored
_OF_NO_EFFECT = (
    "transformers_version",
    "peft_version",
    "architectures",
    "dtype",
    "torch_dtype",
    "use_cache",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
)


# --- which run this is ---------------------------------------------------------------------------


def digest(value: Any) -> str:
    """A short name of texts, numbers, and lists and dicts of them: the same values, the same name,
    whether they lie in a list, an array, a tensor or a column of a table.

    Raises: ValueError on anything else.
    """
    return hashlib.sha256(json.dumps(value, default=_as_json).encode()).hexdigest()[:16]


def _as_json(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    if hasattr(value, "isoformat"):
        return value.isoformat()
    if isinstance(value, bytes):
        return value.hex()
    raise ValueError(
        f"a {type(value).__name__} cannot tell one run from another, as checkpoints need it; make"
        " it a text, a number, or a list or dict of those"
    )


def identity_of(
    config: Any,
    policy: nn.Module,
    tokenizer: Any,
    reward: Callable | None,
    data: Mapping[str, Any],
    value_model: nn.Module | None = None,
) -> dict[str, Any]:
    """What makes a run this run and no other: all that `train` is given and that changes what is
    computed. Two runs differ where this does.

    Args:
        config: a dataclass of settings.
        policy: as it is at the start.
        tokenizer, value_model: as `train` gets them.
        reward: known by its name; None where nothing is scored.
        data: prompts and columns, or examples, by name.
    Raises: ValueError as `digest`, naming the entry of `data`.
    """
    found: dict[str, Any] = {"config": asdict(config)}
    for name, values in data.items():
        try:
            found[name] = digest(values)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{name}: {error}") from error
    return found | {
        "reward": None if reward is None else name_of(reward),
        "model": model_settings(policy),
        "value model": None if value_model is None else _value_model(value_model),
        "tokenizer": _tokenizer(tokenizer),
        "start": models.weights_digest(policy),
    }


def name_of(reward: Callable) -> str:
    """The name of a reward function, that of its module included."""
    if isinstance(reward, functools.partial):
        named = [f"{key}={_short(value)}" for key, value in reward.keywords.items()]
        return f"{name_of(reward.func)}({', '.join([*map(_short, reward.args), *named])})"
    named = reward if hasattr(reward, "__qualname__") else type(reward)
    return f"{named.__module__}.{named.__qualname__}"


def _short(value: Any) -> str:
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value)
    try:
        return digest(value)
    except (ValueError, TypeError):
        return type(value).__name__


def model_settings(model: nn.Module) -> dict[str, Any]:
    """What a model computes besides its weights: the class, its settings, the precision, and the
    settings of adapters."""
    config = getattr(model, "config", None)
    adapters = getattr(model, "peft_config", {})
    scales = {
        str(scale)
        for module in model.modules()
        if isinstance(getattr(module, "scaling", None), dict)
        for scale in module.scaling.values()
    }
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return {
        "class": type(base).__name__,
        "precision": sorted({str(parameter.dtype) for parameter in model.parameters()}),
        "config": _plain(config.to_dict()) if hasattr(config, "to_dict") else {},
        "adapter": {name: _plain(one.to_dict()) for name, one in adapters.items()},
        "scale of the adapter": sorted(scales),
    }


def model_digest(model: nn.Module) -> str:
    """A short name of what a model says: its weights and settings, those of an adapter only if it
    has an effect."""
    settings = model_settings(model)
    if models.adapter_is_idle(model):
        settings = {name: x for name, x in settings.items() if "adapter" not in name}
    return digest([models.weights_digest(model), settings])


def _plain(value: Any) -> Any:
    """Settings in types that a checkpoint takes, without those that change nothing."""
    if isinstance(value, Mapping):
        return {
            str(key): _plain(inner)
            for key, inner in value.items()
            if not str(key).startswith("_") and key not in _OF_NO_EFFECT
        }
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    return value if type(value) in (bool, int, float, str, type(None)) else str(value)


def _value_model(model: nn.Module) -> dict[str, Any]:
    # an adapter's random half comes from the checkpoint
    weights = {n: w for n, w in model.state_dict().items() if "lora_" not in n}
    named = [
        [name, list(w.shape), hashlib.sha256(_bytes(w)).hexdigest()] for name, w in weights.items()
    ]
    trunk = getattr(model, "trunk", model)
    return {"class": type(model).__name__, "weights": digest(named)} | {
        "trunk": model_settings(trunk)
    }


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def _tokenizer(tokenizer: Any) -> dict[str, Any]:
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id")
    found = {name: getattr(tokenizer, name, None) for name in names}
    found["class"] = type(tokenizer).__name__
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if hasattr(backend, "to_str"):
        rules = json.loads(backend.to_str())
        # these change with every call
        found["rules"] = digest({k: rules[k] for k in rules if k not in ("padding", "truncation")})
    elif hasattr(tokenizer, "get_vocab"):
        found["rules"] = digest(sorted(tokenizer.get_vocab().items()))
    if getattr(tokenizer, "chat_template", None):
        found["chat template"] = digest(tokenizer.chat_template)
    return found


# --- a run that goes on --------------------------------------------------------------------------


class Kept(NamedTuple):
    """What a loop keeps of itself, and where; nothing without a folder."""

    folder: str | os.PathLike | None
    save_every: int  # steps from one checkpoint to the next
    identity: dict[str, Any]
    found: checkpoint.Checkpoint | None  # what the run goes on from


@dataclass
class Progress:
    """What changes from one step to the next beside the weights, in a loop that needs no more."""

    optimizer: torch.optim.Optimizer
    sampling: torch.Generator | None = None  # on the model's device
    order: torch.Generator | None = None
    history: list = field(default_factory=list)


def look_up(
    folder: str | os.PathLike | None,
    save_every: int,
    config: Any,
    model: nn.Module,
    tokenizer: Any,
    data: Mapping[str, Any],
    reward: Callable | None = None,
    value_model: nn.Module | None = None,
    name: str = "policy",
) -> Kept:
    """Which run this is, and what it goes on from; to be called before anything is made of the
    model.

    Args:
        folder, save_every: as `train` gets them.
        config, model, tokenizer, data, reward, value_model: as in `identity_of`.
        name: what messages call the model.
    Raises: ValueError as `identity_of` and `look_for`, with a folder alone.
    """
    if folder is None:
        return Kept(None, save_every, {}, None)
    identity = identity_of(config, model, tokenizer, reward, data, value_model)
    return Kept(folder, save_every, identity, look_for(folder, identity, name))


def go_on(
    kept: Kept, run: Any, weights: Any, metrics: type, **further: Any
) -> tuple[Kept, dict[str, Any]]:
    """Put a run where its checkpoint was, if there is one, and note what it started with.

    Args: run, weights, metrics, further: as in `restore`.
    Returns: `kept` without the checkpoint, which takes memory; and `further` as it is now.
    """
    if kept.found is not None:
        restore(run, weights, kept.found, metrics, **further)
        further = {name: kept.found.state[name] for name in further}
    if kept.folder is not None:
        checkpoint.begin(kept.folder, kept.identity["start"])
    return kept._replace(found=None), further


def keep(kept: Kept, step: int, last: int, state: Callable[[], dict[str, Any]]) -> None:
    """Write a checkpoint if one is due after this step, of which there are `last`."""
    if kept.folder is not None and (step % kept.save_every == 0 or step == last):
        checkpoint.save(kept.folder, step, state(), kept.identity)


def look_for(
    folder: str | os.PathLike, identity: dict[str, Any], name: str = "policy"
) -> checkpoint.Checkpoint | None:
    """The checkpoint that a run goes on from, or None at its beginning.

    Raises: ValueError as `checkpoint.load`; or if the model, called `name`, is not the one that
        the run in this folder was started with, as after an interruption, when it is half trained.
    """
    anew = (
        f"the weights of the {name} are not those that the run in {folder} was started with; if"
        f" they were trained in the meantime, load the {name} anew, as it was at the start, and run"
        " this again: it then goes on"
    )
    try:
        found = checkpoint.load(folder, identity)
    except checkpoint.AnotherRun as error:
        if error.names == ["start"]:
            raise ValueError(f"{anew}. For another run pass another folder") from error
        raise ValueError(f"{error}{'. And ' + anew if 'start' in error.names else ''}") from error
    if found is None and checkpoint.started(folder) not in (None, identity["start"]):
        raise ValueError(
            f"{anew} from the beginning, since it was stopped before its first checkpoint. For"
            " another run pass another folder"
        )
    return found


def state_of(run: Any, weights: Any, **further: Any) -> dict[str, Any]:
    """What a checkpoint keeps of a run: trained weights, optimizer, generators and history.

    Args:
        run: with optimizer, sampling, order and history, as `Progress`.
        weights: what is trained, by name, nested as you like.
        further: what else the algorithm needs to go on.
    """
    drawn = {"sampling": run.sampling, "order": run.order}
    return {
        "weights": weights,
        "optimizer": run.optimizer.state_dict(),
        **{name: luck.get_state() for name, luck in drawn.items() if luck is not None},
        "metrics": list(run.history[0]._fields) if run.history else [],
        "history": [_row(metrics) for metrics in run.history],
    } | further


def _row(metrics: Any) -> list:
    """Metrics as a list; those within it, as of held-out pairs, as a tuple."""
    return [tuple(value) if isinstance(value, tuple) else value for value in metrics]


@torch.no_grad()
def restore(
    run: Any, weights: Any, found: checkpoint.Checkpoint, metrics: type, **further: Any
) -> None:
    """Put back what `state_of` kept, apart from `further`; metrics is the type of the history.

    Args: run, weights, further: as in `state_of`, of the run before its first iteration. Metrics
        within metrics have the type that the hint of their field names.
    Raises: ValueError if the state is laid out otherwise, as that of another version of this
        package may be. Nothing is put back then.
    """
    here = state_of(run, weights, **further) | {"metrics": list(metrics._fields)}
    problem = _layout_problem(found.state, here, run.optimizer, metrics)
    if problem:
        raise ValueError(
            f"checkpoint of step {found.step}: {problem}, so it was written by another version of"
            " this package or for another device; go on with that one, or pass another folder"
        )
    history = [_metrics(metrics, row) for row in found.state["history"]]
    for name in ("sampling", "order"):
        if getattr(run, name) is not None:
            getattr(run, name).set_state(found.state[name])
    run.optimizer.load_state_dict(found.state["optimizer"])
    _copy(weights, found.state["weights"])
    run.history = history


def _layout_problem(
    state: Any, here: dict[str, Any], optimizer: torch.optim.Optimizer, metrics: type
) -> str | None:
    """In what a stored state is not made as that of this run, in words; None if in nothing."""
    if not isinstance(state, dict):
        return f"the state is a {type(state).__name__}"
    if state.get("metrics") != here["metrics"]:
        return f"its metrics are {state.get('metrics')}, and here they are {here['metrics']}"
    apart = ("optimizer", "history")
    there = {name: None if name in apart else value for name, value in state.items()}
    return (
        _difference(there, here | dict.fromkeys(apart), "state")
        or _history_problem(state["history"], _inner(metrics))
        or _optimizer_problem(state["optimizer"], here["optimizer"], optimizer)
    )


def _difference(there: Any, here: Any, where: str) -> str | None:
    """The first place at which two values have other names, types or shapes."""
    kinds = (bool, (int, float), str, Tensor, dict, list, type(None))
    if not any(isinstance(there, kind) and isinstance(here, kind) for kind in kinds):
        return f"{where} is a {type(there).__name__}, not a {type(here).__name__}"
    if isinstance(here, Tensor) and (there.shape, there.dtype) != (here.shape, here.dtype):
        return f"{where} is {there.dtype} {[*there.shape]}, not {here.dtype} {[*here.shape]}"
    # an empty dict fills in the course of a run
    for name in [*here, *there] if isinstance(here, dict) and here else ():
        if name not in there or name not in here:
            return f"{where}[{name!r}] is {'missing' if name in here else 'unknown here'}"
        problem = _difference(there[name], here[name], f"{where}[{name!r}]")
        if problem:
            return problem
    return None


def _metrics(metrics: type, row: list) -> Any:
    """What `_row` made a list of."""
    kinds = zip(row, _inner(metrics), strict=True)
    return metrics(*(kind(*one) if isinstance(one, tuple) else one for one, kind in kinds))


def _inner(metrics: type) -> list[type | None]:
    """Of each field of metrics the type of the metrics within it, or None if it is a number."""
    hints = get_type_hints(metrics)
    choices = [(hints[name], *get_args(hints[name])) for name in metrics._fields]
    return [next((t for t in some if hasattr(t, "_fields")), None) for some in choices]


def _history_problem(history: Any, inner: list[type | None]) -> str | None:
    if not isinstance(history, list):
        return f"state['history'] is a {type(history).__name__}"
    for index, row in enumerate(history):
        where = f"state['history'][{index}]"
        if not isinstance(row, list) or len(row) != len(inner):
            return f"{where} is no list of {len(inner)} numbers"
        for place, (value, kind) in enumerate(zip(row, inner, strict=True)):
            width = 0 if kind is None else len(kind._fields)
            if isinstance(value, tuple) and len(value) != width:
                return f"{where}[{place}] is a tuple of {len(value)}, not of {width}"
            if kind is not None and not isinstance(value, tuple | type(None)):
                return f"{where}[{place}] is a {type(value).__name__}, not a tuple of {width}"
    return None


def _optimizer_problem(there: Any, here: dict, optimizer: torch.optim.Optimizer) -> str | None:
    where = "state['optimizer']"
    if not isinstance(there, dict) or set(there) != set(here):
        return f"{where} has not the entries {sorted(here)}"
    groups, moments = there["param_groups"], there["state"]
    if not isinstance(groups, list) or len(groups) != len(here["param_groups"]):
        return f"{where}['param_groups'] is no list of {len(here['param_groups'])}"
    for index, (group, wanted) in enumerate(zip(groups, here["param_groups"], strict=True)):
        if not isinstance(group, dict) or not set(wanted) <= set(group):
            return f"{where}['param_groups'][{index}] has not the entries {sorted(wanted)}"
        if group["params"] != wanted["params"]:
            return f"{where}['param_groups'][{index}]['params'] are others"
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if not isinstance(moments, dict) or not set(moments) <= set(range(len(parameters))):
        return f"{where}['state'] is of other parameters"
    for index, found in moments.items():
        like = parameters[index].detach()
        wanted = {"step": torch.zeros(()), "exp_avg": like, "exp_avg_sq": like}
        problem = _difference(found, wanted, f"{where}['state'][{index}]")
        if problem:
            return problem
    return None


def _copy(weights: Any, stored: Any) -> None:
    for name, value in weights.items():
        if isinstance(value, Tensor):
            value.copy_(stored[name])
        else:
            _copy(value, stored[name])
