"""What a killed process left of a folder is removed; what a running one writes is not."""

import socket
import subprocess
import sys

import pytest
from conftest import ROOT

from sftlab.export.unfinished_folder import unfinished_folder

KILLED = """
import os, pathlib, signal, sys
from sftlab.export.unfinished_folder import unfinished_folder
with unfinished_folder(pathlib.Path(sys.argv[1]), print) as folder:
    (folder / "weights").write_text("a part")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_a_killed_process_left_is_removed(tmp_path, capsys):
    for name in ("mine", "mine-unfinished-too"):
        subprocess.run([sys.executable, "-c", KILLED, tmp_path / name], cwd=ROOT, check=False)
    assert len(names(tmp_path)) == 2
    with unfinished_folder(tmp_path / "mine", print):
        pass
    other, mine = names(tmp_path)
    assert mine == "mine" and other.startswith(".mine-unfinished-too-unfinished-")
    assert f"removed {tmp_path / '.mine-unfinished-'}" in capsys.readouterr().out


def test_what_a_running_process_writes_stays(tmp_path, capsys):
    out = tmp_path / "mine"
    with unfinished_folder(out, print) as first:
        (first / "weights").write_text("a part")
        with pytest.raises(RuntimeError), unfinished_folder(out, print):
            raise RuntimeError
        assert names(tmp_path) == [first.name] and (first / "weights").exists()
    assert names(tmp_path) == ["mine"] and not capsys.readouterr().out


def test_what_another_host_left_is_named(tmp_path, capsys):
    left = tmp_path / f".mine-unfinished-not-{socket.gethostname()}-abcdefgh"
    left.mkdir()
    with unfinished_folder(tmp_path / "mine", print):
        pass
    assert f"{left} is unfinished: remove it if nothing on not-" in capsys.readouterr().out
    assert left.is_dir()
