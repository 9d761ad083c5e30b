"""The vectorised bandit against a loop that pulls one arm at a time: the same rewards in
distribution, two speeds."""

import os
import platform
import time

import torch

from rlhf_helpers.worlds.bandits import ten_arms

PULLS = 100_000


def one_at_a_time(means, actions, generator):
    rewards = []
    for action in actions:
        rewards.append(means[action].item() + torch.randn(1, generator=generator).item())
    return rewards


def seconds(call, repeats):
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def main():
    bandit = ten_arms(1)
    means = bandit.means[0]
    generator = torch.Generator().manual_seed(0)
    actions = torch.randint(10, (1, PULLS), generator=generator)
    loop = seconds(lambda: one_at_a_time(means, actions[0], generator), 3)
    batch = seconds(lambda: bandit.pull(actions, generator), 20)
    print(
        f"{PULLS:,} pulls of a ten-armed bandit; {platform.processor() or platform.machine()},"
        f" {os.cpu_count()} cores"
    )
    print(f"{'one arm at a time':<20}{loop * 1e3:10.1f} ms")
    print(f"{'vectorised':<20}{batch * 1e3:10.2f} ms")
    print(f"{'ratio':<20}{loop / batch:10.0f} x   (goal: 20 or more)")


if __name__ == "__main__":
    main()
