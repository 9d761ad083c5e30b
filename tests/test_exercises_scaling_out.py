"""The checks of scaling_out: stub, right answer, and each typical mistake."""

import pytest
import torch

from rlhf_helpers.book.checks import scaling_out as checks


def said(capsys, check, answer):
    check(answer)
    return capsys.readouterr().out.strip()


def state_bytes(parameters, processes, stage, numbers=(1, 1, 2)):
    """Each of weights, gradients and moments by itself, in plain Python."""
    found = 0
    for first_stage, each in zip((3, 2, 2), numbers, strict=True):
        found += 4 * each * parameters / (processes if stage >= first_stage else 1)
    return found


def local_losses(sums, counts):
    """From the other side: each token's share of the mean, times what the launcher divides by."""
    tokens = sum(sum(row) for row in counts.tolist())
    found = [[s / tokens * len(sums) for s in row] for row in sums.tolist()]
    return torch.tensor(found, dtype=torch.float64)


def shard(prompts, group, rank, processes):
    rows = [p for p in prompts.tolist() for _ in range(group)]
    size = len(rows) // processes
    return torch.tensor(rows[rank * size : rank * size + size], dtype=torch.float64)


def buggy(prompts, group, rank, processes):
    return prompts.repeat_interleave(group)[rank::processes]


@pytest.mark.parametrize(
    ("check", "stub"),
    [
        (checks.check_state_bytes, lambda *x: None),
        (checks.check_local_losses, lambda *x: None),
        (checks.check_shard, lambda *x: None),
        (checks.check_shard, buggy),
        (checks.check_device_batch, None),
    ],
)
def test_stub_is_not_attempted(capsys, check, stub):
    assert said(capsys, check, stub).startswith("Not attempted")


@pytest.mark.parametrize(
    ("check", "answer"),
    [
        (checks.check_state_bytes, state_bytes),
        (checks.check_local_losses, local_losses),
        (checks.check_shard, shard),
        (checks.check_device_batch, 128),
    ],
)
def test_right_answer(capsys, check, answer):
    assert said(capsys, check, answer) == "Right."


@pytest.mark.parametrize(
    ("check", "answer", "message"),
    [
        (checks.check_state_bytes, lambda *x: state_bytes(*x) / 4, "numbers, not bytes"),
        (
            checks.check_state_bytes,
            lambda *x: state_bytes(*x, (1, 1, 1)),
            "one number a parameter is missing",
        ),
        (
            checks.check_state_bytes,
            lambda *x: state_bytes(*x, (1, 0, 2)),
            "one number a parameter is missing",
        ),
        (
            checks.check_state_bytes,
            lambda p, n, s: state_bytes(p, n, 3 if s else 0),
            "the weights stay whole",
        ),
        (
            checks.check_state_bytes,
            lambda p, n, s: state_bytes(p, n, min(s, 2)),
            "divides the weights too",
        ),
        (
            checks.check_state_bytes,
            lambda p, n, s: 16 * p / n if s != 2 else state_bytes(p, n, 2),
            "stage 0 divides nothing",
        ),
        (checks.check_local_losses, lambda s, c: s / c, "means of micro-batches"),
        (
            checks.check_local_losses,
            lambda s, c: torch.stack([x / n.sum() for x, n in zip(s, c, strict=True)]),
            "not enough",
        ),
        (checks.check_local_losses, lambda s, c: s / c.sum(), "too small by their number"),
        (
            checks.check_local_losses,
            lambda s, c: local_losses(s, c) * s.shape[1],
            "only processes are averaged",
        ),
        (
            checks.check_local_losses,
            lambda s, c: s / c.sum() * s.shape[1],
            "number of micro-batches",
        ),
        (checks.check_local_losses, lambda s, c: local_losses(s, c).sum(1), "one number a process"),
        (checks.check_shard, lambda p, g, r, n: p.view(n, -1)[r].repeat(g), "not repeat"),
        (checks.check_shard, lambda p, g, r, n: p.view(n, -1)[r], "repeat it for its group"),
        (checks.check_shard, lambda p, g, r, n: p.repeat_interleave(g), "should have its own"),
        (
            checks.check_shard,
            lambda p, g, r, n: p.view(-1, n)[:, r].repeat_interleave(g),
            "groups are whole, but",
        ),
        (checks.check_device_batch, 8, "those are prompts; TRL counts"),
        (checks.check_device_batch, 256, "a mini-batch has half"),
        (checks.check_device_batch, 512, "one of four takes a quarter"),
        (checks.check_device_batch, 1024, "of all processes and both"),
        (checks.check_device_batch, 16, "prompts of a process"),
    ],
)
def test_typical_mistake_is_named(capsys, check, answer, message):
    verdict = said(capsys, check, answer)
    assert verdict.startswith("Not yet")
    assert message in verdict
