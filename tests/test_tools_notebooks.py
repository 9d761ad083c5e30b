"""Running, measuring and storing notebooks."""

import json

import nbformat
import nbrun
import pytest
import refresh
import run_copies
from nbclient.exceptions import CellExecutionError


def write_notebook(path, *sources):
    path.parent.mkdir(parents=True, exist_ok=True)
    nbrun.write(
        nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources]),
        path,
    )
    return path


def test_execute_leaves_the_file_alone_and_measures_the_kernel(tmp_path):
    path = write_notebook(
        tmp_path / "a.ipynb", "block = bytearray(300 * 2**20)", "print(len(block) // 2**20)"
    )
    before = path.read_text()
    own = bytearray(600 * 2**20)  # what this process holds is not the kernel's
    nb, seconds, peak = nbrun.execute(path)
    del own
    assert path.read_text() == before
    assert [cell.execution_count for cell in nb.cells] == [1, 2]
    assert nb.cells[1].outputs[0]["text"] == "300\n"
    assert seconds > 0
    assert 300 < peak < 600


def test_a_failing_cell_is_an_error(tmp_path):
    with pytest.raises(CellExecutionError, match="no such luck"):
        nbrun.execute(write_notebook(tmp_path / "a.ipynb", "raise RuntimeError('no such luck')"))


def test_storing_twice_gives_the_same_bytes(tmp_path):
    path = write_notebook(
        tmp_path / "a.ipynb", "import pylab\npylab.plot([1, 2])\npylab.show()", "object()"
    )
    stored = []
    for _ in range(2):
        refresh.refresh(path, "tiny", recording=True, measured=tmp_path / "measured.json")
        stored.append((path.read_bytes(), (tmp_path / "measured.json").read_bytes()))
    assert stored[0] == stored[1]
    assert b"image/png" in stored[0][0]


def test_only_what_was_measured_differs_and_stays(tmp_path):
    """Oracle: the stored text; one notebook counts its runs in seconds, one otherwise."""
    count = "import os\nn = int(os.environ['RUNS'])"
    for sentence, kept in (("this run, {n} s, {n:.1f} CPU s", True), ("run {n}", False)):
        path = write_notebook(tmp_path / "a.ipynb", count, f"print(f'{sentence}')")
        texts = []
        for runs in ("3", "4"):
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("RUNS", runs)
                refresh.refresh(path, "tiny")
            texts.append(nbrun.read(path).cells[1].outputs[0].text)
        assert (texts[0] == texts[1]) == kept


def test_a_measurement_is_rounded_up_with_room_to_spare():
    assert refresh.rung(10.0, None, refresh.SECONDS) == 15
    assert refresh.rung(1e9, None, refresh.SECONDS) == refresh.SECONDS[-1]


def test_the_recorded_value_stays_while_it_still_describes_the_run():
    assert [refresh.rung(measured, 20, refresh.SECONDS) for measured in (8.1, 14, 20)] == [
        20,
        20,
        20,
    ]
    assert refresh.rung(20.1, 20, refresh.SECONDS) == 30
    assert refresh.rung(3.0, 20, refresh.SECONDS) == 10


@pytest.mark.parametrize(
    "ladder", [refresh.SECONDS, refresh.MEBIBYTES], ids=["seconds", "mebibytes"]
)
def test_measuring_the_same_again_never_changes_the_record(ladder):
    for tenths in range(ladder[0] * 5, ladder[-1] * 7, 7):
        value = refresh.rung(tenths / 10, None, ladder)
        assert refresh.rung(tenths / 10, value, ladder) == value


def test_record_keeps_other_chapters_and_says_whether_it_wrote(tmp_path):
    path = tmp_path / "measured.json"
    path.write_text(json.dumps({"other": {"tiny": {"seconds": 5}}}))
    assert refresh.record("a", "tiny", 6.0, 250.0, path)
    assert not refresh.record("a", "tiny", 7.5, 260.0, path)
    table = json.loads(path.read_text())
    assert table["other"] == {"tiny": {"seconds": 5}}
    assert table["a"]["tiny"]["seconds"] == 10
    assert table["a"]["tiny"]["memory_mib"] == 400


def test_an_unknown_notebook_is_refused_with_the_known_names():
    with pytest.raises(SystemExit, match="no notebook none; there are bandit, "):
        refresh.main(["none"])


def test_a_notebook_is_found_by_name_file_or_path():
    paths = [nbrun.chosen([name]) for name in ("bandit", "bandit.ipynb", "notebooks/bandit.ipynb")]
    assert paths == [[nbrun.ROOT / "notebooks" / "bandit.ipynb"]] * 3


def test_time_is_recorded_only_when_asked_for(tmp_path):
    path = write_notebook(tmp_path / "a.ipynb", "1 + 1")
    refresh.refresh(path, "tiny", measured=tmp_path / "measured.json")
    assert not (tmp_path / "measured.json").exists()
    assert nbrun.read(path).cells[0].outputs


def test_copies_leave_the_sources_alone(tmp_path):
    source = write_notebook(tmp_path / "notebooks" / "a.ipynb", "print(6 * 7)")
    for name in ("_config.yml", "_toc.yml"):
        (tmp_path / name).write_text("")
    before = source.read_text()
    assert run_copies.main(tmp_path) == 0
    assert source.read_text() == before
    assert "42" in (tmp_path / "_build" / "run" / "notebooks" / "a.ipynb").read_text()


def test_every_copy_is_tried_and_every_failure_told(tmp_path, capsys):
    """A cell's own error, a kernel that dies, and a notebook that runs, in this order."""
    write_notebook(tmp_path / "notebooks" / "a.ipynb", "1 / 0")
    write_notebook(tmp_path / "notebooks" / "b.ipynb", "import os\nos._exit(3)")
    write_notebook(tmp_path / "notebooks" / "c.ipynb", "print(6 * 7)")
    for name in ("_config.yml", "_toc.yml"):
        (tmp_path / name).write_text("")
    assert run_copies.main(tmp_path) == 1
    errors = capsys.readouterr().err
    assert "ZeroDivisionError" in errors
    assert errors.endswith("failed: a, b\n")
    assert "42" in (tmp_path / "_build" / "run" / "notebooks" / "c.ipynb").read_text()


def test_figures_do_not_depend_on_the_environment(tmp_path, monkeypatch):
    """Oracle: a picture in the stored output, without the book's set-up cell."""
    monkeypatch.setenv("MPLBACKEND", "Agg")
    path = write_notebook(tmp_path / "a.ipynb", "import pylab\npylab.plot([1, 2])\npylab.show()")
    nb, _, _ = nbrun.execute(path)
    assert "image/png" in nb.cells[0].outputs[-1].data
