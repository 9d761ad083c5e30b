"""Checkpoints that survive a run killed at any moment, in safetensors and JSON (never pickle, which
can run code when it is read).

A checkpoint is a folder `step-000012` with two files: `tensors.safetensors`, and `state.json` with
everything else and the checksums of both. It is written under another name in the same place,
forced to the disk, and only then renamed. Since a rename happens as a whole or not at all, a name
`step-…` always stands for a complete checkpoint, and whatever a killed run leaves behind has
another name. A folder is written by one run at a time; a second one is refused.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import struct
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from rlhf_helpers._validate import check_folder, check_text, has

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

_FORMAT = "rlhf_helpers checkpoint, version 1"
_KEEP = 2
_TENSORS = "tensors.safetensors"
_STATE = "state.json"
_UNFINISHED = ".unfinished-"
_START = ".start.json"
_DEEPEST = 100  # levels of lists and dicts in a state; the reader of JSON has a limit of its own
_LONGEST_INT = 13_000  # bits, about 3,900 digits; Python reads no more than 4,300
_DRIVE = Path("/content/drive/MyDrive")
# What safetensors can both write and read.
_DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint64,
    torch.uint32,
    torch.uint16,
    torch.uint8,
    torch.bool,
)


class Checkpoint(NamedTuple):
    """How far a run had come, and all it needs to go on."""

    step: int
    state: dict


class AnotherRun(ValueError):
    """A folder belongs to a run of another identity. `names` says in which entries they differ."""

    def __init__(self, message: str, names: list[str]) -> None:
        super().__init__(message)
        self.names = names


def folder_for(name: str) -> Path:
    """Where the checkpoints of a run belong: on Google Drive if Colab has mounted it (what lies
    elsewhere goes when Colab disconnects), else in `checkpoints` beside the notebook.

    Args:
        name: of the run, one name without slashes.
    Returns: a path; nothing is created.
    Raises: ValueError if `name` is empty or more than one name.
    """
    check_text(name, "name")
    if Path(name).name != name or name in ("", ".."):
        raise ValueError(f"name={name!r} must be the name of one folder, without slashes")
    return (_DRIVE / "rlhf_helpers" if _DRIVE.is_dir() else Path("checkpoints")) / name


def save(folder: str | os.PathLike, step: int, state: dict, identity: dict) -> Path:
    """Write a checkpoint, and then delete all but the last two of this run.

    Killed at any moment, a run has either the new checkpoint or still those before it. What
    interrupted writes have left in the folder is deleted first. So the disk holds three for the
    time of a write; memory holds the state twice more for a moment, and once more while it is
    written.

    Args:
        folder: of one run, made if it is not there.
        step: how many steps are done; more than at the last checkpoint of the folder.
        state: all that the run needs to go on: dicts (keys str or int), lists, tuples, dense
            tensors, numbers, texts, bools and None. So `state_dict()` of a model and of an
            optimizer, and `get_state()` of a generator. Tensors that are one tensor under two
            names, as tied weights are, are written once.
        identity: what makes this run another than its neighbours (its settings, model, data), of
            the same types but tensors.
    Returns: the folder of the checkpoint.
    Raises: ValueError if the state holds anything else, or what JSON cannot hold, naming it by its
        path; if the folder holds this step or a later one already, or another run (AnotherRun), or
        is being written by another process. OSError if the disk is full; what was there before is
        untouched.
    """
    check_folder(folder)
    has(identity, "identity", "a dictionary", "items", "get")
    folder = Path(folder)
    if type(step) is not int or step < 0:
        raise ValueError(f"step={step!r} must be an int of at least 0")
    stored: dict[tuple, tuple[str, Tensor]] = {}
    content = {
        "format": _FORMAT,
        "step": step,
        "identity": _encode(identity, "identity", None),
        "state": _encode(state, "state", stored),
    }
    data = safetensors.torch.save(dict(stored.values()))
    stored.clear()  # the bytes are enough
    content["tensors"] = {"bytes": len(data), "sha256": _sha256(data)}
    text = _render(content)

    target = folder / f"step-{step:06d}"
    if not folder.is_dir():
        folder.mkdir(parents=True)
        _sync(folder.parent)
    with _alone(folder):
        earlier = _earlier(folder, step, identity)
        _clean(folder)
        _write_folder(target, {_TENSORS: data, _STATE: text}, earlier[-1] if earlier else None)
        for path in [*earlier, target][:-_KEEP]:
            # first out of sight, so that no half-deleted folder is taken for a checkpoint
            os.replace(path, folder / f"{_UNFINISHED}{path.name}")
        _clean(folder)
        (folder / _START).unlink(missing_ok=True)
    return target


def load(folder: str | os.PathLike, identity: dict) -> Checkpoint | None:
    """The newest good checkpoint of a run, or None if the folder holds none, which means a fresh
    start.

    One that is damaged, or that `save` has not written, is refused with a warning that says what is
    wrong with it, and the one before is returned. The refused one is then renamed to
    `refused-…`, so that the run can write its step again; it is not deleted.

    Args:
        folder, identity: as they were given to `save`.
    Returns: Checkpoint(step, state). Tensors are on the CPU, wherever they were: `load_state_dict`
        moves them, and a generator's state belongs there. Tied tensors are tied again; a dict of
        another class comes back as a plain one.
    Raises: AnotherRun (a ValueError) if the checkpoint belongs to a run of another identity, naming
        what differs; ValueError if there are checkpoints and none is good.
    """
    check_folder(folder)
    has(identity, "identity", "a dictionary", "items", "get")
    folder = Path(folder)
    refused = []
    for path in reversed(_steps(folder)):
        try:
            content, state = _read(path)
        except (OSError, ValueError) as error:
            warnings.warn(f"checkpoint {path} is refused: {error}", stacklevel=2)
            refused.append(path)
            continue
        _check_identity(folder, content, identity)
        # without the right to rename, reading is still possible
        with suppress(OSError):
            for bad in refused:
                _set_aside(bad)
        return Checkpoint(content["step"], state)
    if refused:
        raise ValueError(
            f"no checkpoint in {folder} is good (the warnings say why); "
            "to start afresh pass another folder"
        )
    return None


def begin(folder: str | os.PathLike, start: str) -> None:
    """Note what a run starts with, until its first checkpoint says so; and delete what an
    interrupted write has left in the folder.

    Args:
        folder: of one run, made if it is not there.
        start: a name of the weights that it starts with.
    """
    check_folder(folder)
    check_text(start, "start")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        _clean(folder)
        if not _steps(folder):
            (folder / _START).write_text(json.dumps(start))


def started(folder: str | os.PathLike) -> str | None:
    """What `begin` has noted of a run that has no checkpoint yet, or None."""
    check_folder(folder)
    try:
        return json.loads((Path(folder) / _START).read_text())
    except (OSError, ValueError):
        return None


# From a state to JSON and tensors, and back


def _encode(value: Any, where: str, stored: dict | None, depth: int = 0) -> Any:
    """JSON for a value. Its tensors go into `stored` (None allows none) under the paths that
    stand for them.

    Objects of JSON have one key here, which says what they stand for: JSON has no tuples, no keys
    but texts, and no infinity.
    """
    if depth > _DEEPEST:
        raise ValueError(f"{where} lies more than {_DEEPEST} levels deep; make it flatter")
    if hasattr(value, "item") and hasattr(value, "dtype") and not isinstance(value, Tensor):
        # a number of NumPy's, as a number of Python's
        value = value.item() if value.shape == () else value
    if value is None or type(value) in (bool, int, str):
        return _writable(value, where)
    if type(value) is float:
        return value if math.isfinite(value) else {"float": struct.pack(">d", value).hex()}
    if isinstance(value, Tensor) and stored is not None:
        return {"tensor": _store(value, where, stored)}
    if type(value) in (list, tuple):
        items = [_encode(x, f"{where}[{i}]", stored, depth + 1) for i, x in enumerate(value)]
        return items if type(value) is list else {"tuple": items}
    if isinstance(value, dict):
        pairs = []
        for key, inner in value.items():
            if type(key) not in (str, int):
                raise ValueError(f"{where} has the key {key!r}; keys must be str or int")
            path = f"{where}[{_writable(key, f'a key of {where}')!r}]"
            pairs.append([key, _encode(inner, path, stored, depth + 1)])
        return {"dict": pairs}
    raise ValueError(
        f"{where} is a {type(value).__name__}; make it a dict, list, tuple, number, text, bool "
        f"or None{'' if stored is None else ', or a tensor'}"
    )


def _writable(value: Any, where: str) -> Any:
    """The value, if a file can hold it and Python reads it again."""
    if type(value) is int and value.bit_length() > _LONGEST_INT:
        raise ValueError(f"{where} is an int of more than 3,900 digits; make it a text")
    if type(value) is str:
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{where} is a text that UTF-8 cannot hold: {error}") from error
    return value


def _store(tensor: Tensor, where: str, stored: dict) -> str:
    """Copy a tensor into `stored`, unless it is there, and return its name."""
    if tensor.layout != torch.strided or tensor.is_meta or tensor.dtype not in _DTYPES:
        raise ValueError(
            f"{where} is a tensor of {tensor.dtype}, {tensor.layout}, on {tensor.device}; "
            "make it a dense tensor of real numbers"
        )
    address = (tensor.device, tensor.data_ptr())
    key = (*address, tensor.dtype, tensor.shape, tensor.stride(), tensor.is_neg())
    if key not in stored:
        # a copy, since safetensors takes no two views of one memory
        stored[key] = (where, tensor.detach().to("cpu", copy=True).contiguous())
    return stored[key][0]


def _decode(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    if kind == "tensor":
        return tensors[inner]
    if kind == "float":
        return struct.unpack(">d", bytes.fromhex(inner))[0]
    if kind == "tuple":
        return tuple(_decode(inner, tensors))
    return {key: _decode(item, tensors) for key, item in inner}


def _render(content: dict) -> bytes:
    """The one way to write this content, its checksum first."""
    text = json.dumps(content, ensure_ascii=False, allow_nan=False).encode()
    return b'{"sha256": "%s", "content": %s}\n' % (_sha256(text).encode(), text)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# Reading


def _steps(folder: Path) -> list[Path]:
    """Everything that has the name of a checkpoint, the earliest first."""
    if not folder.exists():
        return []
    named = [path for path in folder.iterdir() if re.fullmatch("step-[0-9]{6,}", path.name)]
    return sorted(named, key=_step)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _read_content(path: Path) -> dict:
    """What state.json says; ValueError unless `save` has written every byte of it, there."""
    if not (path / _STATE).is_file():
        raise ValueError(f"it has no {_STATE}")
    raw = (path / _STATE).read_bytes()
    try:
        content = json.loads(raw)["content"]
        same = raw == _render(content)
    except (ValueError, TypeError, KeyError, RecursionError):
        same = False
    if not same or not isinstance(content, dict):
        raise ValueError(f"its {_STATE} is damaged, or of another program")
    if content.get("format") != _FORMAT:
        raise ValueError(
            f"its format is {content.get('format')!r}, and this code reads {_FORMAT!r}"
        )
    if content.get("step") != _step(path):
        raise ValueError(f"its {_STATE} is of step {content.get('step')}")
    if not isinstance(_decoded(content.get("identity"), {}, "identity"), dict):
        raise ValueError(f"its {_STATE} holds no identity")
    return content


def _decoded(value: Any, tensors: dict[str, Tensor], what: str) -> Any:
    """As `_decode`; ValueError on JSON that `_encode` does not make."""
    try:
        return _decode(value, tensors)
    except (KeyError, TypeError, ValueError, AttributeError, struct.error, RecursionError) as error:
        raise ValueError(f"its {_STATE} holds a malformed {what}") from error


def _read(path: Path) -> tuple[dict, Any]:
    """What state.json says, and the state with its tensors."""
    content = _read_content(path)
    if not (path / _TENSORS).is_file():
        raise ValueError(f"it has no {_TENSORS}")
    data = (path / _TENSORS).read_bytes()
    written = content.get("tensors")
    if not isinstance(written, dict) or not {"bytes", "sha256"} <= set(written):
        raise ValueError(f"its {_STATE} says nothing of {_TENSORS}")
    if len(data) != written["bytes"]:
        raise ValueError(f"its {_TENSORS} has {len(data)} bytes, and {written['bytes']} were saved")
    if _sha256(data) != written["sha256"]:
        raise ValueError(f"its {_TENSORS} is damaged: the checksum is not that of {_STATE}")
    try:
        tensors = safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        raise ValueError(f"its {_TENSORS} is no file of tensors") from error
    return content, _decoded(content.get("state"), tensors, "state")


def _check_identity(folder: Path, content: dict, identity: dict) -> None:
    there = _decode(content["identity"], {})
    here = _decode(_encode(identity, "identity", None), {})
    names = [key for key in there | here if _differences(there, here, [key])]
    if names:
        raise AnotherRun(
            f"the checkpoints in {folder} are of another run: "
            f"{'; '.join(_differences(there, here, names))}; "
            "pass another folder, or what this run was started with",
            names,
        )


def _differences(there: dict, here: dict, keys: Any, where: str = "") -> list[str]:
    """Where two dicts differ in some of their keys, each place in words."""
    found = []
    for key in keys:
        name = f"{where}[{key!r}]" if where else str(key)
        if key not in here:
            found.append(f"{name} is {there[key]!r} there and missing here")
        elif key not in there:
            found.append(f"{name} is missing there and {here[key]!r} here")
        elif isinstance(there[key], dict) and isinstance(here[key], dict):
            inner = there[key], here[key]
            found += _differences(*inner, inner[0] | inner[1], name)
        elif there[key] != here[key] and repr(there[key]) != repr(here[key]):  # NaN is not NaN
            found.append(f"{name} is {there[key]!r} there and {here[key]!r} here")
    return found


# Writing


def _earlier(folder: Path, step: int, identity: dict) -> list[Path]:
    """The checkpoints of this run before `step`, the earliest first. Folders with such a name
    that `save` has not written are left out, so they are never deleted."""
    found = []
    for path in _steps(folder):
        if _step(path) >= step:
            raise ValueError(
                f"step={step}, and {folder} holds {path.name} already; "
                "load it and go on from there, or pass another folder"
            )
        try:
            content = _read_content(path)
        except (OSError, ValueError):
            continue
        _check_identity(folder, content, identity)
        found.append(path)
    return found


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """No other process writes into the folder meanwhile, where the file system knows locks. The
    lock is the system's, so it ends with the process, however that ends."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"another run is writing a checkpoint into {folder} at this moment; one folder is"
                " for one run: stop one of the two, or pass another folder"
            ) from error
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(descriptor)


def _write_folder(target: Path, files: dict[str, bytes], before: Path | None) -> None:
    """A folder with these files, which is there as a whole or not at all; with the rights of the
    checkpoint before, if there is one."""
    unfinished = target.with_name(f"{_UNFINISHED}{target.name}")
    try:
        unfinished.mkdir()
        if before is not None:
            unfinished.chmod(before.stat().st_mode & 0o777 | 0o700)
        for name, data in files.items():
            with open(unfinished / name, "wb") as file:
                if before is not None and (before / name).exists():
                    os.chmod(unfinished / name, (before / name).stat().st_mode & 0o777 | 0o600)
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        _sync(unfinished)
        os.replace(unfinished, target)
    except OSError as error:
        last = f"{before.name} is whole" if before else "there is none before it"
        says = f"{error.strerror or error}; {target.name} was not written, {last}"
        raise OSError(error.errno, says, str(target.parent)) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    _sync(target.parent)


def _sync(folder: Path) -> None:
    """Force the names in a folder to the disk."""
    if sys.platform == "win32":
        return  # no folder can be opened there, and the file system keeps a journal of names
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # some mounted file systems cannot do that for a folder
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _clean(folder: Path) -> None:
    for path in folder.glob(f"{_UNFINISHED}*"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _set_aside(path: Path) -> None:
    for n in itertools.count(1):
        free = path.with_name(f"refused-{path.name}-{n}")
        if not free.exists():
            os.replace(path, free)
            return
