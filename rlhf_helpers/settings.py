"""The one switch: RLHF_SCALE=tiny runs offline on a CPU, RLHF_SCALE=gpt2 is meant for one GPU."""

from __future__ import annotations

import os
from dataclasses import dataclass

SCALES = ("tiny", "gpt2")


@dataclass(frozen=True)
class Settings:
    """What the notebooks of one scale share.

    Args:
        scale: "tiny" or "gpt2".
        device: where models live: "cpu", or "cuda" at scale gpt2 where there is a GPU.
    """

    scale: str
    device: str


def load() -> Settings:
    """Settings of the scale named by the environment variable RLHF_SCALE (default "tiny").

    Raises: ValueError on an unknown scale.
    """
    scale = os.environ.get("RLHF_SCALE", "tiny")
    if scale not in SCALES:
        raise ValueError(
            f"RLHF_SCALE={scale!r} is unknown; use one of {', '.join(map(repr, SCALES))}"
        )
    if scale == "tiny":
        return Settings(scale, "cpu")
    import torch

    return Settings(scale, "cuda" if torch.cuda.is_available() else "cpu")
