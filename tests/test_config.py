"""One way in for configuration: recipe, command line, launch config."""

import re

import pytest
import yaml
from conftest import ROOT, arguments

from sftlab.config.launch import Launch
from sftlab.config.parser import parse_recipe
from sftlab.yaml_files import read_yaml

RECIPES = sorted(p for p in (ROOT / "recipes").glob("*/*.yaml") if p.parent.name != "studies")
TARGETS = {
    "qv": ["q_proj", "v_proj"],
    "attn": ["q_proj", "v_proj", "o_proj"],
    "all": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}


def parsed(fields, *extra, launch=None):
    return parse_recipe([*arguments(fields), *extra], launch or Launch.from_environment())


def processes(count, strategy="ddp"):
    return Launch("fp32", strategy, count, count, True, {})


def test_the_command_line_beats_the_recipe(fields):
    assert parsed(fields).model.lora_r == 16
    assert (
        parsed(fields, "--lora_r", "4", "--lora_target_modules", "q_proj", "k_proj").model.lora_r
        == 4
    )
    assert parsed(
        fields, "--lora_target_modules", "q_proj", "k_proj"
    ).model.lora_target_modules == ["q_proj", "k_proj"]


def test_one_target_is_a_list_of_one_and_a_pattern_stays_a_pattern(fields):
    assert parsed(fields, "--lora_target_modules", "q_proj").model.lora_target_modules == ["q_proj"]
    for pattern in ("all-linear", r".*\.q_proj"):
        assert parsed(fields, "--lora_target_modules", pattern).model.lora_target_modules == pattern


def test_every_yaml_value_arrives_with_its_type(fields, tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(
        "learning_rate: 1e-4\npacking: true\nmodel_init_kwargs: {num_hidden_layers: "
        "1}\nwarmup_steps: null\n"
        "split_fractions: [0.5, 0.25, 0.25]\nmodel_name_or_path: a\ndataset_name: b\noutput_dir: "
        "c\n"
        "lora_target_modules: [q_proj, v_proj]\n"
    )
    recipe = parse_recipe(["--config", str(path)], Launch.from_environment())
    assert recipe.training.learning_rate == 1e-4
    assert recipe.training.packing is True
    assert recipe.training.model_init_kwargs == {"num_hidden_layers": 1}
    assert recipe.data.split_fractions == [0.5, 0.25, 0.25]
    assert recipe.training.warmup_steps == 0


def test_a_max_length_of_null_is_no_limit(fields, tmp_path):
    path = tmp_path / "r.yaml"
    recipe = (ROOT / "recipes/demo/attn_r16.yaml").read_text()
    path.write_text(re.sub(r"(?m)^max_length: .*$", "max_length: null", recipe))
    for extra, limit in (([], None), (["--max_length", "8"], 8)):
        assert (
            parse_recipe(
                ["--config", str(path), *extra], Launch.from_environment()
            ).training.max_length
            == limit
        )


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--lora_rr", "4"], "unknown field 'lora_rr'; did you mean 'lora_r'?"),
        (["--max_seq_length", "4"], "unknown field 'max_seq_length'.*max_length"),
        (["--lora_r", "0"], "lora_r is 0"),
        (["--lora_r", "-3"], "lora_r is -3"),
        (["--lora_r", "many"], "lora_r.*invalid int value: 'many'"),
        (["--dataset_shape", "orca"], "dataset_shape.*invalid choice"),
        (["--dataset_fraction", "1.5"], "dataset_fraction is 1.5"),
        (["--split_fractions", "0.5", "0.5"], "split_fractions"),
        (["--split_fractions", "0.9", "0.2", "-0.1"], "split_fractions"),
        (
            ["--split_fractions", "1", "0", "0", "--eval_strategy", "steps"],
            "without validation rows, and evaluation is",
        ),
        (["--fsdp", "full_shard"], "fsdp is not used here"),
        (["--resume_from_checkpoint", "x"], "resume_from_checkpoint is not used here"),
        (
            ["--save_only_model", "true"],
            "save_only_model is not used here: a checkpoint without the optimizer",
        ),
        (["--ignore_data_skip", "true"], "ignore_data_skip is not used here"),
        (
            ["--full_determinism", "true"],
            "full_determinism is not used here: deterministic does it",
        ),
        (["--dataset_streaming"], None),
        (["stray"], "cannot read 'stray'"),
        (["--gradient_accumulation_steps", "3"], "contradict each other"),
        (["--bf16_full_eval"], "bf16_full_eval is not used"),
    ],
)
def test_a_mistake_is_one_sentence(fields, extra, message):
    if extra == ["--dataset_streaming"]:
        fields["max_steps"], message = "-1", "dataset_streaming needs max_steps"
    with pytest.raises(ValueError, match=message) as caught:
        parsed(fields, *extra)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["lora_alfa: 3", "- a\n- b", "a: [1", "just words"])
def test_a_broken_recipe_is_one_sentence(text, tmp_path):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(ValueError) as caught:
        parse_recipe(["--config", str(path)], Launch.from_environment())
    assert "\n" not in str(caught.value)


def test_help_lists_the_fields(capsys):
    with pytest.raises(SystemExit) as caught:
        parse_recipe(["--help"], Launch.from_environment())
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for name in ("--lora_r", "--max_length", "--dataset_fraction", "--global_batch_size"):
        assert name in text


def test_missing_targets_and_missing_names_are_refused(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("model_name_or_path: a\ndataset_name: b\noutput_dir: c\nuse_peft: true\n")
    with pytest.raises(ValueError, match="lora_target_modules is unset"):
        parse_recipe(["--config", str(path)], Launch.from_environment())
    path.write_text("model_name_or_path: a\noutput_dir: c\n")
    with pytest.raises(ValueError, match="dataset_name is missing"):
        parse_recipe(["--config", str(path)], Launch.from_environment())


@pytest.mark.parametrize(
    ("total", "per_device", "world", "micro", "accumulation"),
    [
        (16, 16, 1, 16, 1),
        (16, 16, 2, 8, 1),
        (16, 4, 2, 4, 2),
        (32, 4, 8, 4, 1),
        (32, 4, 1, 4, 8),
        (0, 4, 2, 4, 1),
    ],
)
def test_the_global_batch_is_the_same_under_every_world_size(
    fields, total, per_device, world, micro, accumulation
):
    fields |= {"global_batch_size": str(total), "per_device_train_batch_size": str(per_device)}
    recipe = parsed(fields, launch=processes(world))
    assert recipe.training.per_device_train_batch_size == micro
    assert recipe.training.gradient_accumulation_steps == accumulation
    assert recipe.data.global_batch_size == (total or micro * accumulation * world)


def test_a_global_batch_that_does_not_divide_is_refused(fields):
    with pytest.raises(ValueError, match="does not divide into 3"):
        parsed(fields, launch=processes(3))
    with pytest.raises(ValueError, match="not a multiple"):
        parsed(fields | {"per_device_train_batch_size": "3"})


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ("--use_peft=false", "trains them"),
        ("--use_dora=true", "norms"),
        ("--load_in_8bit=true", "load_in_8bit has products of its own"),
    ],
)
def test_fp8_refuses_weights_that_it_cannot_round(fields, monkeypatch, asked, why):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(
        ValueError, match=f"fp8 rounds the frozen weights, and .*{why}.*: launch with single.yaml"
    ):
        parsed(fields, asked)


def test_fp8_refuses_weights_that_one_process_reads_for_all(fields, monkeypatch):
    for name, value in (("MIXED_PRECISION", "fp8"), ("USE_FSDP", "true")):
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    parsed(fields)
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    with pytest.raises(ValueError, match="fp8 rounds the weights in every process"):
        parsed(fields)


def test_fp8_takes_weights_in_4_bits_where_they_are_not_sharded(fields, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    recipe = parsed(fields, "--load_in_4bit=true")
    assert recipe.model.load_in_4bit and recipe.model.dtype == "bfloat16"
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    sentence = r"^fp8 with load_in_4bit .* FSDP2 does not gather: launch with fp8.yaml and [^\n]*$"
    with pytest.raises(ValueError, match=sentence):
        parsed(fields, "--load_in_4bit=true")


def test_the_launch_config_decides_the_precision(fields, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    for asked, dtype in (
        ("no", "float32"),
        ("bf16", "bfloat16"),
        ("fp16", "float16"),
        ("fp8", "bfloat16"),
    ):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", asked)
        recipe = parsed(fields)
        assert recipe.training.mixed_precision == asked
        assert recipe.model.dtype == dtype


@pytest.mark.parametrize(
    ("asked", "extra"),
    [
        ("no", ["--bf16", "true"]),
        ("bf16", ["--fp16", "true"]),
        ("no", ["--dtype", "bfloat16"]),
        ("fp16", ["--dtype", "bfloat16"]),
        ("bf16", ["--dtype", "float16"]),
    ],
)
def test_a_recipe_that_contradicts_the_launch_config_is_refused(fields, monkeypatch, asked, extra):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", asked)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    with pytest.raises(ValueError, match="launch config"):
        parsed(fields, *extra)


def test_bitsandbytes_optimizers_are_refused_under_fsdp(fields):
    with pytest.raises(ValueError, match="adamw_torch_fused"):
        parsed(fields, "--optim", "paged_adamw_32bit", launch=processes(2, "fsdp"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_a_recipe_says_what_its_name_says(path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    settings, text = read_yaml(path), path.read_text()
    targets, rank = re.fullmatch(r"(\w+)_r(\d+)", path.stem).groups()
    assert settings["lora_r"] == int(rank)
    assert settings["lora_target_modules"] == TARGETS[targets]
    assert settings["output_dir"] == f"runs/{path.parent.name}-{path.stem}"
    command = rf"--config recipes/{path.parent.name}/{path.stem}.yaml"
    script = "dpo" if settings.get("method") == "dpo" else "sft"
    assert re.search(rf"# +python recipes/{script}.py --config_file .*{command}", text)
    assert len(text.splitlines()) < 60
    launch = Launch("bf16", "ddp", 2, 2, True, {})
    own = ["--model_name_or_path", "a/b", "--dataset_name", "my.jsonl"]
    parse_recipe(["--config", str(path), *(own if path.parent.name == "own" else [])], launch)


PAIRS = ("demo-dpo", "llama3.2-1b-dpo", "smollm2-135m-dpo")
THREE = ("own", "qwen3-1.7b", "gemma3-1b", "smollm2-1.7b", "smollm2-135m", "smollm2-135m-gsm8k")


@pytest.mark.parametrize("folder", ["demo", "llama3.2-1b", "llama2-7b", *THREE, *PAIRS])
def test_the_recipes_of_a_folder_differ_in_rank_and_targets_alone(folder):
    recipes = [read_yaml(p) for p in RECIPES if p.parent.name == folder]
    assert len(recipes) == {"llama2-7b": 2, **dict.fromkeys((*THREE, *PAIRS), 3)}.get(folder, 7)
    assert len({r["lora_alpha"] / r["lora_r"] for r in recipes}) == 1
    may_differ = {"lora_r", "lora_alpha", "lora_target_modules", "output_dir"}
    may_differ |= {"adapter_name_or_path"}  # of the same rank and targets
    rest = [{k: v for k, v in r.items() if k not in may_differ} for r in recipes]
    assert all(r == rest[0] for r in rest)


def test_the_launch_configs_hold_what_their_names_say():
    from accelerate.commands.config.config_args import load_config_from_file

    folder = ROOT / "accelerate_configs"
    names = {"cpu", "cpu_ddp", "single", "ddp", "fsdp", "fp32", "fp16", "fp8"}
    assert {p.stem for p in folder.glob("*.yaml")} == names
    for name in names:
        path = folder / f"{name}.yaml"
        assert f"--config_file accelerate_configs/{name}.yaml" in path.read_text()
        config = load_config_from_file(str(path))
        assert config.num_processes == (2 if name in ("cpu_ddp", "ddp", "fsdp") else 1)
    precisions = {n: yaml.safe_load((folder / f"{n}.yaml").read_text()) for n in names}
    for name, mixed in (("fp32", "no"), ("fp16", "fp16"), ("single", "bf16"), ("fp8", "fp8")):
        assert precisions[name].pop("mixed_precision") == mixed
        precisions[name].pop("fp8_config", None)
        assert precisions[name] == precisions["fp32"]
