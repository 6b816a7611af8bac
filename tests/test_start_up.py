"""The benchmark of a training's start: its parts, its caches, and a training that fails."""

import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT, load_script

from sftlab.models.random_models import make_random_files
from sftlab.tables import read_csv

script = load_script("benchmarks/start_up.py")
ARGUMENTS = SimpleNamespace(
    launch="cpu", shape="tiny", rows=2, longest=64, config="recipes/llama3.2-1b/attn_r16.yaml"
)
PHASES = (
    *("imports", "recipe_and_run_directory", "reading_the_data", "encoding_the_rows", "weights"),
    *("adapter_and_trainer", "rest_of_the_kernels", "checks_of_the_first_step", "first_step"),
)


@pytest.mark.long
def test_every_part_of_a_start_is_measured(monkeypatch, tmp_path, capsys):
    given = ["--launch", "cpu", "--shape", "tiny", "--rows", "2", "--longest", "64"]
    given += ["--repeats", "1", "--commands", "accelerate", "--lora_r", "2", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["start_up.py", *given])
    script.main()
    rows = read_csv(tmp_path / "start_up.csv")
    assert {row["caches"] for row in rows} == {"cold", "warm"}
    for state in script.STATES:
        of = {row["part"]: row for row in rows if row["caches"] == state}
        seconds = {part: float(row["seconds"] or 0) for part, row in of.items()}
        # accelerate imports torch before it starts the trainer
        assert seconds["launcher"] > 0.3 and seconds["imports"] > 0.3
        own = list(of)[1 : list(of).index("step 2")]
        assert own == [*PHASES] and min(seconds[part] for part in own) >= 0
        number = int(of[script.NUMBER]["step"])
        steps = sum(seconds[f"step {step}"] for step in range(2, min(number, 10) + 1))
        parts = seconds["launcher"] + sum(seconds[part] for part in own) + steps
        if number <= 10:  # where other work slows the machine, steps may settle later
            assert parts == pytest.approx(seconds["total"], rel=0.1)
        assert "CPU cores" in of["total"]["hardware"] and "torch" in of["total"]["versions"]
    shown = capsys.readouterr().out
    assert "first_full_speed_step" in shown and "accelerate, warm" in shown


@pytest.mark.long
def test_a_training_that_fails_is_an_error_with_its_last_line(tmp_path):
    make_random_files("tiny", 64)
    words = script.typed("python", ARGUMENTS, tmp_path / "run", ["--no_such_field", "1"])
    with pytest.raises(ValueError, match=r"status 1: error: .*no_such_field"):
        script.start(words, tmp_path / "run", tmp_path)


def test_the_first_step_at_full_speed_is_the_first_near_the_median_of_later_ones(monkeypatch):
    taken = {2: 3.0, 3: 0.9, 4: 0.12, 5: 0.5} | dict.fromkeys(range(6, 21), 0.1)
    ends = {1: 1000.0}
    for step, seconds in taken.items():
        ends[step] = ends[step - 1] + seconds
    monkeypatch.setattr(script, "logged", lambda run: ends)
    monkeypatch.setattr(script, "read_run", lambda run: {"measured": {"start_s": {"imports": 5.0}}})
    parts = script.parts_of((980.0, ROOT, 2.0))
    assert parts[script.NUMBER] == 4 and parts["launcher"] == 2.0 and parts["imports"] == 5.0
    assert parts[script.TOTAL] == pytest.approx(20 + 3.0 + 0.9 + 0.12)


def test_cold_starts_find_no_caches(tmp_path):
    words = [sys.executable, "-c", "import os; print({n: os.environ[n] for n in os.environ})"]
    with pytest.raises(ValueError, match="the training ended with status 0") as refused:
        script.start(words, tmp_path / "cold", tmp_path)
    for name in script.CACHES:
        assert f"'{name}': '{tmp_path / name.lower()}'" in str(refused.value)
