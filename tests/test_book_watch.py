"""A run that is watched: the progress bar and the curves."""

import sys

import pytest

from rlhf_helpers.algorithms import ppo
from rlhf_helpers.book.watch import watch


def metrics(iteration):
    values = dict.fromkeys(ppo.Metrics._fields, 0.5)
    return ppo.Metrics(**values | {"iteration": iteration, "score": 1.25, "kl": 3.5})


def test_the_bar_shows_score_and_kl_and_passes_everything_on(capsys):
    history = [metrics(i) for i in (1, 2, 3)]
    assert list(watch(iter(history), 3)) == history
    bar = capsys.readouterr().err
    assert "3/3" in bar
    assert "score 1.25, KL 3.5 nats" in bar


def test_curves_go_to_tensorboard_where_it_is_installed(tmp_path, monkeypatch):
    """Oracle: a writer that keeps what it is given; without the library, the fix is named."""
    written = []
    writer = type(
        "Writer",
        (),
        {
            "__init__": lambda self, folder: written.append(folder),
            "add_scalar": lambda self, *row: written.append(row),
            "close": lambda self: written.append("closed"),
        },
    )
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", type(sys)("fake"))
    sys.modules["torch.utils.tensorboard"].SummaryWriter = writer
    list(watch(iter([metrics(1), metrics(2)]), 2, tmp_path))
    assert written[0] == str(tmp_path)
    assert ("kl", 3.5, 2) in written
    assert written[-1] == "closed"
    assert len(written) == 2 + 2 * len(ppo.Metrics._fields)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match="pip install tensorboard"):
        next(watch(iter([metrics(1)]), 1, tmp_path))


@pytest.mark.parametrize("end", ["read", "left", "failed"])
def test_the_writer_is_closed_however_the_run_ends(monkeypatch, end):
    """Oracle: a writer that counts how often it was opened and closed."""
    calls = []
    methods = {
        "__init__": lambda self, folder: calls.append("open"),
        "add_scalar": lambda self, *row: None,
        "close": lambda self: calls.append("close"),
    }
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", type(sys)("fake"))
    sys.modules["torch.utils.tensorboard"].SummaryWriter = type("Writer", (), methods)

    def history():
        yield metrics(1)
        if end == "failed":
            raise RuntimeError("stopped")
        yield metrics(2)

    run = watch(history(), 2, "runs")
    next(run)
    if end == "left":
        run.close()
    elif end == "failed":
        with pytest.raises(RuntimeError, match="stopped"):
            next(run)
    else:
        assert len(list(run)) == 1
    assert calls == ["open", "close"]
