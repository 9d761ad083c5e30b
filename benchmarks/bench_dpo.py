"""A step of DPO against TRL's DPOTrainer: seconds, memory, and the losses on the same pairs.

Same model, pairs, order, loss, AdamW and learning rates; float32, no dropout, no gradient
checkpointing; each side in a process of its own, one thread. Seconds are those of one step in the
real training loop, the fastest of a few after a first one that does not count; "CPU", of the
process, is the same on a machine that does nothing else. The reference's log-probabilities are
computed before the first step (column "reference", CPU seconds a pair), except by TRL's default,
which keeps the reference in memory and runs it in every step. Memory: the peak above what the
process holds with the model loaded and everything imported; a reference model counts.
"""

import copy
import json
import math
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import GPT2Config

from benchmarks import bench_ppo
from benchmarks.bench_ppo import MEMORY, PLAIN, main, measured, prepare, resident, settled

SIDES = (
    "this package",
    "this package, in micro-batches",
    "TRL, reference in memory",
    "TRL, precomputed",
    "TRL, precomputed, in micro-batches",
)
BASE = SIDES[2]
GOAL = "1.5x speed, 0.6x memory, same loss"
LEARNING_RATE = 1e-4  # the loss leaves log 2 at once


class Work(NamedTuple):
    """B pairs a step: prompts of P tokens, responses of C with their end; all steps of one
    epoch."""

    title: str
    config: GPT2Config
    batch: int
    micro_batch: int
    width: int
    new: int
    steps: int  # that are run, the first one included
    pairs: int


WORKS = {
    "tiny": Work(
        bench_ppo.WORKS["tiny"].title, bench_ppo.WORKS["tiny"].config, 32, 8, 24, 24, 6, 256
    ),
    "124M": Work(
        bench_ppo.WORKS["124M"].title, bench_ppo.WORKS["124M"].config, 8, 2, 96, 32, 3, 32
    ),
}


def load(work):
    """The model, its tokenizer, and pairs of texts: (prompt, chosen, rejected)."""
    model, tokenizer, prompts = prepare(work)
    drawn = torch.randint(1, work.config.vocab_size, (work.pairs, 2, work.new - 1)).tolist()
    texts = [["".join(f" w{i}" for i in side) for side in pair] for pair in drawn]
    return model, tokenizer, [(prompts[i % len(prompts)], *pair) for i, pair in enumerate(texts)]


def small(work):
    """A model that runs for a moment: whatever is imported at the first use is not a step's
    memory."""
    config = copy.copy(work.config)
    config.n_layer, config.n_embd, config.n_head = 1, 4, 1
    return prepare(work._replace(config=config))[0]


def clocks():
    return time.perf_counter(), time.process_time()


def ours(work, micro_batch):
    """Clocks at the ends of the steps, losses of the steps, seconds of the reference."""
    from rlhf_helpers.algorithms import dpo
    from rlhf_helpers.algorithms.reward_model import Comparison

    model, tokenizer, pairs = load(work)
    data = dpo.encode(tokenizer, [Comparison(one[0], one[1:]) for one in pairs])
    config = dpo.Config(
        learning_rate=LEARNING_RATE,
        warm_up=0.0,
        batch_size=work.batch,
        micro_batch=micro_batch,
    )
    cache = Path(tempfile.mkdtemp()) / "reference.safetensors"
    next(dpo.train(small(work), tokenizer, data[:2], config))
    settled()
    begin = time.process_time()
    dpo.cached_log_probs(cache, model, data, tokenizer.pad_token_id)
    reference = time.process_time() - begin
    marks, losses = [clocks()], []
    for metrics in dpo.train(model, tokenizer, data, config, cache=cache):
        marks.append(clocks())
        losses.append(metrics.loss)
        if len(losses) == work.steps:
            break
    return marks, losses, reference


def trl(work, micro_batch, precompute):
    """The same of TRL."""
    from datasets import Dataset, disable_progress_bars
    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer

    disable_progress_bars()
    marks, losses, seconds = [], [], [0.0]

    class Clock(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            marks.append(clocks())

        def on_step_end(self, args, state, control, **kwargs):
            marks.append(clocks())
            control.should_training_stop = len(marks) > work.steps

    class Trainer(DPOTrainer):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            losses.append(loss.item())
            return loss

        def compute_ref_log_probs(self, *args, **kwargs):
            begin = time.process_time()
            found = super().compute_ref_log_probs(*args, **kwargs)
            seconds[0] += time.process_time() - begin
            return found

    def trainer(model, pairs):
        columns = zip(*pairs, strict=True)
        rows = Dataset.from_dict(dict(zip(("prompt", "chosen", "rejected"), columns, strict=True)))
        arguments = DPOConfig(
            tempfile.mkdtemp(),
            per_device_train_batch_size=micro_batch or work.batch,
            gradient_accumulation_steps=work.batch // (micro_batch or work.batch),
            precompute_ref_log_probs=precompute,
            num_train_epochs=1,
            learning_rate=LEARNING_RATE,
            train_sampling_strategy="sequential",
            use_cpu=True,
            **PLAIN,
        )
        frozen = None if precompute else copy.deepcopy(model)
        return Trainer(
            model,
            frozen,
            arguments,
            train_dataset=rows,
            processing_class=tokenizer,
            callbacks=[Clock()],
        )

    model, tokenizer, pairs = load(work)
    # the order in which this package takes them
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0)).tolist()
    trainer(small(work), pairs[:2]).train()
    for one in (marks, losses):
        one.clear()
    seconds[0] = 0.0
    settled()
    trainer(model, [pairs[i] for i in order]).train()
    parts = work.batch // (micro_batch or work.batch)
    whole = torch.tensor(losses).view(-1, parts).mean(1).tolist()
    return marks, whole, seconds[0]


def child(name, side):
    torch.set_num_threads(1)
    work = WORKS[name]
    run = {
        SIDES[0]: lambda: ours(work, None),
        SIDES[1]: lambda: ours(work, work.micro_batch),
        SIDES[2]: lambda: trl(work, None, precompute=False),
        SIDES[3]: lambda: trl(work, None, precompute=True),
        SIDES[4]: lambda: trl(work, work.micro_batch, precompute=True),
    }[side]
    marks, losses, reference = run()
    steps = torch.tensor(marks, dtype=torch.float64).diff(dim=0)[1:]
    memory = resident("VmHWM") - MEMORY["before"]
    print(json.dumps([*steps.amin(0).tolist(), memory, reference / work.pairs, losses]))


def table(name):
    work = WORKS[name]
    print(
        f"\n{work.title}: {work.batch} pairs a step (micro-batches of {work.micro_batch}),"
        f" {work.width} prompt and {work.new} response tokens (goal: {GOAL})",
        flush=True,
    )
    found = {side: measured(__file__, name, side) for side in SIDES}
    base = found[BASE]
    print(f"{'':<36}{'reference':>10}{'step':>10}{'speed':>7}{'CPU':>10}{'speed':>7}{'memory':>12}")
    for side, (step, busy, memory, reference, _) in found.items():
        before = f"{reference:8.3f} s" if reference else f"{'':>10}"
        print(
            f"{side:<36}{before}{step:8.2f} s{base[0] / step:6.2f}x{busy:8.2f}"
            f" s{base[1] / busy:6.2f}x{memory:8.0f} MiB {memory / base[2]:.2f}x",
            flush=True,
        )
    print(
        f"loss of the first {work.steps} batches (log 2 = {math.log(2):.7f}), largest difference"
        f" to {BASE!r}"
    )
    for side, (*_, losses) in found.items():
        apart = max(abs(a - b) for a, b in zip(losses, base[4], strict=True))
        print(f"{side:<36}{'  '.join(f'{loss:.7f}' for loss in losses)}   {apart:.1e}", flush=True)


if __name__ == "__main__":
    main(child, table, WORKS)
