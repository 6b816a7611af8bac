"""Whatever ends a script, its last line is a sentence, and its exit status says what happened."""

import re
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from sftlab.exit_messages import last_line, mistakes_in_one_line
from sftlab.schema import TEXT, check

ENDS = [
    (ValueError("the rank is 0"), "error: the rank is 0"),
    (ImportError("no module\nnamed wandb"), "error: no module named wandb"),
    (NotImplementedError("no backward on CPU"), "error: no backward on CPU"),
    (NotADirectoryError(20, "Not a directory", "a/b"), "error: a/b: Not a directory"),
    (
        RuntimeError("[enforce] DefaultCPUAllocator: can't allocate memory: 12 bytes"),
        "error: this machine's memory is full ([enforce] DefaultCPUAllocator",
    ),
    (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0"),
        "error: the GPU's memory is full (CUDA out of memory): `python recipes/plan.py`",
    ),
    (KeyError("loss"), "internal error: KeyError: 'loss' (a fault of this program; the traceback"),
    (TypeError("got foo"), "internal error: TypeError: got foo"),
]


@pytest.mark.parametrize(("error", "starts"), ENDS, ids=lambda one: type(one).__name__)
def test_the_last_line_is_a_sentence(error, starts):
    with pytest.raises(SystemExit) as ended, mistakes_in_one_line():
        raise error
    said = ended.value.code
    assert said.startswith(starts) and "\n" not in said
    if kept := re.search(r"the traceback is in (\S+):", said):
        assert type(error).__name__ in Path(kept[1]).read_text()
        Path(kept[1]).unlink()


def test_a_sentence_of_the_project_itself_is_no_fault_of_the_program():
    with pytest.raises(ValueError) as raised:
        check({}, "run.json", {"status": TEXT})
    assert last_line(raised.value) == "error: run.json has no status, expected a text"


def test_ctrl_c_is_one_line_and_130(capsys):
    with pytest.raises(SystemExit) as ended, mistakes_in_one_line():
        raise KeyboardInterrupt
    assert ended.value.code == 130
    assert capsys.readouterr().err == "stopped by Ctrl-C\n"


def test_the_traceback_is_printed_where_it_is_asked_for_or_cannot_be_kept(
    tmp_path, monkeypatch, capsys
):
    assert "in the lines above" in last_line(KeyError("x"), tmp_path / "nowhere" / "t.txt")
    assert "KeyError" in capsys.readouterr().err
    monkeypatch.setenv("SFTLAB_TRACEBACK", "1")
    with pytest.raises(SystemExit), mistakes_in_one_line():
        raise ValueError("the rank is 0")
    assert "Traceback" in capsys.readouterr().err


def test_every_script_ends_in_one_sentence():
    scripts = [p for d in ("eval", "app", "benchmarks", "slurm") for p in (ROOT / d).glob("*.py")]
    scripts += [ROOT / "recipes" / f"{name}.py" for name in ("plan", "doctor", "study")]
    # a worker's traceback is read by the process that started it
    mains = [p for p in scripts if "\n    main(" in p.read_text() and "worker" not in p.name]
    assert not [p.name for p in mains], "main() belongs under mistakes_in_one_line()"


def test_a_message_with_a_long_value_keeps_its_beginning_and_its_end():
    with pytest.raises(SystemExit) as ended, mistakes_in_one_line():
        raise ValueError(f"{'x' * 5000} is no folder")
    said = str(ended.value)
    assert said.startswith("error: xxx") and said.endswith("is no folder") and len(said) < 1300
