"""Train the shipped reward model again and store it in rlhf_helpers/assets/tiny-reward."""

import torch

from rlhf_helpers import settings
from rlhf_helpers.book import shipped


def main():
    torch.set_num_threads(1)
    shipped.fit_reward_model(settings.load()).save_pretrained(settings.TINY_REWARD)


if __name__ == "__main__":
    main()
