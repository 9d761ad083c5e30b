"""Train the reward model of chapter 06 again and store it in rlhf_helpers/assets/tiny-reward."""

import torch

from rlhf_helpers import settings
from rlhf_helpers.algorithms import reward_model


def main():
    torch.set_num_threads(1)
    reward_model.fit(settings.load()).save_pretrained(settings.TINY_REWARD)


if __name__ == "__main__":
    main()
