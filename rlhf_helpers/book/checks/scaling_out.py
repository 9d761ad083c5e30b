"""Checks of the exercises of scaling_out."""

from __future__ import annotations

from torch import Tensor

from rlhf_helpers.book.checks.judge import Function, judge, judge_number, vector


def check_state_bytes(answer: Function) -> None:
    """Exercise 1: answer(parameters, processes, stage) -> bytes of weights, gradients and Adam's
    moments in one process; stage 0 divides nothing, 2 gradients and moments, 3 the weights too."""

    def right(parameters: int, processes: int, stage: int) -> float:
        weights = parameters / processes if stage == 3 else parameters
        rest = 3 * parameters / processes if stage else 3 * parameters
        return 4 * (weights + rest)

    judge(
        answer,
        right,
        [(1000, 1, 0), (1000, 4, 0), (1000, 4, 2), (600, 3, 3)],
        {
            "these are numbers, not bytes: a number in float32 takes four.": lambda p, n, s: (
                right(p, n, s) / 4
            ),
            "one number a parameter is missing: there are a gradient and Adam's two moments.": (
                lambda p, n, s: right(p, n, s) - (4 * p / n if s else 4 * p)
            ),
            "stage 2 divides gradients and moments; the weights stay whole.": (
                lambda p, n, s: right(p, n, 3 if s else 0)
            ),
            "stage 3 divides the weights too.": lambda p, n, s: right(p, n, 2 if s else 0),
            "stage 0 divides nothing: each process holds all of it.": lambda p, n, s: right(
                p, n, s or 3
            ),
        },
    )


def check_local_losses(answer: Function) -> None:
    """Exercise 2: answer(sums [R, M], counts [R, M]) of M micro-batches in R processes -> loss
    that each micro-batch reports, [R, M]. They are added in a process, and the processes are
    averaged; what comes out is the mean over all tokens."""

    def right(sums: Tensor, counts: Tensor) -> Tensor:
        return len(sums) * sums / counts.sum()

    judge(
        answer,
        right,
        [
            (
                vector([[4.0, 1.0, 2.0], [9.0, 0.0, 3.0]]),
                vector([[4.0, 2.0, 1.0], [1.0, 3.0, 5.0]]),
            ),
            (
                vector([[2.0, 1.0], [0.0, 5.0], [6.0, 3.0]]),
                vector([[1.0, 4.0], [5.0, 2.0], [2.0, 1.0]]),
            ),
        ],
        {
            "these are means of micro-batches: a token of a short one weighs more.": lambda s, c: (
                s / c
            ),
            "the tokens of one process are not enough: divide by those of all.": lambda s, c: (
                s / c.sum(1, keepdim=True)
            ),
            "the launcher averages over the processes, so this is too small by their number.": (
                lambda s, c: s / c.sum()
            ),
            "only processes are averaged; the gradients of micro-batches are added.": (
                lambda s, c: s.numel() * s / c.sum()
            ),
            "that is the number of micro-batches; what is averaged are processes.": lambda s, c: (
                s.shape[1] * s / c.sum()
            ),
            "that is one number a process; return one for each micro-batch.": lambda s, c: (
                len(s) * s.sum(1) / c.sum()
            ),
        },
    )


def check_shard(answer: Function) -> None:
    """Exercise 3: answer(prompts [B], group, rank, processes) -> the prompt of each completion that
    this process samples. The first prompts are those of process 0, and samples of a prompt are
    neighbours."""

    def right(prompts: Tensor, group: int, rank: int, processes: int) -> Tensor:
        size = len(prompts) // processes
        return prompts[rank * size : (rank + 1) * size].repeat_interleave(group)

    judge(
        answer,
        right,
        [
            (vector([10, 11, 12, 13]), 3, 0, 2),
            (vector([10, 11, 12, 13]), 3, 1, 2),
            (vector([5, 6, 7, 8, 9, 4]), 2, 2, 3),
        ],
        {
            "samples of one prompt must be neighbours: repeat_interleave, not repeat.": (
                lambda p, g, r, n: right(p, 1, r, n).repeat(g)
            ),
            "each prompt appears once: repeat it for its group.": lambda p, g, r, n: right(
                p, 1, r, n
            ),
            "groups are whole, but process 0 takes the first prompts, process 1 the next ones, "
            "and so on.": lambda p, g, r, n: p[r::n].repeat_interleave(g),
            "every process samples all prompts here; each should have its own.": (
                lambda p, g, r, n: p.repeat_interleave(g)
            ),
        },
        untouched=lambda p, g, r, n: p.repeat_interleave(g)[r::n],
    )


def check_device_batch(answer: float | None) -> None:
    """Exercise 4: TRL's per_device_train_batch_size for 64 prompts of 16 samples, 2
    mini-batches, 4 processes."""
    judge_number(
        answer,
        128,
        {
            "those are prompts; TRL counts completions.": 8,
            "that is all of a process's completions; a mini-batch has half of them.": 256,
            "that is the mini-batch of all processes together; one of four takes a quarter.": 512,
            "those are the completions of all processes and both mini-batches.": 1024,
            "those are prompts of a process; TRL counts completions, and a mini-batch has half.": (
                16
            ),
        },
    )
