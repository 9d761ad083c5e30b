"""Cells that take tensors from TRL, which moves them to a GPU where there is one, at every scale.

There need not be one here: tensors of the device "meta" have a shape and no values, and an
operation on two devices is an error as on a machine with a GPU.
"""

import types

import nbrun
import pytest
import torch

from rlhf_helpers import settings

CELLS = {
    cell.id: cell.source
    for cell in nbrun.read(nbrun.ROOT / "notebooks" / "scaling_out.ipynb").cells
}


class Reached(Exception):
    """The cell has come as far as the test goes."""


class Model(torch.nn.Module):
    def __init__(self, device):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones((), device=device))


def scored(model, tokens, mask, length, **options):
    """Log-probabilities where the model is, if tokens and mask are there too."""
    assert model.weight.device == tokens.device == mask.device
    return model.weight * torch.ones(len(tokens), length, device=tokens.device)


def lost(log_probs, old, advantages, mask, **options):
    loss = (log_probs - old) * mask * advantages[:, None]
    return types.SimpleNamespace(loss=loss.sum())


def names(device):
    """What the cells before have left."""
    whole = torch.ones(8, 3, dtype=torch.long, device=device)
    ids = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
    return {
        "torch": torch,
        "settings": settings,
        "sampled": dict.fromkeys(ids, whole) | {"advantages": torch.ones(8, device=device)},
        "mask": whole.bool(),
        "completion_log_probs": scored,
        "losses": types.SimpleNamespace(grpo_loss=lost),
    }


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_loss_of_a_batch_is_computed_where_that_batch_is(device):
    """Oracle: PyTorch's own rule that one operation has one device."""

    def stop(model, batch):
        raise Reached

    trainer = types.SimpleNamespace(_compute_loss=stop)
    cell = names(device) | {"adder": Model(device), "trainer": trainer}
    with pytest.raises(Reached):
        exec(CELLS["c023"], cell)
    assert cell["ours"].loss.device.type == device


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_model_that_judges_halves_of_a_batch_is_where_that_batch_is(device):
    """Oracle: the same rule."""

    def load(name, device="cpu"):
        return Model(device), None

    cell = names(device) | {"models": types.SimpleNamespace(load=load)}
    exec(CELLS["c028"], cell)
    exec(CELLS["c028-a"], cell)
    exec(CELLS["c029"].partition("\n\n\n")[0], cell)
    assert cell["slope"](cell["order"][:4], "bnpo").device.type == device
