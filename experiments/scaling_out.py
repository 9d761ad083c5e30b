"""Record the runs and measurements of scaling_out: rlhf_helpers/assets/results/scaling_out.json.

With the word `costs`, seconds and memory of single steps alone are measured again, and put into the
file beside the curves that are there.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks import bench_grpo
from rlhf_helpers import models, scale_out, settings
from rlhf_helpers.algorithms import grpo, sampling
from rlhf_helpers.book.notebook import record_sweep
from rlhf_helpers.worlds import arithmetic

SEEDS = [0, 1, 2, 3, 4]
FEW_SEEDS = [0, 1, 2]
STEPS = 100
# what TRL is told of the settings; this book's loop may know more
USED = (
    "iterations",
    "prompts",
    "samples_per_prompt",
    "max_new_tokens",
    "temperature",
    "epochs",
    "mini_batches",
    "learning_rate",
    "warm_up",
    "max_grad_norm",
    "scale",
    "loss_type",
    "importance",
    "clip",
    "clip_high",
    "beta",
)
ROOT = Path(__file__).parents[1]
RECORD = ROOT / "rlhf_helpers" / "assets" / "results" / "scaling_out.json"


def arguments(seed, **change):
    """The command line of a run, without the folder."""
    given = {"steps": STEPS, "seed": seed} | change
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


def asked(seed=0, **change):
    return scale_out.parse(["--output", ".", *arguments(seed, **change)])


def settings_of(run):
    """What a run depends on besides its seed; a test holds the file to it."""
    args = asked()
    config = asdict(scale_out.config_of(args))
    return {
        "config": {name: config[name] for name in USED},
        "level": args.level,
        "held_out": args.held_out,
        "samples": scale_out.EVALUATION_SAMPLES,
        "evaluate_every": args.evaluate_every,
        "seeds": SEEDS,
        "few_seeds": FEW_SEEDS,
    }


def launched(processes, seed, **change):
    """A run of TRL's trainer in one process or two: its curve."""
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    launcher = [
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(scale_out.CONFIGS / "two_cpu_processes.yaml"),
    ]
    with tempfile.TemporaryDirectory() as folder:
        module = ["-m", "rlhf_helpers.scale_out", "--output", folder, *arguments(seed, **change)]
        command = [sys.executable, *(launcher if processes == 2 else []), *module]
        subprocess.run(command, env=os.environ | environment, check=True, stderr=subprocess.DEVNULL)
        return json.loads((Path(folder) / "curve.json").read_text())


def this_book(seed):
    """The same run with this book's own loop."""
    args = asked(seed)
    policy, tokenizer = models.load(args.model)
    problems, held_out = scale_out.problems_of(args)
    given = [one.prompt for one in problems], arithmetic.exact, scale_out.config_of(args)
    answers = {"answer": [one.answer for one in problems]}
    begin, curve, reward = time.perf_counter(), [], []

    def measure(step):
        where = (held_out, scale_out.EVALUATION_SAMPLES, args.max_new_tokens, 1000 + seed)
        right = sampling.solve(policy, tokenizer, *where)
        curve.append({"step": step, "pass_at_1": arithmetic.pass_at_k(right, 1)})

    measure(0)
    for metrics in grpo.train(policy, tokenizer, *given, answers):
        reward.append(metrics.reward)
        if metrics.iteration % args.evaluate_every == 0:
            measure(metrics.iteration)
    seconds = round(time.perf_counter() - begin, 1)
    return {"seconds": seconds, "reward": reward, "curve": curve}


def brief(found):
    """What the chapter draws; four digits will do."""
    return {
        "seconds": found["seconds"],
        "steps": [point["step"] for point in found["curve"]],
        "pass_at_1": [round(point["pass_at_1"], 4) for point in found["curve"]],
        "reward": [round(value, 4) for value in found["reward"]],
    }


def costs():
    """What a step needs; the rest of the record does not depend on it."""
    return {
        "by_group": bench_grpo.by_group(),
        "by_prompt": bench_grpo.by_prompt(),
        "by_method": bench_grpo.by_method(),
    }


def renew_costs():
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    record["results"] |= costs()
    RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def main():
    if sys.argv[1:] == ["costs"]:
        renew_costs()
        return
    if sys.argv[1:]:
        raise SystemExit(f"{' '.join(sys.argv[1:])}: unknown; write costs, or nothing for all")
    torch.set_num_threads(1)
    start = time.perf_counter()

    def told(name, found):
        found = brief(found)
        print(f"{time.perf_counter() - start:5.0f} s  {name}: {found['pass_at_1'][-1]}", flush=True)
        return found

    results = {
        "one": [told(f"one process, seed {s}", launched(1, s)) for s in SEEDS],
        "two": [told(f"two processes, seed {s}", launched(2, s)) for s in SEEDS],
        "this book": [told(f"this book, seed {s}", this_book(s)) for s in SEEDS],
        "twice the batch": [
            told(f"twice the batch, seed {s}", launched(2, s, prompts=64)) for s in FEW_SEEDS
        ],
    } | costs()
    record_sweep("scaling_out", start, settings_of(settings.load()), results)


if __name__ == "__main__":
    main()
