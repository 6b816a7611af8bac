"""What a user types before a launch: recipes/plan.py, and the planner's accuracy written anew."""

import json
import re
import resource
import subprocess
import sys
from types import SimpleNamespace

import fork_server
import pytest
import torch
from conftest import ROOT, arguments, load_script
from datasets import Dataset
from transformers import AutoConfig

from sftlab.config.launch import exported, launched
from sftlab.config.parser import parse_recipe
from sftlab.fastpath.selection import FastPath
from sftlab.planning import gpu_specs, machine_checks
from sftlab.planning.accuracy_cells import CELLS, HELD_OUT
from sftlab.planning.gpu_specs import GPUS, find_gpu
from sftlab.planning.known_accuracy import known_accuracy
from sftlab.planning.machine_checks import FINE
from sftlab.planning.plan import planned_memory
from sftlab.training.summary import planned_row

RECIPE = ["--config", "recipes/llama3.2-1b/attn_r16.yaml"]
SAID = [*RECIPE, "--random", "llama3.2-1b", "--rows", "38105", "--row_tokens", "315"]


@pytest.fixture(scope="module")
def plan():
    return load_script("recipes/plan.py")


@pytest.fixture
def printed(plan, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)

    def run(*argv):
        plan.main(list(argv))
        return capsys.readouterr().out

    return run


def refusal(plan, *argv):
    with pytest.raises(SystemExit) as stopped:
        plan.main(list(argv))
    return str(stopped.value)


def processor_seconds(*command):
    """Of a child and its output: the processor's, since others may be at work on this machine."""
    began = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - began, done.stdout


def test_a_plan_as_a_user_types_it_takes_ten_seconds_where_importing_torch_takes_one_and_a_half():
    took, text = processor_seconds(
        "recipes/plan.py", *SAID, "--config_file", "accelerate_configs/ddp.yaml"
    )
    as_a_unit, _ = processor_seconds("-c", "import torch")
    assert took < 10 / 1.5 * as_a_unit
    assert "2 x h200, bf16, ddp" in text
    assert "fits; the largest micro-batch that does is" in text


def test_the_printed_parts_sum_to_what_is_needed(printed):
    text = printed(*SAID, "--lora_target_modules", "q_proj", "down_proj")
    figures = {
        name.strip(): float(value)
        for name, value in re.findall(r"^  ([a-z ,'CUDA]+?)  +([\d.]+)$", text, re.M)
    }
    parts = (
        "parameters",
        "adapter",
        "gradients",
        "optimizer state",
        "activations",
        "logits",
        "communication",
        "workspace",
    )
    assert sum(figures[part] for part in parts) == pytest.approx(figures["allocated"], abs=0.05)
    assert figures["needed, CUDA's context too"] > figures["allocated"] + figures["fragmentation"]
    assert "595" in text  # 38,105 rows in steps of 64


def test_lengths_of_a_local_file_are_read(base, fields, printed):
    epochs = ["--num_train_epochs=2", "--max_steps=-1"]
    text = printed(*arguments(fields), *epochs, "--config_file", "accelerate_configs/single.yaml")
    count = int(re.search(r"rows: (\d+) of its rows", text)[1])
    assert 120 < count <= 200  # 200 rows, four in five for training
    assert int(re.search(r"steps +(\d+)", text)[1]) == 2 * (count // 8)


def test_a_hub_data_set_asks_for_what_it_cannot_read(plan, base):
    message = refusal(plan, *RECIPE, "--model_name_or_path", str(base))
    assert (
        "Open-Orca/OpenOrca is not a file on this machine: pass --rows COUNT and --row_tokens MEAN"
        in message
    )


def test_a_config_alone_is_enough(base, tmp_path, printed):
    (tmp_path / "config.json").write_text((base / "config.json").read_text())
    text = printed(
        *RECIPE, "--model_name_or_path", str(tmp_path), "--rows", "1000", "--row_tokens", "100"
    )
    assert "parameters " in text


def test_what_does_not_fit_says_what_would_the_cheapest_first(printed):
    text = printed(
        *SAID[:2],
        "--random",
        "llama2-7b",
        "--rows",
        "9000",
        "--row_tokens",
        "300",
        "--gpu",
        "a100-40",
    )
    assert "does NOT fit" in text
    helping = re.findall(
        r"^  (--\S+|accelerate\S+).*?  ([\d.]+) GB  ([\d.]+) GPU-s a step$", text, re.M
    )
    seconds = [float(line[2]) for line in helping]
    assert len(helping) >= 2
    assert seconds == sorted(seconds)
    assert all(float(line[1]) <= 39.4 for line in helping)
    assert helping[0][0].startswith("--per_device_train_batch_size")


def test_compare_has_a_line_for_every_launch_config(printed):
    text = printed(*SAID, "--compare", "--gpu", "a100-80", "--num_processes", "4")
    named = {line.split()[0] for line in text.splitlines()[2:]}
    assert named == {path.stem for path in (ROOT / "accelerate_configs").glob("*.yaml")} - {
        "cpu",
        "cpu_ddp",
    }
    assert "fp8 cannot run: fp8 needs compute capability 8.9" in text
    assert re.search(r"^  fsdp +4 ", text, re.M)
    older = printed(*SAID, "--compare", "--gpu", "v100-32")
    assert "single cannot run: bf16 needs compute capability 8.0 or newer" in older
    assert re.search(r"^  fp16 +1 ", older, re.M)


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--gpu", "h300"], "no figures for GPU 'h300': known are b200, h200"),
        (["--gpu", "here"], "this machine shows no GPU; name one of"),
        (
            ["--gpus", "1", "--num_processes", "4", "--config_file", "accelerate_configs/ddp.yaml"],
            "starts 4 processes",
        ),
        (
            ["--gpu", "a100-80", "--config_file", "accelerate_configs/fp8.yaml"],
            "a100-80 has 8.0: use bf16 or fp16",
        ),
        (
            ["--gpu", "v100-16"],
            "bf16 needs compute capability 8.0 or newer; v100-16 has 7.0: use fp16",
        ),
        (["--config_file", "none.yaml"], "launch config none.yaml not found"),
        (["--config_file", "accelerate_configs/cpu.yaml"], "runs on the CPU"),
        (["--lora_rr", "3"], "did you mean 'lora_r'"),
        (["--random", "llama9"], "no shape 'llama9'"),
        (["--host_us", "0"], "give the microseconds that recipes/doctor.py says"),
        (["--num_processes", "0"], "--num_processes 0: give a number above 0"),
        (["--row_tokens", "-5"], "--row_tokens -5: give a number above 0"),
        (["--max_length", "0"], "max_length is 0: give the most tokens"),
        (["--fused_loss", "false"], "plans are made for the fused loss alone"),
        (["--compare", "--lora_rr", "3"], "unknown field 'lora_rr'"),
        (["--optim", "adafactor"], "no plan for optim adafactor"),
    ],
)
def test_bad_input_is_one_sentence(plan, monkeypatch, argv, said):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    message = refusal(plan, *SAID, *argv)
    assert message.startswith("error: ")
    assert said in message
    assert "\n" not in message


def test_a_model_without_a_config_and_a_missing_recipe_are_one_sentence(plan, tmp_path):
    assert "holds no config.json" in refusal(plan, *RECIPE, "--model_name_or_path", str(tmp_path))
    assert "--config is missing" in refusal(plan, "--gpu", "h200")
    (tmp_path / "r.yaml").write_text(
        "model_name_or_path: m\ndataset_name: d\nmax_length: null\noutput_dir: "
        "runs/x\nlora_target_modules: [q_proj]\n"
    )
    unlimited = (
        "--config",
        str(tmp_path / "r.yaml"),
        "--gpu",
        "h200",
        "--random",
        "llama3.2-1b",
        "--rows",
        "1000",
    )
    assert "max_length is null, so the longest row is not known" in refusal(plan, *unlimited)


def test_gpus_are_known_by_what_cuda_calls_them(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_specs, "measure_host", lambda: 2.5)

    def shows(seen, memory_gb):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: seen)
        facts = SimpleNamespace(total_memory=memory_gb * 2**30)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: facts)

    for seen, memory_gb, name in (
        ("NVIDIA H200", 139.8, "h200"),
        ("NVIDIA H100 80GB HBM3", 79.1, "h100-80"),
        ("NVIDIA H100 PCIe", 79.2, "h100-pcie"),
        ("NVIDIA A100-SXM4-40GB", 39.5, "a100-40"),
        ("NVIDIA A100 80GB PCIe", 79.3, "a100-80"),
        ("NVIDIA L40S", 44.5, "l40s"),
        ("Tesla T4", 14.6, "t4"),
    ):
        shows(seen, memory_gb)
        here = find_gpu("here")
        assert (here.name, here.memory_gb, here.host_us) == (name, memory_gb, 2.5)
    for seen, memory_gb in (
        ("NVIDIA GTX 1080", 8.0),
        ("NVIDIA L40", 44.5),
        ("NVIDIA A100-SXM-64GB", 63.4),
        ("NVIDIA GH200 480GB", 94.5),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", 9.8),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 15.7),
        ("NVIDIA T400 4GB", 3.7),
    ):
        shows(seen, memory_gb)
        with pytest.raises(ValueError, match=f"no figures for {seen}, {memory_gb} GB"):
            find_gpu("here")
    assert all(gpu.memory_gb > 10 and gpu.half >= gpu.fp32 for gpu in GPUS.values())


def test_short_steps_go_by_the_host_s_speed_and_the_plan_says_how_it_is_known(printed):
    short = ["--per_device_train_batch_size", "2", "--global_batch_size", "2"]
    said = {
        host: printed(*SAID, *more, *short)
        for host, more in ((None, []), (7.4, ["--host_us", "7.4"]))
    }
    assert f"host: {gpu_specs.HOST_US:g} us a small operation (assumed)" in said[None]
    assert "host: 7.4 us a small operation (as given)" in said[7.4]
    step = {
        host: float(re.search(r"a step, s +([\d.]+) \(the host", text)[1])
        for host, text in said.items()
    }
    assert step[7.4] / step[None] == pytest.approx(7.4 / gpu_specs.HOST_US, rel=0.01)
    long = [
        printed(*SAID, "--per_device_train_batch_size", "64", "--host_us", str(us))
        for us in (1.0, 2.0)
    ]
    assert re.search("a step, s.*", long[0])[0] == re.search("a step, s.*", long[1])[0]


def test_a_host_is_as_fast_as_where_nothing_disturbs_it(monkeypatch):
    times = iter([0, 0, 0, 0.005, 0.1, 0.1, 0.102, 0.2, 0.2, 0.204, 2])
    monkeypatch.setattr(gpu_specs.time, "perf_counter", lambda: next(times))
    assert gpu_specs.measure_host() == 2.0
    monkeypatch.undo()
    assert machine_checks.check_host().level == FINE
    assert re.match(r"\d+(\.\d+)? us a small operation", machine_checks.check_host().seen)


def test_planning_leaves_the_environment_as_it_was(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    monkeypatch.setenv("FSDP_VERSION", "9")
    variables = exported(ROOT / "accelerate_configs" / "ddp.yaml", {"num_processes": 3})
    assert variables["ACCELERATE_MIXED_PRECISION"] == "bf16"
    assert "FSDP_VERSION" not in variables
    with launched(variables) as launch:
        assert (launch.precision, launch.strategy, launch.world_size) == ("bf16", "ddp", 3)
    import os

    assert (os.environ["ACCELERATE_MIXED_PRECISION"], os.environ["FSDP_VERSION"]) == ("fp16", "9")


def test_a_run_stores_the_plan_of_what_it_trained(base, fields):
    rows = Dataset.from_dict({"input_ids": [[1] * 40] * 64})
    with launched(exported(ROOT / "accelerate_configs" / "single.yaml")) as launch:
        recipe = parse_recipe(arguments(fields), launch)
        config, state = AutoConfig.from_pretrained(base), SimpleNamespace(max_steps=6)
        trainer = SimpleNamespace(
            train_dataset=rows, model=SimpleNamespace(config=config), state=state
        )
        planned = planned_memory(recipe, launch, FastPath(True, True, True, "varlen"), trainer)
        recipe.training.optim = "adafactor"
        why = planned_memory(recipe, launch, FastPath(True, True, True, "varlen"), trainer)
    parts = sum(
        size for name, size in planned.items() if name.endswith("_gb") and name != "allocated_gb"
    )
    assert planned["allocated_gb"] == pytest.approx(parts, abs=0.005)
    assert planned["largest_tokens"] == 384  # 8 rows of 40 tokens, filled up to a multiple of 128
    assert "no plan for optim adafactor" in why["reason"]


def test_the_end_of_a_run_shows_planned_beside_measured():
    memory = [{"allocated_gb": 10.0}, {"allocated_gb": 9.0}]
    shown = planned_row({"peak_memory": memory, "planned_memory": {"allocated_gb": 10.5}})
    assert shown == {"allocated, planned (GB)": "10.0, 10.5 (+5.0%)"}
    assert planned_row({"peak_memory": memory, "planned_memory": {"reason": "why"}}) == {
        "planned memory": "why"
    }
    assert planned_row({"peak_memory": [{"resident_gb": 1.0}]}) == {}


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


def test_a_command_s_cells_have_one_host_whatever_disturbed_it():
    script = load_script("benchmarks/plan_accuracy.py")
    lines = [{"cell": "a", "host_us": us} for us in ("5.2", "12.6", "", "4.1")]
    assert [line["host_us"] for line in script.on_one_host(lines)] == [5.2] * 4
    assert script.on_one_host([{"cell": "a"}]) == [{"cell": "a"}]


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


def test_published_peaks_are_within_a_tenth():
    for line in load_script("benchmarks/plan_accuracy.py").published():
        assert abs(line["memory_error"]) < 0.1, line


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
