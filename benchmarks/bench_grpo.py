"""A step of GRPO against TRL's GRPO trainer: seconds, memory, and the loss on the same samples.

Same model, prompts, lengths, groups, loss, AdamW and learning rate; float32, no dropout, no KL term
(TRL's default), no gradient checkpointing; each side in a process of its own, one thread. A step is
everything from sampling to the update. Seconds are those of one step in the real training loop,
the fastest of a few after a first one that does not count; "CPU", of the process, is the same on a
machine that does nothing else. Memory: the peak above what the process holds with the model loaded
and everything imported, what the C library holds back of freed tensors included; on a GPU, of what
torch allocates there. TRL also measures the entropy of every token while it computes
log-probabilities, and this package does not.
"""

import copy
import itertools
import json
import tempfile

import torch
from transformers import GPT2Config

from benchmarks import bench_dpo, bench_ppo
from benchmarks.bench_dpo import clocks, small
from benchmarks.bench_ppo import (
    MEMORY,
    PLAIN,
    Work,
    main,
    measured,
    prepare,
    resident,
    settled,
    share_of_even_words,
)
from rlhf_helpers import costs

OURS, TRL = SIDES = "this package", "TRL GRPO"
LEARNING_RATE = 1e-5
LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo")
GROUPS, PROMPTS = (2, 4, 8, 16, 32), (16, 32, 64, 128, 256)
METHODS = ("dpo", "grpo", "ppo")
# the output embedding has the share of the work that it has in GPT-2
SMALL = Work(
    "GPT-2's shape, 4 layers, 256 wide, 8,192 tokens (random weights)",
    GPT2Config(
        n_layer=4,
        n_embd=256,
        n_head=4,
        vocab_size=8192,
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    ),
    8,
    8,
    64,
    32,
    1,
    2,
    "",
)

WORKS = {
    "tiny": bench_ppo.WORKS["tiny"]._replace(
        prompts=8, epochs=1, turns=5, goal="1.5x speed, 0.6x memory, same loss"
    ),
    "124M": bench_ppo.WORKS["124M"]._replace(
        epochs=1, turns=2, goal="2x speed, 0.6x memory, same loss"
    ),
    **{f"group {size}": SMALL._replace(group=size) for size in GROUPS},
    **{f"prompt {width}": SMALL._replace(width=width) for width in PROMPTS},
    "method": SMALL._replace(group=4),
}


# --- a few steps of each side --------------------------------------------------------------------


def mark(marks):
    """Wall and CPU clock, when what was begun on a GPU is done."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    marks.append(clocks())


def settings(work, module, turns, **changes):
    """Of this package's GRPO or PPO."""
    return module.Config(
        iterations=turns,
        prompts=work.prompts,
        samples_per_prompt=work.group,
        max_new_tokens=work.new,
        epochs=work.epochs,
        mini_batches=1,
        learning_rate=LEARNING_RATE,
        **changes,
    )


def ours(work, device, module):
    """Clocks at the begin, after sampling, after the update, after sampling, …"""
    model, tokenizer, prompts = prepare(work)
    marks, collect = [], module.collect

    def collected(*args):
        found = collect(*args)
        mark(marks)
        return found

    module.collect = collected
    first = settings(work, module, 1)
    list(module.train(small(work).to(device), tokenizer, prompts, share_of_even_words, first))
    marks.clear()
    model.to(device)
    ready(device)
    mark(marks)
    options = settings(work, module, work.turns + 1)
    for _ in module.train(model, tokenizer, prompts, share_of_even_words, options):
        mark(marks)
    return marks


def grpo_trainer(model, tokenizer, prompts, work, turns, device="cpu", marks=None):
    """TRL's, with clocks as above if there is a list for them."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    marks = [] if marks is None else marks

    class Clock(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            mark(marks)

        def on_step_end(self, *args, **kwargs):
            mark(marks)

    class Trainer(GRPOTrainer):
        def _generate_and_score_completions(self, *args, **kwargs):
            found = super()._generate_and_score_completions(*args, **kwargs)
            mark(marks)
            return found

    arguments = GRPOConfig(
        tempfile.mkdtemp(),
        per_device_train_batch_size=work.prompts * work.group,
        num_generations=work.group,
        max_completion_length=work.new,
        num_iterations=work.epochs,
        beta=0.0,
        loss_type="grpo",
        max_steps=work.epochs * turns,
        learning_rate=LEARNING_RATE,
        use_cpu=device == "cpu",
        **PLAIN,
    )
    return Trainer(
        model,
        share_of_even_words,
        arguments,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer,
        callbacks=[Clock()],
    )


def trl(work, device):
    """The same of TRL."""
    from datasets import disable_progress_bars

    disable_progress_bars()
    marks = []
    model, tokenizer, prompts = prepare(work)
    grpo_trainer(small(work), tokenizer, prompts, work, 1, device).train()
    trainer = grpo_trainer(model, tokenizer, prompts, work, work.turns + 1, device, marks)
    ready(device)
    trainer.train()
    return marks


def ready(device):
    """From here on the peak of the memory counts."""
    settled()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        MEMORY["before"] = torch.cuda.memory_allocated() / 2**20


def peak(device):
    """MiB above those at `ready`."""
    now = torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else resident("VmHWM")
    return now - MEMORY["before"]


def direct(work):
    """A step of DPO on as many sequences: clocks, and CPU seconds of the reference for its
    pairs."""
    pairs = work.prompts * work.group // 2
    steps = work.turns + 1
    given = bench_dpo.Work(
        work.title, work.config, pairs, pairs, work.width, work.new, steps, pairs * steps
    )
    marks, _, reference = bench_dpo.ours(given, None)
    return marks, reference / steps


def child(name, side):
    torch.set_num_threads(1)
    if name == "loss":
        print(json.dumps(agreement()))
        return
    from rlhf_helpers.algorithms import grpo, ppo

    work, device = WORKS[name], "cuda" if side.endswith("on the GPU") else "cpu"
    before = 0.0
    if side.startswith(TRL):
        marks = trl(work, device)
    elif side == "dpo":
        marks, before = direct(work)
        # nothing is sampled: a step has one part
        marks = [marks[0], *(each for end in itertools.pairwise(marks) for each in end)]
    else:
        marks = ours(work, device, ppo if side == "ppo" else grpo)
    print(json.dumps(summary(marks) | {"memory": peak(device), "reference": before}))


def summary(marks):
    """Of the fastest step after the first one: wall seconds and CPU seconds of its parts."""
    steps = torch.tensor(marks, dtype=torch.float64).diff(dim=0).view(-1, 2, 2)[1:]
    wall, busy = steps[..., 0].sum(1).min().item(), steps[..., 1]
    collect, update = busy[busy.sum(1).argmin()].tolist()
    return {"wall": wall, "collect": collect, "update": update}


# --- the loss ------------------------------------------------------------------------------------


def agreement():
    """Loss and gradient norm of both sides on the same samples, for each way to weigh tokens."""
    from rlhf_helpers.algorithms import grpo

    work = WORKS["tiny"]
    model, tokenizer, prompts = prepare(work)
    other = copy.deepcopy(model)
    config = settings(work, grpo, 1)
    run = grpo.start(model, tokenizer, config)
    batch = grpo.groups(run, prompts[: work.prompts], share_of_even_words, config)
    batch = cut_and_aged(batch)
    trainer = grpo_trainer(other, tokenizer, prompts, work, 1)
    trainer.current_gradient_accumulation_steps = 1
    return [
        {
            "loss_type": loss_type,
            "ours": our_loss(model, batch, settings(work, grpo, 1, loss_type=loss_type)),
            "trl": trl_loss(trainer, batch, loss_type),
        }
        for loss_type in LOSSES
    ]


def cut_and_aged(batch):
    """Completions of several lengths, by a policy that is not quite the one that is trained."""
    draw = torch.Generator().manual_seed(0)
    length = batch.mask.shape[1]
    lengths = torch.randint(1, length + 1, (len(batch.mask), 1), generator=draw)
    mask = batch.mask & (torch.arange(length) < lengths)
    seen = batch.attention_mask.clone()
    seen[:, -length:] = mask
    old = batch.old_log_probs + 0.2 * torch.randn(mask.shape, generator=draw)
    old = old.masked_fill(~mask, 0.0)
    return batch._replace(attention_mask=seen, mask=mask, old_log_probs=old)


def our_loss(model, batch, config):
    """As in `grpo.step`."""
    from rlhf_helpers.logprobs import completion_log_probs
    from rlhf_helpers.losses import grpo_loss

    where = (batch.tokens, batch.attention_mask, batch.mask.shape[1])
    log_probs = completion_log_probs(model, *where, samples_per_prompt=config.samples_per_prompt)
    found = grpo_loss(
        log_probs,
        batch.old_log_probs,
        batch.advantages,
        batch.mask,
        config.clip,
        loss_type=config.loss_type,
        max_completion_length=config.max_new_tokens,
    )
    return value_and_norm(found.loss, model)


def trl_loss(trainer, batch, loss_type):
    trainer.loss_type, length = loss_type, batch.mask.shape[1]
    inputs = {
        "prompt_ids": batch.tokens[:, :-length],
        "prompt_mask": batch.attention_mask[:, :-length],
        "completion_ids": batch.tokens[:, -length:],
        "completion_mask": batch.mask.long(),
        "advantages": batch.advantages,
        "old_per_token_logps": batch.old_log_probs,
        "num_items_in_batch": batch.mask.sum(),
    }
    trainer.model.train()
    return value_and_norm(trainer.compute_loss(trainer.model, inputs), trainer.model)


def value_and_norm(loss, model):
    model.zero_grad()
    loss.backward()
    return [loss.item(), torch.nn.utils.get_total_norm(p.grad for p in model.parameters()).item()]


# --- rows ----------------------------------------------------------------------------------------


def by_group():
    """Both sides at several group sizes, the number of prompts fixed: dictionaries with "group",
    "side", "wall", "collect" and "update" (CPU seconds of a step), "memory" (MiB)."""
    return [{"group": size} | one for size in GROUPS for one in sides(f"group {size}")]


def by_prompt():
    """The same at several lengths of the prompts, "prompt" in tokens."""
    return [{"prompt": width} | one for width in PROMPTS for one in sides(f"prompt {width}")]


def sides(name):
    return [{"side": side} | measured(__file__, name, side) for side in SIDES]


def by_method():
    """A step of each method on the same number of sequences: dictionaries with "method", measured
    "memory" (MiB above the loaded policy) and "seconds" (CPU, with DPO's reference), and counted
    "counted_memory" (MiB, the policy's weights left out) and "operations"."""
    rows, work = [], WORKS["method"]
    for method in METHODS:
        found = measured(__file__, "method", method)
        seconds = found["collect"] + found["update"] + found["reference"]
        pairs = work.prompts * work.group // 2
        prompts, group = (pairs, 2) if method == "dpo" else (work.prompts, work.group)
        batch = costs.Batch(prompts, group, work.width, work.new)
        memory = costs.memory(work.config, method, batch, kl=False)
        rows.append(
            {
                "method": method,
                "seconds": seconds,
                "memory": found["memory"],
                "counted_memory": (sum(memory) - memory.policy) / 2**20,
                "operations": sum(costs.flops(work.config, method, batch, kl=False)),
            }
        )
    return rows


# --- tables --------------------------------------------------------------------------------------


def line(label, found, base):
    """A row of seconds and memory, and the same as multiples of another side's."""
    busy, other = (one["collect"] + one["update"] for one in (found, base))
    parts = f"{found['wall']:9.3f} s{found['collect']:9.3f} s{found['update']:9.3f} s{busy:9.3f} s"
    speeds = f"{base['wall'] / found['wall']:7.2f}x{other / busy:7.2f}x"
    memory = f"{found['memory']:8.0f} MiB {found['memory'] / base['memory']:.2f}x"
    print(f"{label:<34}{parts}{speeds}{memory}", flush=True)


def heading(title):
    print(f"\n{title}")
    print(
        f"{'':<34}{'wall':>11}{'collect':>11}{'update':>11}{'CPU, all':>11}"
        f"{'wall':>8}{'CPU':>8}{'memory':>12}",
        flush=True,
    )


def step_table(name):
    work = WORKS[name]
    heading(
        f"{work.title}: {work.prompts} prompts x {work.group} samples, {work.width} prompt and"
        f" {work.new} new tokens (goal: {work.goal})"
    )
    for place in ("", " on the GPU") if torch.cuda.is_available() else ("",):
        found = {side: measured(__file__, name, side + place) for side in SIDES}
        for side, one in found.items():
            line(side + place, one, found[TRL])


def loss_table():
    print("\nLoss and gradient norm on the same samples")
    for row in measured(__file__, "loss", OURS):
        (loss, norm), (other, other_norm) = row["ours"], row["trl"]
        print(
            f"{row['loss_type']:<10}{loss:12.8f}{other:12.8f} apart {abs(loss - other):.1e}   norm"
            f" {norm:.7f} {other_norm:.7f} apart {abs(norm - other_norm):.1e}",
            flush=True,
        )


def sweep_table(rows, name):
    heading(f"{SMALL.title}, by {name}")
    for one, other in zip(rows[::2], rows[1::2], strict=True):
        line(f"{name} {one[name]}, {one['side']}", one, other)
        line(f"{name} {one[name]}, {other['side']}", other, other)


def method_table():
    work = WORKS["method"]
    print(
        f"\n{work.title}: a step on {work.prompts * work.group} sequences, {work.width} prompt and"
        f" {work.new} new tokens"
    )
    for row in by_method():
        print(
            f"{row['method']:<10}{row['seconds']:8.3f} s CPU{row['operations'] / 1e9:9.1f} GFLOP"
            f" counted{row['memory']:8.0f} MiB{row['counted_memory']:8.0f} MiB counted",
            flush=True,
        )


TABLES = {
    "tiny": lambda: step_table("tiny"),
    "124M": lambda: step_table("124M"),
    "loss": loss_table,
    "group": lambda: sweep_table(by_group(), "group"),
    "prompt": lambda: sweep_table(by_prompt(), "prompt"),
    "method": method_table,
}

if __name__ == "__main__":
    main(child, lambda name: TABLES[name](), TABLES)
