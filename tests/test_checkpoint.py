"""Checkpoints: what comes back is what was saved, what is damaged is refused, and a run that is
killed again and again ends where the undisturbed one does.

Called as a script, this file is the run that gets killed.
"""

import builtins
import errno
import hashlib
import json
import math
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
import warnings
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch
from killing import die, ending, in_child, is_folder, needs_fork, tear_a_write
from torch import nn

from rlhf_helpers import checkpoint
from rlhf_helpers.checkpoint import folder_for, load, save

RUN = {"model": "tiny", "learning_rate": 0.001}


def bits(tensor):
    flat = tensor.detach().cpu().flatten().clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8).tolist()


def assert_same(found, saved):
    """Equal to the bit and of one type, all the way down."""
    if isinstance(saved, torch.Tensor):
        assert (found.dtype, found.shape) == (saved.dtype, saved.shape)
        assert bits(found) == bits(saved)
    elif isinstance(saved, dict):
        assert type(found) is dict
        assert [(type(key), key) for key in found] == [(type(key), key) for key in saved]
        for key in saved:
            assert_same(found[key], saved[key])
    elif isinstance(saved, list | tuple):
        assert type(found) is type(saved)
        for one, other in zip(found, saved, strict=True):
            assert_same(one, other)
    elif isinstance(saved, float):
        assert type(found) is float
        assert struct.pack("<d", found) == struct.pack("<d", saved)
    else:
        assert (type(found), found) == (type(saved), saved)


def small(step):
    return {
        "weights": torch.tensor([step + 0.5, -step]),
        "log": [step / 3],
        "name": f"étape {step}",
    }


def fill(folder, *steps):
    for step in steps:
        save(folder, step, small(step), RUN)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def quietly(folder, identity=RUN):
    """What load returns, and that it has nothing to say about it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return load(folder, identity)


# What is saved comes back

TRICKY = {
    "floats": [0.1, -0.0, 5e-324, 1.7976931348623157e308, math.inf, -math.inf, math.nan, 1e16, 1.0],
    "nan with a payload": struct.unpack("<d", b"\x01\x02\x03\x04\x05\x06\xf8\xff")[0],
    "ints": [0, -1, 2**63, -(10**40)],
    "truth": [True, False, None],
    "texts": ["", "naïve 日本 🙂", 'quote " and \\ and \n', "\x00\u2028", "NaN"],
    "": {},
    3: {-1: "minus one", 0: "zero", "0": "text zero"},
    "nested": ([], (), {}, ({"a": ((1,), [2])},)),
    "looks like one of ours": {
        "tensor": "state['x']",
        "float": "0",
        "tuple": [1],
        "dict": [["a", 1]],
    },
    "['a']": {"b": torch.ones(1)},
    "a": {"']['b": torch.zeros(1)},
    "ключ": torch.arange(3),
}


def test_everything_a_state_may_hold_comes_back(tmp_path):
    """Oracle: the state itself, compared by type and by bits."""
    path = save(tmp_path / "new" / "run", 12, TRICKY, RUN)
    assert path == tmp_path / "new" / "run" / "step-000012"
    found = quietly(tmp_path / "new" / "run")
    assert found.step == 12
    assert_same(found.state, TRICKY)


@pytest.mark.parametrize("dtype", checkpoint._DTYPES, ids=str)
def test_tensors_of_every_type_come_back(tmp_path, dtype):
    """Oracle: the bits of the tensor; random ones, so NaN of every kind is among the floats."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.randint(0, 256, (3, 8 * 16), dtype=torch.uint8, generator=generator)
    matrix = (noise % 2).bool() if dtype == torch.bool else noise.view(dtype)
    state = {
        "matrix": matrix,
        "scalar": matrix[0, 0],
        "empty": [matrix[:0], matrix[:, :0], matrix[:0]],
        "transposed": matrix.t(),
        "overlapping": (matrix[1:], matrix[:2], matrix[:, ::3]),
        "expanded": matrix[:1].expand(4, -1),
    }
    save(tmp_path, 0, state, RUN)
    assert_same(quietly(tmp_path).state, state)


def test_tied_tensors_are_written_once_and_come_back_tied(tmp_path):
    """Oracle: the size of the file, the values in it read by safetensors, and a write into one of
    the tensors, which the other must see."""
    weight = nn.Parameter(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)))
    path = save(tmp_path, 1, {"in": weight, "out": weight.detach(), "half": weight[:32]}, RUN)
    assert 4 * 64 * 96 < (path / "tensors.safetensors").stat().st_size < 4 * 64 * 97
    with safetensors.safe_open(path / "tensors.safetensors", "pt") as file:
        torch.testing.assert_close(file.get_tensor("state['in']"), weight.detach())
    state = quietly(tmp_path).state
    state["in"][0, 0] = 7
    assert state["out"][0, 0] == 7
    assert state["half"][0, 0] == weight[0, 0]


def test_views_of_one_memory_that_differ_are_not_taken_for_tied(tmp_path):
    """Oracle: the values. A negated view shares address, shape and strides with the plain one, a
    transposed square address and shape."""
    z = torch.tensor([1 + 2j])
    square = torch.arange(4.0).reshape(2, 2)
    state = {"plain": z.imag, "negated": z.conj().imag, "bits": z.imag.view(torch.int32)}
    state |= {"square": square, "transposed": square.t()}
    save(tmp_path, 1, state, RUN)
    found = quietly(tmp_path).state
    assert found["square"].tolist() == [[0, 1], [2, 3]]
    assert found["transposed"].tolist() == [[0, 2], [1, 3]]
    assert (found["plain"].item(), found["negated"].item()) == (2, -2)
    assert_same(found["bits"], state["bits"])


class Tied(nn.Module):
    """A vocabulary of five, one matrix in and out."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(self.norm(self.embed(tokens)))


def fresh(seed):
    torch.manual_seed(seed)
    model = Tied()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, amsgrad=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    return model, optimizer, schedule, torch.Generator().manual_seed(seed)


def advance(model, optimizer, schedule, generator, steps):
    for _ in range(steps):
        tokens = torch.randint(5, (8,), generator=generator)
        loss = nn.functional.cross_entropy(model(tokens), tokens)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def test_a_model_its_optimizer_schedule_and_generator_go_on_as_if_nothing_had_happened(tmp_path):
    """Oracle: the same six steps without the interruption."""
    straight = fresh(0)
    advance(*straight, steps=6)
    model, optimizer, schedule, generator = fresh(0)
    advance(model, optimizer, schedule, generator, steps=3)
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
        "generator": generator.get_state(),
        "python": random.Random(5).getstate(),
    }
    save(tmp_path, 3, state, RUN)
    advance(model, optimizer, schedule, generator, steps=1)  # must not reach what was saved

    found = quietly(tmp_path).state
    resumed = model, optimizer, schedule, generator = fresh(1)
    model.load_state_dict(found["model"])
    optimizer.load_state_dict(found["optimizer"])
    schedule.load_state_dict(found["schedule"])
    generator.set_state(found["generator"])
    advance(*resumed, steps=3)
    for one, other in zip(resumed, straight, strict=True):
        if isinstance(one, torch.Generator):
            assert_same(one.get_state(), other.get_state())
        else:
            assert_same(dict(one.state_dict()), dict(other.state_dict()))
    python = random.Random()
    python.setstate(found["python"])
    assert python.random() == random.Random(5).random()


def test_a_later_change_of_a_tensor_does_not_reach_a_loaded_one_or_the_file(tmp_path):
    """Oracle: the values when they were saved."""
    state = small(1)
    save(tmp_path, 1, state, RUN)
    state["weights"].zero_()
    first = quietly(tmp_path).state
    first["weights"].add_(1)
    assert_same(quietly(tmp_path).state, small(1))


def test_both_files_are_what_their_names_say(tmp_path):
    """Oracle: Python's JSON reader without its extensions, and safetensors' own reader."""

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    path = save(tmp_path, 1, TRICKY, {"beta": math.inf})
    assert names(path) == ["state.json", "tensors.safetensors"]
    content = json.loads((path / "state.json").read_bytes(), parse_constant=refuse)["content"]
    data = (path / "tensors.safetensors").read_bytes()
    assert content["step"] == 1
    assert content["format"] == "rlhf_helpers checkpoint, version 1"
    assert content["tensors"] == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    with safetensors.safe_open(path / "tensors.safetensors", "np") as file:
        assert file.get_tensor("state['ключ']").tolist() == [0, 1, 2]


Pair = namedtuple("Pair", "a b")


def nested(levels):
    deep = []
    for _ in range(levels):
        deep = [deep]
    return deep


def test_the_deepest_and_longest_that_is_taken_comes_back(tmp_path):
    """Oracle: what was saved."""
    state = {"deep": nested(98), "long": 10**3900, "short": -(10**3900)}
    save(tmp_path, 1, state, {"numbers": {"learning_rate": 0.1}})
    assert_same(quietly(tmp_path, {"numbers": {"learning_rate": 0.1}}).state, state)


def test_numbers_of_numpy_are_numbers(tmp_path):
    """Oracle: Python's own."""
    numbers = [np.float64(0.1), np.float32(0.5), np.int64(3), np.bool_(True), np.str_("a")]
    save(tmp_path, 1, {"numbers": numbers}, {"rate": np.float64(0.1)})
    assert_same(quietly(tmp_path, {"rate": 0.1}).state, {"numbers": [0.1, 0.5, 3, True, "a"]})


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (
            {"policy": [0, 1, 2, {4}]},
            r"state\['policy'\]\[3\] is a set; make it a dict, .* tensor$",
        ),
        ({"policy": {7: (nn.Linear(1, 1),)}}, r"state\['policy'\]\[7\]\[0\] is a Linear"),
        ({"pair": Pair(1, 2)}, r"state\['pair'\] is a Pair"),
        ({"path": Path("x")}, r"state\['path'\] is a PosixPath"),
        ({"numbers": torch.zeros(2).numpy()}, r"state\['numbers'\] is a ndarray"),
        ({"raw": b"x"}, r"state\['raw'\] is a bytes"),
        ({"a": {(1, 2): 3}}, r"state\['a'\] has the key \(1, 2\); keys must be str or int"),
        ({"a": {True: 3}}, r"state\['a'\] has the key True; keys must be str or int"),
        (
            {"z": torch.zeros(1, dtype=torch.complex64)},
            r"state\['z'\] is a tensor of torch.complex64",
        ),
        (
            {"z": [torch.eye(2).to_sparse()]},
            r"state\['z'\]\[0\] .* torch.sparse_coo, .*make it a dense",
        ),
        ({"z": torch.zeros(1, device="meta")}, r"state\['z'\] is a tensor of .* on meta"),
        ({"text": "\ud800"}, r"state\['text'\] is a text .* surrogates not allowed"),
        ({"a": {"\ud800": 1}}, r"a key of state\['a'\] is a text that UTF-8 cannot hold"),
        ({"n": [10**5000]}, r"state\['n'\]\[0\] is an int of more than 3,900 digits"),
        ({"deep": nested(500)}, r"state\['deep'\]\[0\].* more than 100 levels deep"),
        ([1], None),
    ],
)
def test_what_cannot_be_saved_is_named_before_anything_is_written(tmp_path, state, message):
    """Oracle: the specification; a list alone is a state like any other."""
    if message is None:
        save(tmp_path, 1, state, RUN)
        assert quietly(tmp_path).state == state
        return
    with pytest.raises(ValueError, match=message):
        save(tmp_path / "run", 1, state, RUN)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("identity", "message"),
    [
        ({"data": torch.zeros(1)}, r"identity\['data'\] is a Tensor; make it a .* bool or None$"),
        ({"where": Path("x")}, r"identity\['where'\] is a PosixPath"),
    ],
)
def test_an_identity_that_cannot_be_compared_is_refused(tmp_path, identity, message):
    """Oracle: the specification, when saving and when loading."""
    fill(tmp_path, 1)
    for attempt in (lambda: save(tmp_path, 2, {}, identity), lambda: load(tmp_path, identity)):
        with pytest.raises(ValueError, match=message):
            attempt()


@pytest.mark.parametrize("step", [-1, 1.0, True, "3", None])
def test_a_step_must_be_a_count(tmp_path, step):
    """Oracle: the specification."""
    with pytest.raises(ValueError, match=r"step=.* must be an int of at least 0"):
        save(tmp_path, step, {}, RUN)


# What is in the folder


def test_the_last_two_are_kept_and_nothing_else_is_touched(tmp_path):
    """Oracle: the specification; a folder with such a name that holds something else is not ours
    to delete."""
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "step-12").mkdir()
    (tmp_path / "step-000003x").mkdir()
    (tmp_path / "step-000002").mkdir()
    (tmp_path / "step-000002" / "state.json").write_text("{}")
    others = ["notes.txt", "step-000002", "step-000003x", "step-12"]
    last = 999_999, 1_000_000
    for step, kept in [(5, [5]), (6, [5, 6]), (999_999, [6, 999_999]), (1_000_000, last)]:
        fill(tmp_path, step)
        assert names(tmp_path) == sorted(others + [f"step-{s:06d}" for s in kept])
        assert_same(quietly(tmp_path).state, small(step))
    fill(tmp_path, 1_000_001)
    assert names(tmp_path) == sorted([*others, "step-1000000", "step-1000001"])


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts open files as Linux does")
def test_a_save_leaves_no_file_open(tmp_path):
    """Oracle: the operating system's own list of open files."""
    fill(tmp_path, 1)
    before = len(os.listdir("/proc/self/fd"))
    for step in range(2, 6):
        fill(tmp_path, step)
    assert len(os.listdir("/proc/self/fd")) == before


def test_no_folder_an_empty_one_and_one_with_leftovers_mean_a_fresh_start(tmp_path):
    """Oracle: the specification; loading creates and deletes nothing."""
    assert quietly(tmp_path / "new") is None
    assert quietly(tmp_path) is None
    assert names(tmp_path) == []
    fill(tmp_path, 1)
    (tmp_path / "step-000001").rename(tmp_path / ".unfinished-step-000001")
    assert quietly(tmp_path) is None
    assert names(tmp_path) == [".unfinished-step-000001"]
    fill(tmp_path, 1)
    assert names(tmp_path) == ["step-000001"]


@pytest.mark.parametrize("step", [3, 2])
def test_a_step_is_not_written_twice(tmp_path, step):
    """Oracle: the specification: a run that has forgotten to load would overwrite its own work."""
    fill(tmp_path, 1, 3)
    with pytest.raises(ValueError, match=rf"step={step}, and .*holds step-000003 already; load it"):
        fill(tmp_path, step)
    assert names(tmp_path) == ["step-000001", "step-000003"]
    assert_same(quietly(tmp_path).state, small(3))


OTHERS = [
    ({**RUN, "learning_rate": 0.01}, "learning_rate is 0.001 there and 0.01 here; pass another"),
    ({"model": "tiny"}, "learning_rate is 0.001 there and missing here; pass another folder"),
    ({**RUN, "seed": 1}, "seed is missing there and 1 here; pass another folder"),
    ({}, "model is 'tiny' there and missing here; learning_rate is 0.001 there and missing"),
]


@pytest.mark.parametrize(("identity", "message"), OTHERS)
def test_another_run_is_refused_by_what_differs(tmp_path, identity, message):
    """Oracle: the specification; the other run is left as it was, with and without loading
    first."""
    fill(tmp_path, 1, 2)
    with pytest.raises(
        ValueError, match=rf"{re.escape(str(tmp_path))} are of another run: {message}"
    ):
        load(tmp_path, identity)
    with pytest.raises(
        ValueError, match=rf"{re.escape(str(tmp_path))} are of another run: {message}"
    ):
        save(tmp_path, 3, small(3), identity)
    assert names(tmp_path) == ["step-000001", "step-000002"]
    assert_same(quietly(tmp_path).state, small(2))


def test_an_identity_is_compared_by_value(tmp_path):
    """Oracle: the specification: order and NaN's inequality are no difference, a list instead of a
    tuple is one."""
    identity = {"clip": math.inf, "gap": [math.nan], "sizes": (1, 2), "inner": {"a": 1, "b": 2}}
    save(tmp_path, 1, {}, identity)
    shuffled = {"inner": {"b": 2, "a": 1}, "gap": [math.nan], "sizes": (1, 2), "clip": math.inf}
    assert quietly(tmp_path, shuffled).step == 1
    with pytest.raises(ValueError, match=r"run: sizes is \(1, 2\) there and \[1, 2\] here; pass"):
        load(tmp_path, {**shuffled, "sizes": [1, 2]})


# Damage


def refused(folder, message, newest="step-000002", used=1):
    """The newest is refused by name and the one before is used; then the run can go on."""
    with pytest.warns(
        UserWarning, match=rf"^checkpoint {re.escape(str(folder / newest))} is refused: {message}"
    ):
        found = load(folder, RUN)
    assert found.step == used
    assert_same(found.state, small(used))
    assert quietly(folder).step == used


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("state.json", "its state.json is damaged, or of another program"),
        ("tensors.safetensors", "its tensors.safetensors "),
    ],
)
def test_every_truncation_and_every_changed_byte_is_refused(tmp_path, file, message):
    """Oracle: the specification, for the file cut at every length, and for every byte of it with
    a bit flipped; and for one byte too many."""
    fill(tmp_path, 1, 2)
    shutil.copytree(tmp_path / "step-000002", tmp_path / "good")
    data = (tmp_path / "good" / file).read_bytes()
    draw = random.Random(0)
    flipped = [
        data[:i] + bytes([byte ^ 1 << draw.randrange(8)]) + data[i + 1 :]
        for i, byte in enumerate(data)
    ]
    for bad in [*(data[:n] for n in range(len(data))), *flipped, data + b"\n"]:
        (tmp_path / "step-000002" / file).write_bytes(bad)
        refused(tmp_path, message)
        (tmp_path / "refused-step-000002-1").rename(tmp_path / "step-000002")
    shutil.rmtree(tmp_path / "step-000002")
    (tmp_path / "good").rename(tmp_path / "step-000002")
    assert_same(quietly(tmp_path).state, small(2))


def test_a_truncated_file_is_told_from_a_changed_one(tmp_path):
    """Oracle: the specification."""
    fill(tmp_path, 1, 2)
    path = tmp_path / "step-000002" / "tensors.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    refused(tmp_path, f"its tensors.safetensors has {len(data) - 1} bytes, and {len(data)} were")
    fill(tmp_path, 2)
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    refused(tmp_path, "its tensors.safetensors is damaged: the checksum is not that of state.json")


def no_state(path):
    (path / "state.json").unlink()


def no_tensors(path):
    (path / "tensors.safetensors").unlink()


def a_file(path):
    shutil.rmtree(path)
    path.write_text("not a folder")


def empty(path):
    shutil.rmtree(path)
    path.mkdir()


def another_program(path):
    (path / "state.json").write_text(json.dumps({"content": {"step": 2}, "model": []}))


def brackets(path):
    (path / "state.json").write_text("[" * 100_000)


def a_copy_of_the_one_before(path):
    shutil.rmtree(path)
    shutil.copytree(path.with_name("step-000001"), path)


def a_later_format(path):
    shutil.rmtree(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "_FORMAT", "rlhf_helpers checkpoint, version 2")
        # written elsewhere, since this version would not share a folder with the next
        save(path.parent / "later", 2, small(2), RUN)
    (path.parent / "later" / path.name).rename(path)


def rewritten(change):
    """A state.json of another content, with a checksum that is right."""

    def damage(path):
        content = json.loads((path / "state.json").read_text())["content"]
        content = change(content)
        (path / "state.json").write_bytes(checkpoint._render(content))

    return damage


def less(*keys):
    return rewritten(lambda c: {key: value for key, value in c.items() if key not in keys})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (rewritten(lambda _: {}), "its format is None, and this code reads"),
        (rewritten(lambda _: [1]), "its state.json is damaged, or of another program"),
        (less("format"), "its format is None"),
        (less("step"), "its state.json is of step None"),
        (less("identity"), "its state.json holds no identity"),
        (less("tensors"), "its state.json says nothing of tensors.safetensors"),
        (less("state", "tensors"), "its state.json says nothing of tensors.safetensors"),
        (
            rewritten(lambda c: c | {"state": {"tensor": "none"}}),
            "its state.json holds a malformed state",
        ),
        (rewritten(lambda c: c | {"state": {}}), "its state.json holds a malformed state"),
        (rewritten(lambda c: c | {"identity": {"dict": 3}}), ".* holds a malformed identity"),
        (no_state, "it has no state.json"),
        (no_tensors, "it has no tensors.safetensors"),
        (a_file, "it has no state.json"),
        (empty, "it has no state.json"),
        (another_program, "its state.json is damaged, or of another program"),
        (brackets, "its state.json is damaged, or of another program"),
        (a_copy_of_the_one_before, "its state.json is of step 1"),
        (
            a_later_format,
            "its format is '.* 2', and this code reads 'rlhf_helpers checkpoint, v.* 1'",
        ),
    ],
)
def test_what_is_no_checkpoint_is_refused_and_the_run_goes_on(tmp_path, damage, message):
    """Oracle: the specification; what was refused is set aside under another name, not deleted,
    and a second one beside it."""
    fill(tmp_path, 1, 2)
    damage(tmp_path / "step-000002")
    refused(tmp_path, message)
    assert "refused-step-000002-1" in names(tmp_path)
    fill(tmp_path, 2)
    damage(tmp_path / "step-000002")
    refused(tmp_path, message)
    fill(tmp_path, 2, 3)
    assert [name for name in names(tmp_path) if name != "later"] == [
        "refused-step-000002-1",
        "refused-step-000002-2",
        "step-000002",
        "step-000003",
    ]


@pytest.mark.parametrize("file", ["state.json", "tensors.safetensors"])
def test_a_file_that_the_disk_no_longer_gives_counts_as_damaged(tmp_path, monkeypatch, file):
    """Oracle: the specification; the reason is the system's own."""
    fill(tmp_path, 1, 2)
    read_bytes = Path.read_bytes

    def broken(path):
        if path == tmp_path / "step-000002" / file:
            raise OSError(errno.EIO, "Input/output error", str(path))
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", broken)
    refused(tmp_path, ".*Input/output error")


def test_if_none_is_good_the_run_does_not_start_afresh_by_itself(tmp_path):
    """Oracle: the specification: the error comes again at the second attempt, with both names."""
    fill(tmp_path, 1, 2)
    no_state(tmp_path / "step-000001")
    no_tensors(tmp_path / "step-000002")
    for _ in range(2):
        with (
            pytest.warns(UserWarning, match="is refused") as said,
            pytest.raises(
                ValueError,
                match=f"no checkpoint in {re.escape(str(tmp_path))} is good .*; to start",
            ),
        ):
            load(tmp_path, RUN)
        assert ["step-000002" in str(w.message) for w in said] == [True, False]
    assert names(tmp_path) == ["step-000001", "step-000002"]


def test_a_damaged_checkpoint_does_not_hide_that_the_folder_is_another_runs(tmp_path):
    """Oracle: the specification; nothing of the other run is renamed."""
    fill(tmp_path, 1, 2)
    no_tensors(tmp_path / "step-000002")
    with pytest.warns(UserWarning, match="refused"), pytest.raises(ValueError, match="another run"):
        load(tmp_path, {})
    assert names(tmp_path) == ["step-000001", "step-000002"]


def test_a_folder_that_may_not_be_changed_can_be_read(tmp_path, monkeypatch):
    """Oracle: the specification."""
    fill(tmp_path, 1, 2)
    no_tensors(tmp_path / "step-000002")

    def replace(*_):
        raise PermissionError(errno.EACCES, "read-only")

    monkeypatch.setattr(os, "replace", replace)
    with pytest.warns(UserWarning, match="refused"):
        assert load(tmp_path, RUN).step == 1


# Writes that fail


class Failing:
    """A function of the system that fails at its n-th call, like a full disk or Ctrl-C."""

    def __init__(self, function, n, error):
        self.function, self.n, self.error = function, n, error

    def __call__(self, *args, **kwargs):
        self.n -= 1
        if self.n == 0:
            raise self.error
        return self.function(*args, **kwargs)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
@pytest.mark.parametrize(
    ("module", "function", "calls"),
    [(os, "mkdir", 1), (builtins, "open", 2), (os, "fsync", 3), (os, "replace", 1)],
)
def test_a_failed_write_leaves_the_checkpoints_before_it(
    tmp_path, monkeypatch, module, function, calls, error
):
    """Oracle: the specification, wherever the write fails: the error is reported, nothing
    half-written stays, and the next write works."""
    for n in range(1, calls + 1):
        folder = tmp_path / str(n)
        fill(folder, 1, 2)
        with monkeypatch.context() as patch:
            patch.setattr(module, function, Failing(getattr(module, function), n, error))
            with pytest.raises(type(error)):
                fill(folder, 3)
        assert names(folder) == ["step-000001", "step-000002"]
        assert_same(quietly(folder).state, small(2))
        fill(folder, 3)
        assert names(folder) == ["step-000002", "step-000003"]


@pytest.mark.skipif(os.name == "nt", reason="Windows opens no folder, so none can be synced")
def test_everything_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    """Oracle: the order that a power cut asks for: both files, their folder, the name, the folder
    of the name; and only then is an old checkpoint taken away. Before all, a new folder's name."""
    folder = tmp_path / "run"
    events = []
    fsync, replace = os.fsync, os.replace

    def recorded_fsync(descriptor):
        status = os.fstat(descriptor)
        inside = [tmp_path, *tmp_path.rglob("*")]
        path = next(path for path in inside if os.path.samestat(path.stat(), status))
        events.append(("sync", path.name, path.stat().st_size if path.is_file() else None))
        fsync(descriptor)

    def recorded_replace(source, target):
        events.append(("name", Path(source).name, Path(target).name))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", recorded_replace)
    fill(folder, 1)
    assert events[0] == ("sync", tmp_path.name, None)
    fill(folder, 2)
    events.clear()
    path = save(folder, 3, small(3), RUN)
    size = {file.name: file.stat().st_size for file in path.iterdir()}
    assert sorted(events[:2]) == [("sync", name, size[name]) for name in sorted(size)]
    assert events[2:] == [
        ("sync", ".unfinished-step-000003", None),
        ("name", ".unfinished-step-000003", "step-000003"),
        ("sync", "run", None),
        ("name", "step-000001", ".unfinished-step-000001"),
    ]


@pytest.mark.skipif(os.name == "nt", reason="Windows opens no folder, so none can be synced")
@pytest.mark.parametrize(("number", "fatal"), [(errno.EINVAL, False), (errno.EIO, True)])
def test_a_file_system_that_cannot_sync_folders_will_do_but_a_broken_one_will_not(
    tmp_path, monkeypatch, number, fatal
):
    """Oracle: the meaning of the two numbers: 'not supported for this' and 'input/output error'."""
    fsync = os.fsync

    def only_files(descriptor):
        if is_folder(descriptor):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", only_files)
        if fatal:
            with pytest.raises(OSError, match="Input/output error"):
                fill(tmp_path, 1)
            return
        fill(tmp_path, 1)
    assert_same(quietly(tmp_path).state, small(1))


def test_a_system_that_opens_no_folder_can_save_too(tmp_path, monkeypatch):
    """Oracle: what was saved, read again; Windows refuses to open a folder, and knows no flock."""
    open_file = os.open

    def no_folders(path, *rest, **more):
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return open_file(path, *rest, **more)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", no_folders)
        patch.setattr(checkpoint, "fcntl", None)
        patch.setattr(checkpoint.sys, "platform", "win32")
        fill(tmp_path, 1, 2)
    assert_same(quietly(tmp_path).state, small(2))


def test_a_full_disk_is_told_with_the_folder_and_what_is_still_whole(tmp_path, monkeypatch):
    """Oracle: the specification, with and without a checkpoint before."""
    for steps, says in (((), "there is none before it"), ((1, 2), "step-000002 is whole")):
        folder = tmp_path / str(len(steps))
        fill(folder, *steps)
        with monkeypatch.context() as patch:
            full = OSError(errno.ENOSPC, "No space left on device")
            patch.setattr(os, "fsync", Failing(os.fsync, 2 if steps else 3, full))
            with pytest.raises(OSError, match=f"step-000003 was not written, {says}") as caught:
                fill(folder, 3)
        assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(folder))


@pytest.mark.skipif(os.name == "nt", reason="links need rights there that few have")
def test_leftovers_of_any_kind_are_cleared_away(tmp_path):
    """Oracle: the names in the folder: after the next save, and after a resume that has nothing to
    do. What a link points to stays."""
    kept = tmp_path / "kept"
    kept.mkdir()
    folder = tmp_path / "run"
    fill(folder, 1)
    for clear in (lambda: fill(folder, 2), lambda: checkpoint.begin(folder, "start")):
        (folder / ".unfinished-file").write_text("x")
        (folder / ".unfinished-step-000009").mkdir()
        (folder / ".unfinished-link").symlink_to(kept)
        clear()
        assert names(folder) == ["step-000001", "step-000002"]
    assert kept.is_dir()


def test_what_a_run_starts_with_is_noted_until_its_first_checkpoint(tmp_path):
    """Oracle: the specification."""
    folder = tmp_path / "run"
    assert checkpoint.started(folder) is None
    checkpoint.begin(folder, "abc")
    assert checkpoint.started(folder) == "abc"
    (folder / ".start.json").write_text("{")
    assert checkpoint.started(folder) is None
    fill(folder, 1)
    assert names(folder) == ["step-000001"]
    checkpoint.begin(folder, "def")
    assert names(folder) == ["step-000001"]


@needs_fork
def test_a_second_writer_is_refused_and_the_lock_ends_with_its_holder(tmp_path):
    """Oracle: another process that holds the folder as `save` does; the folder before."""
    fill(tmp_path, 1)
    reader, writer = os.pipe()

    def hold():
        with checkpoint._alone(tmp_path):
            os.write(writer, b"x")
            time.sleep(60)

    child = in_child(hold)
    os.close(writer)
    assert os.read(reader, 1) == b"x"
    for attempt in (lambda: fill(tmp_path, 2), lambda: checkpoint.begin(tmp_path, "x")):
        with pytest.raises(
            ValueError, match=rf"another run is writing .* into {re.escape(str(tmp_path))} at"
        ):
            attempt()
    assert names(tmp_path) == ["step-000001"]
    os.kill(child, signal.SIGKILL)
    ending(child)
    fill(tmp_path, 2)
    assert names(tmp_path) == ["step-000001", "step-000002"]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no rights of this kind")
@pytest.mark.parametrize("mask", [0o022, 0o077])
@pytest.mark.parametrize("rights", [0o700, 0o750, 0o755])
def test_a_new_checkpoint_has_the_rights_of_the_one_before(tmp_path, rights, mask):
    """Oracle: the rights that a person gave to the last one, whatever the umask."""
    fill(tmp_path, 1)
    before = tmp_path / "step-000001"
    before.chmod(rights)
    for file in before.iterdir():
        file.chmod(rights & 0o666)
    old = os.umask(mask)
    try:
        fill(tmp_path, 2)
    finally:
        os.umask(old)
    after = tmp_path / "step-000002"
    assert after.stat().st_mode & 0o777 == rights
    assert {file.stat().st_mode & 0o777 for file in after.iterdir()} == {rights & 0o666}


# Where they lie


def test_checkpoints_go_to_drive_where_it_is_mounted(tmp_path, monkeypatch):
    """Oracle: the specification; nothing is created by asking."""
    drive = tmp_path / "drive" / "MyDrive"
    monkeypatch.setattr(checkpoint, "_DRIVE", drive)
    assert folder_for("07-ppo") == Path("checkpoints") / "07-ppo"
    drive.mkdir(parents=True)
    assert folder_for("07-ppo") == drive / "rlhf_helpers" / "07-ppo"
    assert names(drive) == []


def test_drive_is_where_colab_mounts_it():
    """Oracle: Colab's documentation of drive.mount('/content/drive')."""
    assert Path("/content/drive/MyDrive") == checkpoint._DRIVE


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/a", "a/"])
def test_the_name_of_a_run_is_one_name(name):
    """Oracle: the specification."""
    with pytest.raises(ValueError, match="must be the name of one folder, without slashes"):
        folder_for(name)


# A disk as a kill would leave it


def assert_whole(folder, possible):
    """One of these steps is there, whole; and the run goes on from it and tidies up."""
    found = quietly(folder)
    assert found.step in possible
    assert_same(found.state, small(found.step))
    fill(folder, 7)
    assert names(folder) == [f"step-{found.step:06d}", "step-000007"]
    return found.step


def test_whatever_a_save_has_done_so_far_one_of_two_steps_is_there(tmp_path):
    """Oracle: the state of step 2 or that of step 3, to the bit, in a copy of the folder at every
    moment at which a line of Python found it changed: what a kill before that line leaves."""
    folder = tmp_path / "run"
    fill(folder, 1, 2)
    shutil.copytree(folder / "step-000001", folder / ".unfinished-step-000003")
    seen = []

    def trace(*_):
        try:
            now = sorted((str(p), p.is_file() and p.stat().st_size) for p in folder.rglob("*"))
        except FileNotFoundError:  # as anything else here, it would end the tracing unnoticed
            now = None
        if not seen or now != seen[-1]:
            seen.append(now)
            shutil.copytree(folder, tmp_path / f"{len(seen):03d}")
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        save(folder, 3, small(3), RUN)
    finally:
        sys.settrace(before)
    assert len(seen) > 10
    found = [assert_whole(tmp_path / f"{k:03d}", (2, 3)) for k in range(1, len(seen) + 1)]
    assert found == sorted(found)
    assert set(found) == {2, 3}


# Runs that are killed: what follows up to the tests runs in other processes

STEPS = 60
MLP = {"model": "mlp", "steps": STEPS}


def train(folder, on_step=lambda step: None):
    """Sixty steps of AdamW on noise, a checkpoint after each; `folder` None saves nothing.

    Args:
        on_step: is told the step that the run starts from, and every step that is done.
    Returns: the bits of the weights, and the loss of every step.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 8))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(1)
    step, losses = 0, []
    found = None if folder is None else load(folder, MLP)
    if found is not None:
        step, losses = found.step, found.state["losses"]
        model.load_state_dict(found.state["model"])
        optimizer.load_state_dict(found.state["optimizer"])
        generator.set_state(found.state["generator"])
    on_step(step)
    while step < STEPS:
        x = torch.randn(16, 8, generator=generator)
        loss = (model(x + 0.1 * torch.randn(16, 8, generator=generator)) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        step += 1
        if folder is not None:
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "generator": generator.get_state(),
                "losses": losses,
            }
            save(folder, step, state, MLP)
        on_step(step)
    return {name: bits(w) for name, w in model.state_dict().items()}, [x.hex() for x in losses]


def die_at_a_rename(n, before):
    replace = os.replace
    count = 0

    def replace_and_die(source, target):
        nonlocal count
        count += 1
        if count < n or not before:
            replace(source, target)
        if count == n:
            die()

    os.replace = replace_and_die


def kill_in_many_ways(folder):
    """Kill the run sixteen times.

    Returns: the result of the run that nobody kills and that saves nothing, and the steps from
    which the killed ones started.
    """
    undisturbed = train(None)
    draw = random.Random(0)
    started = []
    for i in range(16):
        kind = ["moment", "torn", "before", "after"][i % 4]
        n, share = draw.randrange(2, 8), draw.random()
        reader, writer = os.pipe()

        def work(kind=kind, n=n, share=share, writer=writer):
            if kind == "torn":
                tear_a_write(n, share)
            elif kind != "moment":
                die_at_a_rename(n, kind == "before")
            train(folder, lambda step: os.write(writer, bytes([step])))

        child = in_child(work)
        started.append(os.read(reader, 1)[0])
        if kind == "moment":
            os.read(reader, 1)
            time.sleep(0.004 * share)
            os.kill(child, signal.SIGKILL)
        assert ending(child) == -signal.SIGKILL, kind
    return undisturbed, started


def stop_inside_writes(folder):
    """Saves whose files cannot grow beyond so many bytes: the system kills the process, or gives
    it an error as on a full disk.

    Returns: for each, the name of its folder and how it ended.
    """
    import resource  # there is none on Windows

    endings = []
    for size in range(0, 600, 40):
        for kind, action in (("killed", signal.SIG_DFL), ("full", signal.SIG_IGN)):
            victim = folder / f"{size:03d}-{kind}"
            fill(victim, 1, 2)

            def work(victim=victim, size=size, action=action):
                resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
                signal.signal(signal.SIGXFSZ, action)
                try:
                    fill(victim, 3)
                except OSError:
                    os._exit(3)

            endings.append((victim.name, ending(in_child(work))))
    return endings


def main(job, folder):
    torch.set_num_threads(1)
    jobs = {"kill": kill_in_many_ways, "stop": stop_inside_writes}
    jobs["train"] = lambda folder: train(folder, lambda step: print(step, file=sys.stderr))
    print(json.dumps(jobs[job](Path(folder))))
    assert "transformers" not in sys.modules


def start(job, folder):
    return subprocess.Popen(
        [sys.executable, __file__, job, str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def result(process):
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return json.loads(output)


@pytest.mark.slow
@needs_fork
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_weights(tmp_path):
    """Oracle: the same run without checkpoints and without kills, to the bit. One kill hits a fresh
    process, sixteen hit copies of another at random moments, in torn writes and around renames; the
    last start is a fresh process again."""
    with start("train", tmp_path) as first:
        told = [int(first.stderr.readline()) for _ in range(4)]
        first.kill()
    assert told == [0, 1, 2, 3]
    assert first.returncode == -signal.SIGKILL

    undisturbed, started = result(start("kill", tmp_path))
    assert started == sorted(started)
    assert 3 <= started[0] < started[-1] < STEPS
    assert len(set(started)) > 10
    assert result(start("train", tmp_path)) == undisturbed
    assert names(tmp_path) == ["step-000059", "step-000060"]


@needs_fork
def test_a_save_may_die_inside_a_write_or_find_the_disk_full(tmp_path):
    """Oracle: the system itself, which stops the write of a file at a size. Step 3 counts only
    where all of it could be written."""
    endings = result(start("stop", tmp_path))
    assert {code for _, code in endings} == {0, 3, -signal.SIGXFSZ}
    for name, code in endings:
        if code == 3:
            assert names(tmp_path / name) == ["step-000001", "step-000002"]
        assert_whole(tmp_path / name, (3,) if code == 0 else (2,))


if __name__ == "__main__":
    main(*sys.argv[1:])
