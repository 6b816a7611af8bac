"""Plans are judged by measured cells, a third of them held out."""

import json
import subprocess

import fork_server
import pytest
from conftest import ROOT, arguments, load_script

from sftlab.planning.accuracy_cells import CELLS, HELD_OUT
from sftlab.planning.gpu_specs import GPUS
from sftlab.planning.known_accuracy import known_accuracy


def test_predictions_are_made_anew_from_measured_rows(tmp_path):
    script = load_script("benchmarks/plan_accuracy.py")
    cell = CELLS[0]
    line = dict.fromkeys(("largest_tokens", "reason"), "") | {
        "cell": cell.name,
        "status": "succeeded",
        "peak_allocated_gb": "14.254",
        "tokens_per_s": "65926.5",
        "predicted_peak_gb": "999",
        "memory_error": "9",
        "held_out": "yes",
        "hardware": "NVIDIA H200",
        "host_us": "",
    }
    made = script.predicted(cell, line)
    assert cell.name == "1b attn bf16 512x16 single"
    assert abs(made["memory_error"]) < 0.05
    assert made["predicted_peak_gb"] < 20
    assert made["held_out"] == "no"
    # the plan is for a host of a given speed
    assert made["speed_error"] == "" and "unknown speed, not counted: 1 of 1" in script.summary(
        [made]
    )
    assert abs(script.predicted(cell, line | {"host_us": "2.78"})["speed_error"]) < 0.15
    waits = next(cell for cell in CELLS if cell.name == "1b all nf4 512x16 single checkpointed")
    speeds = [
        script.predicted(waits, line | {"host_us": us})["predicted_tokens_per_s"]
        for us in ("", "3.7", "7.4")
    ]
    assert speeds[0] == speeds[1] > 1.5 * speeds[2]
    ran_out = next(cell for cell in CELLS if cell.within_gb)
    made = script.predicted(
        ran_out,
        line
        | {
            "cell": ran_out.name,
            "status": "out of memory",
            "peak_allocated_gb": "",
            "tokens_per_s": "",
        },
    )
    assert (made["predicted_fits"], made["fits"], made["memory_error"]) == ("no", "no", "")
    assert "ran out of memory: none" in script.summary([made])
    assert "x" in script.summary([made | {"cell": "x", "predicted_fits": "yes"}]).splitlines()[-1]
    there = script.predicted(
        cell, line | {"hardware": "NVIDIA H100 80GB HBM3", "memory_error": "", "host_us": "3.7"}
    )
    assert (there["held_out"], there["limit_gb"]) == ("extrapolated", GPUS["h100-80"].memory_gb)
    assert there["predicted_tokens_per_s"] < script.predicted(cell, line)["predicted_tokens_per_s"]
    assert "speed, other GPUs: 0 of 1 within 15%" in script.summary([there])
    with pytest.raises(ValueError, match="no figures for 2 CPU cores"):
        script.predicted(cell, line | {"hardware": "2 CPU cores"})


def test_how_sure_goes_by_the_gpu_s_own_cells_where_there_are_some(tmp_path):
    rows = [
        "yes,0.01,-0.2,NVIDIA H200",
        "no,0.2,0.01,NVIDIA H200",
        "published,0.09,,",
        "extrapolated,0.06,0.1,NVIDIA H100 80GB HBM3",
        "extrapolated,0.04,,NVIDIA H100 80GB HBM3",
    ]

    path = tmp_path / "plan_accuracy.csv"

    def table(rows):
        lines = ["held_out,memory_error,speed_error,hardware", *rows]
        path.write_text("\n".join(lines) + "\n")

    def accuracy(gpu):
        return known_accuracy(gpu, path)

    table(rows)
    held_out = {
        "memory": "within 5% on 1 of 1 held-out cells",
        "speed": "within 15% on 0 of 1 held-out cells",
    }
    assert accuracy("h200") == accuracy("a100-80") == ("h200", held_out)
    own = {"memory": "within 5% on 1 of 2 cells", "speed": "within 15% on 1 of 1 cells"}
    assert accuracy("h100-80") == ("h100-80", own)
    table(rows[:3])
    assert accuracy("h100-80") == ("h200", held_out)
    table(rows[1:2])
    fitted = {
        "memory": "within 5% on 0 of 1 fitted cells",
        "speed": "within 15% on 1 of 1 fitted cells",
    }
    assert accuracy("h200") == ("h200", fitted)
    table([])
    assert accuracy("h200")[1] == {"memory": "not measured", "speed": "not measured"}


def test_what_is_measured_again_takes_the_place_of_its_rows_alone(tmp_path):
    script, table, again = (
        load_script("benchmarks/plan_accuracy.py"),
        tmp_path / "table.csv",
        tmp_path / "again.csv",
    )
    rows = "a,,1,NVIDIA H200\nb,4.0,2,NVIDIA H200\nc,,3,NVIDIA H200\npublished,,,\n"
    table.write_text(f"cell,host_us,seconds,hardware\n{rows}", encoding="utf-8")
    rows = "b,2.7,20,NVIDIA H200\nd,3.1,40,NVIDIA H200\nc,3.1,60,NVIDIA H100 80GB HBM3\n"
    again.write_text(f"cell,host_us,seconds,hardware\n{rows}", encoding="utf-8")
    found = script.newest(table, [again])
    assert {name: (row["host_us"], row["seconds"]) for name, row in found.items()} == {
        ("a", "h200"): ("", "1"),
        ("b", "h200"): (3.1, "20"),
        ("c", "h200"): ("", "3"),
        ("d", "h200"): (3.1, "40"),
        ("c", "h100-80"): (3.1, "60"),
    }


@pytest.mark.long
def test_the_committed_table_is_todays_planner():
    script, cells = load_script("benchmarks/plan_accuracy.py"), {cell.name: cell for cell in CELLS}
    rows = script.newest(ROOT / "results" / "plan_accuracy" / "plan_accuracy.csv", [])
    assert len(rows) >= 40 and {name for name, _ in rows} <= set(cells)
    for (name, _), row in list(rows.items())[1::3]:
        made = script.predicted(cells[name], row)
        assert str(made["predicted_peak_gb"]) == row["predicted_peak_gb"], (
            "run python benchmarks/plan_accuracy.py"
        )
        assert str(made["predicted_tokens_per_s"]) == row["predicted_tokens_per_s"]


def test_a_third_of_the_cells_is_held_out():
    names = [cell.name for cell in CELLS]
    assert len(names) == len(set(names)) >= 40
    assert sum(cell.held_out for cell in CELLS) >= len(CELLS) / 3
    assert sum(cell.held_out for cell in CELLS) == len(HELD_OUT.split("\n")) - 2


def test_a_worker_measures_cells_and_keeps_what_failed(tmp_path, base, rows):
    """benchmarks/plan_accuracy_worker.py on a CPU: two cells in one process, the second refused."""
    argv = arguments(
        {
            "model_name_or_path": str(base),
            "dataset_name": str(rows),
            "max_steps": "4",
            "global_batch_size": "8",
            "per_device_train_batch_size": "8",
            "save_strategy": "no",
            "eval_strategy": "no",
        }
    )
    variables = {"ACCELERATE_MIXED_PRECISION": "no"}
    listed = [
        {
            "name": name,
            "variables": variables,
            "limit_gb": 0,
            "argv": [*argv, f"--output_dir={tmp_path}/{name}", *more],
        }
        for name, more in (("good", []), ("bad", ["--lora_rr=1"]))
    ]
    (tmp_path / "cells.json").write_text(json.dumps(listed))
    command = [fork_server.python(), "-m", "accelerate.commands.accelerate_cli", "launch"]
    command += [
        "--config_file",
        "accelerate_configs/cpu.yaml",
        "benchmarks/plan_accuracy_worker.py",
    ]
    command += ["--cells", str(tmp_path / "cells.json"), "--out", str(tmp_path / "out.jsonl")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    good, bad = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert (good["cell"], good["raised"], bad["cell"]) == ("good", None, "bad")
    assert "lora_rr" in bad["raised"]
    assert good["largest_tokens"] > good["largest_loss_tokens"] > 0
    assert (tmp_path / "begun").read_text() == "bad"
