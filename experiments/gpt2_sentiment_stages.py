"""Record the three stages in a row, requests to SFT model to reward model to PPO, for annotators
who were asked two things: rlhf_helpers/assets/results/gpt2_sentiment_stages.json."""

import copy
import time
from dataclasses import asdict, replace

import torch

from rlhf_helpers import models, preferences, rewards, settings, worlds
from rlhf_helpers.algorithms import ppo, sampling, sft
from rlhf_helpers.algorithms import reward_model as rm
from rlhf_helpers.book.notebook import record_sweep
from rlhf_helpers.worlds.reviews import kept_back

SEEDS = [0, 1, 2, 3]
PAIRS = 1000
PASSES = 3  # of the reward model over the pairs
JUDGED = 300  # held-out pairs
ASKED = 2000  # requests that PPO takes its prompts from
HELD_OUT = 250  # requests, two responses each; of all kinds
# What following the request is worth to annotators who were asked for it, in units of quality,
# which goes from −2 to 2: the smallest weight at which no praise makes up for not following.
OBEDIENCE = 4.0
ANNOTATORS = {"praise": 0.0, "praise and obedience": OBEDIENCE}
CONTROL_SEEDS = SEEDS[:3]  # that also train without a reward model
RESPONSES = 2
CURVES = ("score", "kl", "explained_variance", "length")


def settings_of(run):
    """What a run depends on besides its seed; a test holds the file to it."""
    return {
        "sft": asdict(sft.Config(**sft.AT_SCALE[run.scale]))
        | {"examples": sft.EXAMPLES[run.scale]},
        "reward": asdict(rm.Config(**rm.AT_SCALE[run.scale], epochs=PASSES)),
        "ppo": asdict(ppo.Config(**ppo.AT_SCALE[run.scale])),
        "temperature": run.annotator_temperature,
        "seeds": SEEDS,
        "pairs": [PAIRS, JUDGED],
        "requests": [ASKED, HELD_OUT, RESPONSES],
        "annotators": ANNOTATORS,
        "control_seeds": CONTROL_SEEDS,
    }


def requests_of(world, split, count, seed=0):
    """As many requests of the kinds that the model is fine-tuned on."""
    found = (one for one in world.instructions(split, 2 * count, seed) if not kept_back(one))
    return [one for one, _ in zip(found, range(count), strict=False)]


class Bench:
    """What all runs of one seed share, the SFT model included."""

    def __init__(self, seed):
        self.run, self.seed, self.start = settings.load(), seed, time.perf_counter()
        self.model, self.tokenizer = models.load(self.run.model)
        self.world, self.quality = worlds.load(self.run.world), rewards.true_utility(self.run)
        self.requests = {"train": requests_of(self.world, "train", ASKED, seed)}
        self.requests["held_out"] = self.world.instructions("held_out", HELD_OUT)
        # a request is known by its prompt
        self.known = {one.prompt: one for some in self.requests.values() for one in some}
        self.sft = self.fine_tuned()
        self.pairs = self.sampled("train", PAIRS), self.sampled("held_out", JUDGED)

    def fine_tuned(self):
        policy, config = copy.deepcopy(self.model), sft.Config(**sft.AT_SCALE[self.run.scale])
        drawn = self.world.instructions("train", sft.EXAMPLES[self.run.scale], self.seed)
        examples = [(one.prompt, one.response) for one in drawn if not kept_back(one)]
        for _ in sft.train(policy, self.tokenizer, examples, replace(config, seed=self.seed)):
            pass
        return policy

    def sampled(self, split, count):
        """Pairs of responses of the SFT model to requests."""
        prompts = [one.prompt for one in requests_of(self.world, split, count, self.seed + 1)]
        self.known |= {
            one.prompt: one for one in requests_of(self.world, split, count, self.seed + 1)
        }
        luck = torch.Generator().manual_seed(self.seed)
        limit = self.run.max_new_tokens
        return preferences.sample_pairs(self.sft, self.tokenizer, prompts, limit, luck)

    def followed(self, prompts, completions, **columns):
        """1 for a response that follows its request, else 0."""
        both = zip(prompts, completions, strict=True)
        return [float(self.world.follows(self.known[p], text)) for p, text in both]

    def utility(self, weight):
        """What the annotators want: quality, and so much for following the request."""

        def wanted(prompts, completions, **columns):
            both = (judge(prompts, completions) for judge in (self.quality, self.followed))
            return [q + weight * f for q, f in zip(*both, strict=True)]

        return wanted

    def reward_model(self, weight):
        """Trained on what the annotators say of the pairs; its accuracy on held-out ones, and on
        those of which one response follows the request: how often that one scores higher."""
        utility, train, held_out = self.utility(weight), *self.pairs
        people = preferences.crowd(self.run.annotator_temperature)
        said = preferences.annotate(*train, utility, people, self.seed).preferences
        model, _ = rm.load(self.sft, self.tokenizer)
        config = rm.Config(**rm.AT_SCALE[self.run.scale], epochs=PASSES, seed=self.seed)
        for _ in rm.train(model, self.tokenizer, rm.labelled(*train, said.mean(1)), config):
            pass
        truth = preferences.choice_probabilities(*held_out, utility, people[:1])[:, 0, 0]
        scores = [rm.scores(model, self.tokenizer, held_out[0], x) for x in held_out[1:]]
        gaps = (scores[0] - scores[1]).double()
        one, two = (torch.tensor(self.followed(held_out[0], x)).double() for x in held_out[1:])
        found = {}
        for name, right in (("accuracy", truth - 0.5), ("sees_following", one - two)):
            told = right != 0
            share = rm.accuracy(gaps[told], (right[told] > 0).double())
            found[name] = round(share, 4)
        return model, found

    def judged(self, policy, judge=None):
        """What is true of a policy's responses to held-out requests."""
        config = replace(ppo.Config(**ppo.AT_SCALE[self.run.scale]), samples_per_prompt=RESPONSES)
        prompts = [one.prompt for one in self.requests["held_out"]]
        judges = {"quality": self.quality, "followed": self.followed}
        if judge is not None:
            judges["reward"] = rm.as_reward(judge, self.tokenizer)
        found = sampling.evaluate(
            policy, self.sft, self.tokenizer, prompts, judges, config, seed=1000 + self.seed
        )
        means = {name: round(values.mean().item(), 4) for name, values in found.scores.items()}
        rows = zip(prompts[:3], found.texts[: 3 * RESPONSES : RESPONSES], strict=True)
        return means | {
            "kl": round(found.kl.mean().item(), 3),
            **self.by_kind(prompts, found.scores["followed"]),
            "texts": [list(row) for row in rows],
        }

    def by_kind(self, prompts, followed):
        """Share of the requests that are followed: by stars asked for, and of the kinds that no
        stage has seen."""
        kinds = [self.known[p] for p in prompts for _ in range(RESPONSES)]
        stars = torch.tensor([one.stars for one in kinds])
        new = torch.tensor([kept_back(one) for one in kinds])
        by_stars = [round(followed[stars == n].mean().item(), 4) for n in range(1, 6)]
        return {"by_stars": by_stars, "followed_new": round(followed[new].mean().item(), 4)}

    def trained(self, reward):
        """The SFT model after PPO, and its curves."""
        config = ppo.Config(**ppo.AT_SCALE[self.run.scale], seed=self.seed)
        policy = copy.deepcopy(self.sft)
        prompts = [one.prompt for one in self.requests["train"]]
        history = list(ppo.train(policy, self.tokenizer, prompts, reward, config))
        return policy, {n: [round(getattr(one, n), 4) for one in history] for n in CURVES}


def stages(seed):
    """All of one seed: the SFT model, and for each kind of annotators the reward model's accuracy
    and the policy after PPO."""
    bench = Bench(seed)
    found = {"pretrained": bench.judged(bench.model), "sft": bench.judged(bench.sft)}
    for name, weight in ANNOTATORS.items():
        judge, accuracy = bench.reward_model(weight)
        policy, curves = bench.trained(rm.as_reward(judge, bench.tokenizer))
        before = bench.judged(bench.sft, judge)["reward"]
        end = bench.judged(policy, judge)
        found[name] = accuracy | {"reward_before": before, "end": end, "curves": curves}
        print(f"{time.perf_counter() - bench.start:5.0f} s  seed {seed}  {name}", flush=True)
        print(accuracy, before, end, flush=True)
    return found


def without_a_reward_model(seed):
    """PPO on what the annotators of both want itself: what their wish does if nothing is lost on
    the way through comparisons and a reward model."""
    bench = Bench(seed)
    policy, curves = bench.trained(bench.utility(OBEDIENCE))
    return {"end": bench.judged(policy), "curves": curves}


def main():
    torch.set_num_threads(1)
    started = time.perf_counter()
    results = {
        "obedience": OBEDIENCE,
        "runs": [stages(seed) for seed in SEEDS],
        "without a reward model": [without_a_reward_model(seed) for seed in CONTROL_SEEDS],
    }
    record_sweep("gpt2_sentiment_stages", started, settings_of(settings.load()), results)


if __name__ == "__main__":
    main()
