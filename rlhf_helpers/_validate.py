"""Argument checks shared by the package: every message names the argument and the fix."""

from __future__ import annotations

import math
import numbers
import os
import unicodedata
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

# Logits up to 1e18 can be divided by it in float32.
_COLDEST = 1e-20


def tensors(**given: Tensor) -> None:
    """Raise TypeError unless all given values are tensors of real numbers."""
    for name, value in given.items():
        check_tensor(value, name)


def check_tensor(value: Tensor, name: str) -> None:
    """Raise TypeError unless the value is a tensor of real numbers."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{name} is of type {type(value).__name__}; pass a tensor, e.g. torch.tensor(…)"
        )
    if value.is_complex():
        raise TypeError(f"{name} holds complex numbers; pass real ones")


def floats(**given: Tensor) -> None:
    """Raise TypeError unless all given values are tensors, ValueError unless they hold floats."""
    for name, value in given.items():
        check_tensor(value, name)
        if not value.is_floating_point():
            raise ValueError(f"{name} has dtype {value.dtype}; pass floats, e.g. {name}.float()")


def integers(**given: Tensor) -> None:
    """Raise TypeError unless all given values are tensors, ValueError unless they hold whole
    numbers."""
    for name, value in given.items():
        check_tensor(value, name)
        if value.is_floating_point() or value.dtype == torch.bool:
            raise ValueError(f"{name} has dtype {value.dtype}; pass integers, e.g. {name}.long()")


def same_shape(**given: Tensor | None) -> None:
    """Raise ValueError unless all given tensors have one shape, TypeError unless they are tensors.
    From the third on, None is skipped: it takes two to differ."""
    there = {n: t for i, (n, t) in enumerate(given.items()) if i < 2 or t is not None}
    tensors(**there)
    shapes = {name: tuple(t.shape) for name, t in there.items()}
    if len(set(shapes.values())) > 1:
        listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"shapes differ: {listed}; pass tensors of one shape")


def one_of(value: str, known: Iterable[str], name: str) -> None:
    """Raise ValueError unless `value` is among the `known` names."""
    known = tuple(known)
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{name}={value!r} is unknown; use one of {', '.join(map(repr, known))}")


def true_or_false(value: bool, name: str) -> None:
    """Raise TypeError unless `value` is True or False (NumPy's will do)."""
    if not isinstance(_plain(value), bool):
        raise TypeError(f"{name}={value!r} is of type {type(value).__name__}; pass True or False")


def in_range(
    value: float,
    name: str,
    low: float,
    high: float = math.inf,
    *,
    open_low: bool = False,
    infinite: bool = False,
) -> None:
    """Raise ValueError unless low ≤ value ≤ high (low < value if `open_low`), TypeError if it is no
    number.

    NaN is refused, and infinity unless `infinite`. A `low` that is written as a whole number (1,
    not 1.0) asks for a whole number. NumPy's and torch's scalars are numbers; True, a text and
    None are none.
    """
    plain = _plain(value)
    if isinstance(plain, bool) or not isinstance(plain, numbers.Real):
        raise TypeError(f"{name}={value!r} is of type {type(value).__name__}; pass a number")
    whole = isinstance(low, int)
    if whole and not isinstance(plain, numbers.Integral):
        raise ValueError(f"{name}={plain} is no whole number; pass one, e.g. {low}")
    within = (plain > low if open_low else plain >= low) and plain <= high
    if not within or (math.isinf(plain) and not infinite):
        left = "(" if open_low or low == -math.inf else "["
        right = ")" if high == math.inf and not infinite else "]"
        raise ValueError(f"{name}={plain} must lie in {left}{low}, {high}{right}")


def has(value: object, name: str, wanted: str, *attributes: str) -> None:
    """Raise TypeError unless the value has all these attributes of what is `wanted`; what type it
    is of does not matter, so that one's own tokenizers, bandits and wrapped models pass."""
    missing = next((one for one in attributes if not hasattr(value, one)), None)
    if missing is not None:
        raise TypeError(f"{name} ({type(value).__name__}) has no {missing!r}; pass {wanted}")


def check_text(value: str, name: str) -> None:
    """Raise TypeError unless the value is a text."""
    if not isinstance(value, str):
        raise TypeError(f"{name} is of type {type(value).__name__}; pass a text")


def check_texts(**given: Sequence[str]) -> None:
    """Raise TypeError unless all given values are lists of texts (arrays and Series will do),
    ValueError unless those are equally many."""
    for name, values in given.items():
        if isinstance(values, str | Mapping) or not hasattr(values, "__len__"):
            raise TypeError(f"{name} is of type {type(values).__name__}; pass a list of texts")
        for index, one in enumerate(values):
            check_text(one, f"{name}[{index}]")
    if len({len(values) for values in given.values()}) > 1:
        sizes = ", ".join(f"{name} {len(values)}" for name, values in given.items())
        raise ValueError(f"lengths differ: {sizes}; pass one of each")


def check_list(values: Sequence, name: str) -> None:
    """Raise TypeError unless the value is a list, or an array or a Series; a text is none."""
    sized = hasattr(values, "__len__") and hasattr(values, "__iter__")
    if isinstance(values, str | Mapping) or not sized or getattr(values, "ndim", 1) == 0:
        raise TypeError(f"{name} is of type {type(values).__name__}; pass a list")


def check_some(values: Sequence, name: str, wanted: str) -> None:
    """Raise ValueError on a list without an entry of what is `wanted`."""
    if len(values) == 0:
        raise ValueError(f"{name} is empty; pass at least one {wanted}")


def check_each(values: Sequence, name: str, wanted: str, *attributes: str) -> None:
    """Raise TypeError unless the value is a list, each entry of which has these attributes of what
    is `wanted`."""
    check_list(values, name)
    for index, one in enumerate(values):
        has(one, f"{name}[{index}]", wanted, *attributes)


def check_function(value: Callable, name: str, wanted: str) -> None:
    """Raise TypeError unless the value, which should be what is `wanted`, can be called."""
    if not callable(value):
        raise TypeError(f"{name} is of type {type(value).__name__}; pass {wanted}")


def check_path(value: str | os.PathLike, name: str) -> None:
    """Raise TypeError unless the value is a text or a path, ValueError if it is empty; open() takes
    0 and True for files that are open already."""
    if not isinstance(value, str | os.PathLike):
        raise TypeError(f"{name} is of type {type(value).__name__}; pass a text or a Path")
    if not os.fspath(value):
        raise ValueError(f"{name} is an empty text; pass a name")


def check_folder(value: str | os.PathLike, name: str = "folder") -> None:
    """Raise TypeError unless the value is a text or a path, ValueError if it is empty or names a
    file."""
    check_path(value, name)
    if os.path.isfile(value):
        raise ValueError(f"{name}={os.fspath(value)!r} is a file; pass the name of a folder")


def check_model(value: object, name: str = "model") -> None:
    """Raise TypeError unless the value has weights."""
    has(value, name, "a model, as models.load returns it", "parameters", "forward")


def check_tokenizer(value: object, name: str = "tokenizer") -> None:
    """Raise TypeError unless the value has the two tokens that every batch needs."""
    has(value, name, "a tokenizer, as models.load returns it", "eos_token_id", "pad_token_id")


def check_seed(value: int, name: str = "seed") -> None:
    """Raise TypeError or ValueError unless torch takes the value as a seed."""
    in_range(value, name, -(2**63), 2**64 - 1)


def check_generator(value: torch.Generator | None, device: torch.device | str = "cpu") -> None:
    """Raise TypeError unless the value is a generator of torch (or None, torch's global one),
    ValueError unless it can draw on this device."""
    if value is None:
        return
    if not isinstance(value, torch.Generator):
        raise TypeError(f"generator is of type {type(value).__name__}; pass a torch.Generator()")
    if value.device.type != torch.device(device).type:
        raise ValueError(
            f"generator is on {value.device}, the numbers on {device}; make it with "
            f"torch.Generator({str(device)!r})"
        )


def check_temperature(value: float) -> None:
    """Raise ValueError unless logits can be divided by this temperature."""
    in_range(value, "temperature", 0.0, open_low=True)
    if value < _COLDEST:
        raise ValueError(
            f"temperature={value} is so small that logits overflow when they are divided by it; "
            f"pass at least {_COLDEST:g}, or take the likeliest token (top_k=1)"
        )


def _plain(value: object) -> object:
    """A scalar of NumPy or torch as Python's own; NumPy's arrays (they have no hash) stay."""
    scalar = getattr(value, "ndim", None) == 0 and isinstance(value, Hashable)
    return value.item() if scalar else value


def as_numbers(values: Sequence, name: str) -> Tensor:
    """Return a list, an array or a tensor of numbers as float64 on the CPU, with NaN for None.

    Raise TypeError if it holds anything else, texts of digits too, ValueError if its rows are not
    equally long.
    """
    if isinstance(values, Tensor):
        check_tensor(values, name)
        return values.detach().cpu().double()
    values = values.__array__() if hasattr(values, "__array__") else values  # of a table, too
    kind = getattr(getattr(values, "dtype", None), "kind", "O")
    # a copy, since torch takes no strides below 0
    nested = values.copy() if kind in "biuf" else _nested_floats(values, name)
    try:
        return torch.tensor(nested, dtype=torch.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{name} is no array ({error}); pass numbers in rows of one length"
        ) from error


def _nested_floats(value: object, name: str) -> object:
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, list | tuple | range):
        return [_nested_floats(one, name) for one in value]
    if value is not None and not hasattr(value, "__float__"):
        raise TypeError(
            f"{name} holds something other than numbers; pass a list, an array or a tensor of them"
        )
    return math.nan if value is None else float(value)


def token_ids(values: int | Sequence[int], name: str) -> list[int]:
    """Return one token or several as a list; raise TypeError or ValueError on what is none."""
    plain = values.tolist() if hasattr(values, "tolist") else values
    if isinstance(plain, numbers.Number):
        plain = [plain]
    check_list(plain, name)
    for one in plain:
        in_range(one, name, 0)
    return [int(one) for one in plain]


def finite(values: Tensor, name: str, mask: Tensor | None = None) -> None:
    """Raise ValueError if a counted entry of `values` is NaN or infinite, saying where the first
    one is; TypeError unless it is a tensor."""
    check_tensor(values, name)
    bad = ~torch.isfinite(values.detach())
    if mask is not None:
        bad = bad & mask
    if bad.any():
        where = tuple(bad.nonzero()[0].tolist())
        raise ValueError(f"{name}{list(where)} is {values[where].item()}; it must be finite")


def zero_or_one(mask: Tensor, name: str = "mask") -> Tensor:
    """Return `mask` as booleans; raise ValueError unless every entry is 0 or 1.

    An additive mask (0 counts, −inf does not) would otherwise be taken inverted, and other numbers
    would count as yes in one place and as a factor in another.
    """
    tensors(**{name: mask})
    if mask.dtype == torch.bool:
        return mask
    odd = (mask != 0) & (mask != 1)
    if odd.any():
        where = tuple(odd.nonzero()[0].tolist())
        raise ValueError(
            f"{name}{list(where)} is {mask[where].item()}; pass booleans, or 1 for what counts and "
            "0 for what does not"
        )
    return mask.bool()


def as_mask(mask: Tensor | None, like: Tensor, name: str = "mask") -> Tensor:
    """Return `mask` as booleans of the shape of `like` (all True for None); refuse other shapes,
    entries other than 0 and 1, and empty masks."""
    if mask is None:
        mask = torch.ones_like(like, dtype=torch.bool)
    tensors(**{name: mask})
    if mask.shape != like.shape:
        raise ValueError(
            f"{name} has shape {tuple(mask.shape)}, the values {tuple(like.shape)}; make them equal"
        )
    mask = zero_or_one(mask, name)
    if not mask.any():
        raise ValueError(f"{name} is empty: no entry counts; pass at least one 1")
    return mask


def as_float(values: Tensor) -> Tensor:
    """Numbers that can be summed and squared: half precision as float32, whole numbers as floats,
    float32 and float64 as they are."""
    if not values.is_floating_point():
        values = values.to(torch.get_default_dtype())
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


def all_equal(grouped: Tensor) -> Tensor:
    """Whether all numbers of a row [rows, size] are equal, [rows, 1]: the one definition of a group
    of rewards that teaches nothing."""
    return (grouped == grouped[:, :1]).all(dim=1, keepdim=True)


# Letters that draw nothing (soft hyphen, zero-width space, word joiner, byte-order mark), and those
# that only fill a place.
_UNSEEN = dict.fromkeys(map(ord, "\u00ad\u200b\u2060\ufeff"))
_FILLERS = "\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u2800\u3164\uffa0" + "".join(
    map(chr, range(0xFE00, 0xFE10))
)


def visible(text: str) -> str:
    """What a reader can tell of a text: without spaces and invisible letters at its ends and
    zero-width ones inside, with one spelling of accents and of line ends. "" if there is nothing to
    see."""
    text = unicodedata.normalize("NFC", text.translate(_UNSEEN))
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    seen = [i for i, letter in enumerate(text) if not _is_blank(letter)]
    return text[seen[0] : seen[-1] + 1] if seen else ""


def _is_blank(letter: str) -> bool:
    return letter.isspace() or letter in _FILLERS or unicodedata.category(letter) in ("Cf", "Cc")


def pair_problem(first: str, second: str) -> str | None:
    """Why nobody can compare two responses: "has an empty response" or "has two equal responses",
    by what is `visible`; None if they can be compared. The one rule of rows, annotators, panel,
    sampling and training."""
    one, other = visible(first), visible(second)
    if not (one and other):
        return "has an empty response"
    return "has two equal responses" if one == other else None
