"""recipes/plan.py predicts memory and speed of a recipe, and says what would fit."""

import re
import resource
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, arguments, load_script
from datasets import Dataset
from planned_steps import RECIPE, SAID
from transformers import AutoConfig, BambaConfig, PhiConfig

from sftlab.config.launch import exported, launched
from sftlab.config.parser import parse_recipe
from sftlab.fastpath.selection import FastPath
from sftlab.models.families import SMALL
from sftlab.models.layers import Layers
from sftlab.planning.plan import planned_memory
from sftlab.training.summary import planned_row


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


def test_a_plan_says_what_was_made_of_the_recipe(printed):
    words = ["--random", "llama3.2-1b", "--dataset_name", "mine.jsonl"]
    words += ["--config", "recipes/llama3.2-1b/attn_r16.yaml"]
    for more in ([], ["--compare"]):
        first = printed(*words, *more).splitlines()[0]
        assert first.startswith("note: dataset_fraction 0.01") and "mine.jsonl" in first


@pytest.mark.long
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


def test_rows_that_are_given_need_no_data_set(base, printed, plan):
    own = ["--config", "recipes/own/all_r16.yaml", "--model_name_or_path", str(base)]
    text = printed(*own, "--rows", "1600", "--row_tokens", "100")
    assert "300" in text[text.index("steps") :].splitlines()[0], (
        "1,600 rows in 16 rows, three times"
    )
    assert "dataset_name is missing" in refusal(plan, *own, "--rows", "1600")


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
        (["--row_tokens", "inf"], "--row_tokens inf: give a number above 0"),
        (["--host_us", "nan"], "--host_us nan: give the microseconds"),
        (["--model_init_kwargs", '{"num_hidden_layers": 100000}'], "a whole number from 1 to 1000"),
        (["--config_file", "none.yaml"], "launch config none.yaml not found"),
        (["--config_file", "accelerate_configs/cpu.yaml"], "runs on the CPU"),
        (["--lora_target_modules", "q_prj"], "q_prj: LlamaForCausalLM has no such linear layer"),
        (["--lora_rr", "3"], "did you mean 'lora_r'"),
        (["--random", "llama9"], "no shape 'llama9'"),
        (["--host_us", "0"], "give the microseconds that recipes/doctor.py says"),
        (["--num_processes", "0"], "--num_processes 0: give a number above 0"),
        (["--row_tokens", "-5"], "--row_tokens -5: give a number above 0"),
        (["--max_length", "0"], "max_length is 0: give the most tokens"),
        (["--fused_loss", "false"], "plans are made for the fused loss alone"),
        (["--label_smoothing_factor", "0.1"], "the loss is not fused (label smoothing needs"),
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
        planned = planned_memory(
            recipe, launch, FastPath(True, True, True, "varlen", Layers(2)), trainer
        )
        recipe.training.optim = "adafactor"
        why = planned_memory(
            recipe, launch, FastPath(True, True, True, "varlen", Layers(2)), trainer
        )
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


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (BambaConfig(**SMALL, mamba_n_heads=8, mamba_d_head=16, attn_layer_indices=[1]), True),
        (PhiConfig(**SMALL), False),
    ],
)
def test_a_plan_of_measured_layers_says_so(config, said, tmp_path, printed):
    config.save_pretrained(tmp_path)
    asked = ["--rows", "1000", "--row_tokens", "100", "--compile_layers=false"]
    linears = ["--lora_target_modules", "q_proj", "k_proj"]
    text = printed(*RECIPE, "--model_name_or_path", str(tmp_path), *asked, *linears)
    assert re.search(r"^  activations +\d", text, re.M) and "fits; the largest" in text
    last = text.splitlines()[-1]
    assert last.startswith("layers of this kind were not measured on a GPU: memory is counted")
    assert ("as torch computes them" in last) == said
