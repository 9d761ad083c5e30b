"""Record the sweeps of gpt2_sentiment_ppo over seeds, prices of KL and ablations:
rlhf_helpers/assets/results/gpt2_sentiment_ppo.json."""

import copy
import math
import time
from dataclasses import asdict, replace

import torch

from rlhf_helpers import models, rewards, settings, worlds
from rlhf_helpers.algorithms import ppo, reward_model, sampling, sft
from rlhf_helpers.algorithms._loop import TrainingStopped, prompt_indices, set_learning_rate
from rlhf_helpers.book import shipped
from rlhf_helpers.book.notebook import record_sweep
from rlhf_helpers.rollout import write
from rlhf_helpers.worlds import enumerable

SEEDS = [0, 1, 2, 3, 4]
SWEEP_SEEDS = [0, 1, 2]
BETAS = [0.0, 0.001, 0.002, 0.005, 0.02, 0.2, 0.5]  # and the one of the settings
CHEAP = 0.003  # below this price it is asked whether the reward still tells samples apart
BEST_OF = [1, 2, 4, 8, 16, 32, 64, 128, 256]
TRAIN_PROMPTS = 2000
HELD_OUT = 64
PTX = [1.0, 0.1]  # weights of the fine-tuning loss
PTX_PRICE = 0.04  # of KL, where the lower weight drifts about as far as the main run
KL_TARGET = 3.0  # nats a sequence
QUICK_HORIZON = 100  # samples
FAR_PRICES = [0.5, 0.005]  # where the adaptive price starts
LONG = 30  # iterations without a price on KL
REINFORCE_RATE = 2e-3
REINFORCE = {"baseline": "group", "epochs": 1, "mini_batches": 1, "clip": math.inf}
EXACT = {
    "vocabulary": 6,
    "length": 4,
    "beta": 0.5,
    "structure": 0.8,
    "width": 64,
    "spread": 0.5,
    "every": 10,
}
CURVES = (
    "score",
    "kl",
    "kl_coefficient",
    "entropy",
    "clip_fraction",
    "approx_kl",
    "explained_variance",
    "grad_norm",
    "length",
    "distinct",
)


def config_of(run, seed=0):
    """The settings of the chapter's main run."""
    return ppo.Config(**ppo.AT_SCALE[run.scale], seed=seed)


def exact_config(seed=0):
    """PPO on the language whose every sequence is known; its one prompt is the empty one."""
    return ppo.Config(
        iterations=500,
        prompts=4,
        samples_per_prompt=64,
        max_new_tokens=EXACT["length"],
        learning_rate=3e-3,
        value_learning_rate=3e-3,
        lam=1.0,
        kl_coefficient=EXACT["beta"],
        seed=seed,
    )


def settings_of(run):
    """What a run depends on besides its seed; a test holds the file to it."""
    return {
        "config": asdict(config_of(run)),
        "reward": {
            "pairs": reward_model.PAIRS,
            "learning_rate": reward_model.AT_SCALE[run.scale]["learning_rate"],
        },
        "exact": EXACT | {"config": asdict(exact_config())},
        "seeds": SEEDS,
        "sweep_seeds": SWEEP_SEEDS,
        "betas": BETAS,
        "best_of": BEST_OF,
        "train_prompts": TRAIN_PROMPTS,
        "held_out": HELD_OUT,
        "ptx": PTX,
        "ptx_price": PTX_PRICE,
        "kl_target": KL_TARGET,
        "quick_horizon": QUICK_HORIZON,
        "far_prices": FAR_PRICES,
        "long": LONG,
        "reinforce": REINFORCE_RATE,
    }


def refreshed(policy, tokenizer, prompts, reward, config):
    """PPO whose reference is taken anew before each iteration, which removes the anchor."""
    run = ppo.start(policy, tokenizer, config)
    for index in range(config.iterations):
        run.reference = models.reference(copy.deepcopy(policy))
        set_learning_rate(run.optimizer, index, config.iterations, config.warm_up)
        chosen = prompt_indices(len(prompts), index, config)
        run.history.append(ppo.iterate(run, [prompts[i] for i in chosen], reward, config))
        yield run.history[-1]


def with_prompts(batch, run, config):
    """The batch as if the prompts, all but their first token, had been written by the policy."""
    length = batch.tokens.shape[1] - 1
    extra = length - batch.mask.shape[1]
    mask = torch.cat([torch.ones_like(batch.mask[:, :1]).expand(-1, extra), batch.mask], 1)
    where = (batch.tokens, batch.attention_mask, length)
    with torch.no_grad():
        old = ppo.completion_log_probs(run.policy, *where, config.temperature)
        values = run.value_model(*where)
        with run.reference() as reference:
            ref = ppo.completion_log_probs(reference, *where, config.temperature)
    shaped = ppo.kl_rewards(batch.scores, old, ref, mask, run.kl_coefficient)
    advantages, returns = ppo.advantages_of(shaped, values, mask, config)
    logs = (old, ref, values, shaped, advantages, returns)
    return ppo.Batch(*where[:2], mask, *logs, *batch[-3:])


def prompts_in_the_loss(policy, tokenizer, prompts, reward, config):
    """PPO that trains the tokens of the prompt as if they were actions."""
    lengths = [len(ids) for ids in tokenizer(prompts)["input_ids"]]
    usual = max(set(lengths), key=lengths.count)  # of one length, so that no padding is in the way
    prompts = [p for p, n in zip(prompts, lengths, strict=True) if n == usual]
    # rows of a prompt share their first token alone
    alone = replace(
        config, samples_per_prompt=1, prompts=config.prompts * config.samples_per_prompt
    )
    run = ppo.start(policy, tokenizer, config)
    for index in range(config.iterations):
        set_learning_rate(run.optimizer, index, config.iterations, config.warm_up)
        chosen = prompt_indices(len(prompts), index, config)
        batch = ppo.collect(run, [prompts[i] for i in chosen], reward, config)
        before = ppo.measure(run, batch, config)
        after = ppo.update(run, with_prompts(batch, run, config), alone)
        run.history.append(
            ppo.Metrics(index + 1, **before, **after, rollout_seconds=0.0, update_seconds=0.0)
        )
        yield run.history[-1]


# --- the runs ------------------------------------------------------------------------------------


class Bench:
    """What all runs share: the model, the prompts, the reward and the judges."""

    def __init__(self):
        self.run = settings.load()
        self.model, self.tokenizer = models.load(self.run.model)
        self.world = worlds.load(self.run.world)
        judge = shipped.reward_model(self.run)
        self.reward = reward_model.as_reward(judge, self.tokenizer)
        quality = rewards.true_utility(self.run)
        self.judges = {"reward": self.reward, "vader": rewards.vader, "quality": quality}
        self.prompts = self.world.openings("train", TRAIN_PROMPTS)
        self.held_out = self.world.openings("held_out", HELD_OUT)
        self.start = time.perf_counter()

    def judged(self, policy, config, seed, more=False):
        """What the judges say of a policy on the held-out prompts; `more` adds whether the learned
        reward still tells its samples apart."""
        found = sampling.evaluate(
            policy, self.model, self.tokenizer, self.held_out, self.judges, config, seed=1000 + seed
        )
        means = {name: round(values.mean().item(), 4) for name, values in found.scores.items()}
        surprise = sft.cross_entropy(policy, self.tokenizer, reviews_of(self.world))
        return means | {
            "kl": round(found.kl.mean().item(), 3),
            "distinct": round(len(set(found.texts)) / len(found.texts), 3),
            "surprise": round(surprise, 4),
            "texts": found.texts[:: config.samples_per_prompt][:5],
            **(spread_of(found) if more else {}),
        }

    def trained(self, name, seed, train=ppo.train, reward=None, ptx=(), more=False, **change):
        """One run: how it ends, its curves and its time; and what stopped it, if it was stopped."""
        config = replace(config_of(self.run, seed), **change)
        policy = copy.deepcopy(self.model)
        extra = {"ptx": ptx} if ptx else {}
        begin, history, stopped = time.perf_counter(), [], {}
        steps = train(policy, self.tokenizer, self.prompts, reward or self.reward, config, **extra)
        try:
            for metrics in steps:
                history.append(metrics)
        except TrainingStopped as stop:
            stopped = {"stopped": stop.name}
        took = time.perf_counter() - begin
        found = self.judged(policy, config, seed, more)
        now = time.perf_counter() - self.start
        print(f"{now:5.0f} s  {name}  seed {seed}  {took:.0f} s: {found}", flush=True)
        curves = {field: [round(getattr(one, field), 4) for one in history] for field in CURVES}
        return {"end": found, "curves": curves, "seconds": round(took), **stopped}

    def others(self):
        """Runs that differ from the main one, by name: the settings that differ."""
        pairs = reviews_of(self.world, "train", 2000)
        quick = {"kl_target": KL_TARGET, "kl_horizon": QUICK_HORIZON}
        return {
            "REINFORCE with baseline": REINFORCE | {"learning_rate": REINFORCE_RATE},
            "no price on KL": {"kl_coefficient": 0.0, "iterations": LONG},
            "adaptive KL": {"kl_target": KL_TARGET, "kl_horizon": 1000},
            "adaptive KL, from ten times the price": quick | {"kl_coefficient": FAR_PRICES[0]},
            "adaptive KL, from a tenth of the price": quick | {"kl_coefficient": FAR_PRICES[1]},
            "PPO-ptx": {"ptx": pairs, "ptx_coefficient": PTX[0]},
            "PPO-ptx, a tenth of the weight": {
                "ptx": pairs,
                "ptx_coefficient": PTX[1],
                "kl_coefficient": PTX_PRICE,
            },
            "no clipping": {"clip": math.inf},
            "no whitening": {"whiten": False},
            "no value function": {"baseline": "none"},
            "one epoch": {"epochs": 1},
            "reference refreshed": {"train": refreshed},
            "prompt tokens in the loss": {"train": prompts_in_the_loss},
        }


def other_runs(bench):
    """Five seeds of what is compared with the main run at its best, three of the rest."""
    return {
        name: [
            bench.trained(name, seed, **change)
            for seed in (SEEDS if name.startswith("REINFORCE") else SWEEP_SEEDS)
        ]
        for name, change in bench.others().items()
    }


# what the chapter reads, by key
RESULTS = {
    "start": lambda bench: bench.judged(bench.model, config_of(bench.run), 0, more=True),
    "best_of": lambda bench: best_of(
        bench.model, bench.tokenizer, bench.held_out, bench.judges, bench.run
    ),
    "main": lambda bench: [bench.trained("main", seed) for seed in SEEDS],
    "prices": lambda bench: BETAS,
    "betas": lambda bench: [
        [
            bench.trained(f"beta {beta}", seed, more=beta < CHEAP, kl_coefficient=beta)
            for seed in SWEEP_SEEDS
        ]
        for beta in BETAS
    ],
    "kl_target": lambda bench: KL_TARGET,
    "others": other_runs,
    "exact": lambda bench: [exact(seed) for seed in SWEEP_SEEDS],
}


def main():
    torch.set_num_threads(1)
    bench = Bench()
    results = {key: make(bench) for key, make in RESULTS.items()}
    record_sweep("gpt2_sentiment_ppo", bench.start, settings_of(bench.run), results)


def spread_of(found):
    """Of the samples of one policy: correlation of learned reward and true quality (0 if one of
    them is constant), standard deviation of the learned reward, share that was cut off."""
    both = torch.stack([found.scores["reward"], found.scores["quality"]]).double()
    cut = sum(isinstance(text, models.Cut) for text in found.texts) / len(found.texts)
    return {
        "correlation": round(torch.corrcoef(both)[0, 1].nan_to_num().item(), 4),
        "deviation": round(both[0].std().item(), 4),
        "unended": round(cut, 4),
    }


def exact(seed):
    """KL(π‖π*) and the share of the gap J(π*) − J(π_ref) that is closed, every few iterations."""
    language = enumerable.language(EXACT["vocabulary"], EXACT["length"])
    tokenizer = enumerable.tokenizer(language)
    utilities = enumerable.utilities(language, seed, EXACT["structure"])
    policy = enumerable.small_gpt2(
        EXACT["vocabulary"],
        EXACT["length"],
        seed=seed,
        width=EXACT["width"],
        spread=EXACT["spread"],
    )
    reference = enumerable.model_log_probs(policy, language).detach()
    rewards, beta = utilities.to(reference), EXACT["beta"]
    best = enumerable.optimal_policy(reference, rewards, beta)
    gap = [enumerable.regularised_objective(p, reference, rewards, beta) for p in (reference, best)]
    found = {"iteration": [0], "kl": [enumerable.kl(reference, best).item()], "closed": [0.0]}
    found["start"] = found["kl"][0]
    for metrics in ppo.train(
        policy, tokenizer, [""], enumerable.reward(language, utilities), exact_config(seed)
    ):
        if metrics.iteration % EXACT["every"] == 0:
            now = enumerable.model_log_probs(policy, language).detach()
            value = enumerable.regularised_objective(now, reference, rewards, beta)
            found["iteration"].append(metrics.iteration)
            found["kl"].append(round(enumerable.kl(now, best).item(), 5))
            found["closed"].append(round(((value - gap[0]) / (gap[1] - gap[0])).item(), 5))
    return found


def reviews_of(world, split="held_out", n=200):
    """(opening, rest) of whole reviews: what the language model was trained on before."""
    return [(r.opening, r.body) for r in world.sample(n, seed=7, split=split)]


def best_of(model, tokenizer, prompts, judges, run):
    """Mean score of the best of n samples a prompt, by the learned reward, and what others say of
    it."""
    most = BEST_OF[-1]
    texts = write(
        model,
        tokenizer,
        prompts,
        run.max_new_tokens,
        samples_per_prompt=most,
        generator=torch.Generator().manual_seed(5),
    )
    repeated = [p for p in prompts for _ in range(most)]
    scores = {
        n: rewards.score(judge, repeated, texts).view(-1, most) for n, judge in judges.items()
    }
    found = {}
    for n in BEST_OF:
        # the first n of every prompt, in groups that do not overlap
        groups = {name: values.view(len(prompts), -1, n) for name, values in scores.items()}
        best = groups["reward"].argmax(2, keepdim=True)
        found[n] = {
            name: round(values.gather(2, best).mean().item(), 4) for name, values in groups.items()
        }
    return found


if __name__ == "__main__":
    main()
