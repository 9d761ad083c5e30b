"""A run that is watched while it goes on: a progress bar, and curves for TensorBoard."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from rlhf_helpers._validate import check_folder, has, in_range
from rlhf_helpers.algorithms.ppo import Metrics


def watch(
    history: Iterator[Metrics], iterations: int, folder: str | Path | None = None
) -> Iterator[Metrics]:
    """The same metrics, with a progress bar in text and, if wanted, as curves for TensorBoard.

    Args:
        history: what `train` returns.
        iterations: how many there will be.
        folder: where TensorBoard's files go; None writes none.
    Raises: ImportError if a folder is given and tensorboard is not installed.
    """
    has(history, "history", "what train returns", "__iter__")
    in_range(iterations, "iterations", 1)
    writer = None
    if folder is not None:
        check_folder(folder)
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError("folder needs TensorBoard: run pip install tensorboard") from error
        writer = SummaryWriter(str(folder))
    try:
        with tqdm(total=iterations, unit="iteration") as bar:
            for metrics in history:
                has(metrics, "history", "what train returns", "score", "kl", "iteration")
                bar.set_postfix_str(f"score {metrics.score:.2f}, KL {metrics.kl:.1f} nats")
                bar.update()
                if writer is not None:
                    for name, value in metrics._asdict().items():
                        writer.add_scalar(name, value, metrics.iteration)
                yield metrics
    finally:
        if writer is not None:
            writer.close()
