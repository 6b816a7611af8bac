"""Where fused LoRA is on by itself, what it does where it is wrong, and how runs with it go on."""

from pathlib import Path

import conftest
import pytest
from conftest import load_script, read, short_fields
from packed_training import assert_checkpoints_say, build, stop_in_step_two, train

from sftlab.config.launch import exported, launched
from sftlab.config.parser import parse_recipe
from sftlab.fastpath import mlp_ops, varlen_attention
from sftlab.fastpath.lora_mlp import LoraMlp
from sftlab.fastpath.lora_products import LoraProduct
from sftlab.fastpath.selection import FastPath, choose
from sftlab.fastpath.unset_fused_lora import choose_fused_lora
from sftlab.paths import ROOT
from sftlab.planning.recipe_step import step_of
from sftlab.planning.step_memory import kept_bytes
from sftlab.runs.run_directory import adapter_hash
from sftlab.training import recorded_trainer
from sftlab.training.trainer import LabTrainer

models = load_script("docs/make_models.py")
LLAMA = "Llama 2, 3; SmolLM2"
MLP = ["gate_proj", "up_proj", "down_proj"]


def asked(launch_config: str, *options: str) -> tuple:
    """A recipe and its launch, with LoRA on all linears and no dropout unless options say so."""
    words = ["--config", str(ROOT / "recipes" / "demo" / "attn_r16.yaml"), "--lora_dropout=0"]
    if "--lora_target_modules" not in options:
        words += ["--lora_target_modules", "all-linear"]
    with launched(exported(ROOT / "accelerate_configs" / f"{launch_config}.yaml")) as launch:
        return parse_recipe([*words, *options], launch), launch


def chosen(launch_config: str, *options: str, family: str = LLAMA, gpu: bool = True) -> FastPath:
    recipe, launch = asked(launch_config, *options)
    elsewhere = (lambda: None) if gpu else (lambda: "a CPU")
    return choose(recipe, models.config_of(family), launch, elsewhere)


TARGETS = "--lora_target_modules"


@pytest.mark.parametrize(
    "launch_config, options",
    [
        ("single", []),
        ("ddp", []),
        ("fp16", []),
        ("single", [TARGETS, *MLP]),
        ("single", [TARGETS, *MLP, "q_proj"]),
        ("single", [TARGETS, r".*\.(gate|up|down)_proj"]),
        ("single", ["--exclude_modules", "o_proj"]),
        ("single", ["--gradient_checkpointing=true"]),
        ("single", ["--use_rslora=true", "--lora_r=64"]),
        ("single", ["--compile_layers=true"]),
        ("single", ["--packing=false"]),
        ("single", ["--load_in_4bit=true"]),
        ("fp8", []),
    ],
    ids=str,
)
def test_it_is_on_where_it_was_measured_to_help(launch_config, options):
    fast = chosen(launch_config, *options)
    assert fast.fused_lora
    assert not fast.needs_fused_lora, "it goes back to peft where it cannot be"
    assert "fused_lora" not in fast.reasons


@pytest.mark.parametrize(
    "launch_config, options, why",
    [
        ("single", ["--lora_dropout=0.05"], "with lora_dropout 0.05 an MLP is no function"),
        ("fsdp", [], "FSDP shards the frozen weights"),
        ("single", ["--dtype=float32"], "not in the same 16 bits"),
        ("fp32", [], "not in the same 16 bits"),
        ("single", ["--lora_r=65"], "gate and up share no product at rank 65"),
        ("single", [TARGETS, "q_proj", "v_proj", "o_proj"], None),
        ("single", [TARGETS, *MLP[:2]], None),
        ("single", [TARGETS, r".*layers\.0\..*(gate|up|down)_proj"], None),
        ("single", ["--exclude_modules", "up_proj"], None),
        ("fsdp", ["--load_in_4bit=true"], "FSDP shards the frozen weights"),
        ("single", ["--load_in_8bit=true"], None),
        ("fp8", ["--load_in_4bit=true"], None),
        ("fp8", ["--lora_dropout=0.05"], "with lora_dropout 0.05 an MLP is no function"),
        ("single", ["--use_dora=true"], None),
        ("single", ["--lora_bias=true"], None),
        ("single", ["--use_peft=false", "--dtype=float32"], None),
        ("single", ["--compile_layers=false"], None),
        ("single", ["--torch_compile=true"], None),
        ("single", ["--fused_lora=false"], None),
    ],
    ids=str,
)
def test_it_is_off_elsewhere_with_a_reason_where_one_would_expect_it(launch_config, options, why):
    fast = chosen(launch_config, *options)
    assert not fast.fused_lora
    reason = fast.reasons.get("fused_lora")
    assert reason is None if why is None else why in reason


def test_it_is_off_on_a_cpu_and_where_layers_are_not_llamas():
    fast = chosen("single", "--compile_layers=true", gpu=False)
    assert (fast.compile_layers, fast.fused_lora) == (True, False)
    for family in ("Phi-2", "Mixtral", "gpt-oss"):
        more = [TARGETS, "q_proj"] if family != "Phi-2" else []
        fast = chosen("single", *more, family=family)
        assert (fast.fused_lora, fast.reasons.get("fused_lora")) == (False, None), family
    fast = chosen("single", family="Qwen 3.5 (text)")
    assert fast.reasons["fused_lora"] == "not measured where layers are of several kinds"
    assert not fast.fused_lora


@pytest.mark.parametrize("size", ["intermediate_size", "hidden_size"])
def test_it_is_off_over_float8_weights_that_are_too_wide_for_it(size):
    config = models.config_of(LLAMA)
    setattr(config, size, 16640)
    found = {}
    for name in ("single", "fp8"):
        recipe, launch = asked(name)
        found[name] = choose(recipe, config, launch, lambda: None)
    assert found["single"].fused_lora and not found["fp8"].fused_lora
    assert found["fp8"].reasons["fused_lora"].endswith("more than 16,384 inputs or outputs")


def test_asked_for_it_is_needed_and_has_no_reason():
    fast = chosen("single", "--fused_lora=true", "--lora_dropout=0.05")
    assert fast.fused_lora and fast.needs_fused_lora
    assert "fused_lora" not in fast.reasons


def test_preference_tuning_keeps_pefts_layers():
    """Its reference is the policy without the adapter, whose products are bitwise the same then."""
    recipe, launch = asked("single")
    recipe.training.method = "dpo"
    fast = FastPath(False, True, None, None, models.describe(*of(LLAMA)))
    found, why = choose_fused_lora(recipe, fast.layers, launch)
    assert not found and why.startswith("the reference of preference tuning would be rounded")


def of(family: str) -> tuple:
    config = models.config_of(family)
    return config, models.model_class(config)


# ---- plans ----


def planned(family: str, *options: str) -> tuple:
    """The fast path that is chosen on a GPU, and the step that is planned with it."""
    recipe, launch = asked("single", *options)
    config = models.config_of(family)
    fast = choose(recipe, config, launch, lambda: None)
    return fast, step_of(recipe, config, launch, fast, models.ROWS.longest, models.ROWS)


PATTERN = [TARGETS, r".*\.(gate|up|down)_proj"]


@pytest.mark.parametrize(
    "family, options",
    [(LLAMA, []), (LLAMA, PATTERN), (LLAMA, ["--exclude_modules", "o_proj"]), ("ERNIE 4.5", [])],
    ids=str,
)
def test_what_trains_with_it_is_planned_with_it(family, options):
    fast, step = planned(family, *options)
    assert fast.fused_lora and step.fused_lora
    if family == LLAMA:
        assert step.measured is None
    else:
        _, without = planned(family, *options, "--fused_lora=false")
        assert step.measured.kept != without.measured.kept


@pytest.mark.parametrize(
    "family", ["Phi-2", pytest.param("Gemma 4 (text)", marks=pytest.mark.long)]
)
def test_a_family_that_no_plan_with_it_is_made_for_plans_and_trains_without(family):
    fast, step = planned(family)
    assert not fast.fused_lora and not step.fused_lora
    assert kept_bytes(step) == kept_bytes(planned(family, "--fused_lora=false")[1])


@pytest.mark.parametrize("option", ["--lora_dropout=0.1", "--load_in_4bit=true"])
def test_no_plan_is_made_for_what_a_training_under_fp8_refuses(option):
    recipe, launch = asked("fp8", option, "--fused_lora=true")
    config = models.config_of(LLAMA)
    fast = choose(recipe, config, launch, lambda: None)
    with pytest.raises(ValueError, match="fused_lora under fp8 is for weights that are not in 4"):
        step_of(recipe, config, launch, fast, models.ROWS.longest, models.ROWS)


# ---- trainings ----


@pytest.fixture
def fields(base, rows, tmp_path) -> dict[str, str]:
    short = short_fields(base, rows, tmp_path / "run")
    return {**short, "lora_dropout": "0", "lora_target_modules": "all-linear"}


@pytest.fixture
def on_a_gpu(monkeypatch, fields):
    """Choose parts as on a GPU in bf16; layers are not compiled, and rows are padded."""
    monkeypatch.setattr(varlen_attention, "no_triton", lambda: None)
    monkeypatch.setattr(recorded_trainer, "compile_layers", lambda *_, **__: None)
    for name, value in exported(ROOT / "accelerate_configs" / "cpu.yaml").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    fields |= {"packing": "false"}


def fused_modules(trainer: LabTrainer) -> int:
    return sum(isinstance(m, LoraProduct | LoraMlp) for m in trainer.model.modules())


def test_a_training_takes_it_by_itself_and_is_that_without(fields, on_a_gpu):
    found = []
    for more in ({}, {"fused_lora": "false"}):
        trainer = build(fields, **more, save_strategy="no", eval_strategy="no")
        assert trainer.what_ran()["fused_lora"] is (not more)
        assert bool(fused_modules(trainer)) is (not more)
        found.append([entry["loss"] for entry in train(trainer)])
    assert found[0] == pytest.approx(found[1], abs=0.02)


def wrong(monkeypatch) -> None:
    plain = mlp_ops.gated_backward_

    def twice(gradient, y, tanh_gelu, out):
        plain(gradient, y, tanh_gelu, out)
        out *= 2

    monkeypatch.setattr(mlp_ops, "gated_backward_", twice)


def test_with_a_wrong_kernel_it_goes_back_to_pefts_layers(fields, on_a_gpu, monkeypatch):
    wrong(monkeypatch)
    trainer = build(fields)
    assert not fused_modules(trainer)
    assert trainer.what_ran()["fused_lora"] is False
    assert "mlp computes something else than peft's layers" in trainer.fast.reasons["fused_lora"]
    assert "% apart, expected at most 3.0%" in trainer.fast.reasons["fused_lora"]


def test_asked_for_with_a_wrong_kernel_it_stops(fields, on_a_gpu, monkeypatch):
    wrong(monkeypatch)
    with pytest.raises(ValueError, match=r"fused_lora is not possible here: .* something else .*"):
        build(fields, fused_lora="true")


def test_where_no_mlp_is_one_function_peft_stays(fields, on_a_gpu, monkeypatch):
    from sftlab.fastpath import fused_lora

    monkeypatch.setattr(fused_lora, "fuse_mlp", lambda module: None)
    trainer = build(fields)
    assert not fused_modules(trainer) and not trainer.fast.fused_lora
    assert trainer.fast.reasons["fused_lora"] == "no MLP is one function with it"
    assert fused_modules(build(fields, fused_lora="true"))


# ---- continuation ----


def choosing(sft, monkeypatch, fused: bool) -> None:
    """Let the script choose so where the recipe says nothing."""

    def chosen_so(*given):
        fast = choose(*given)
        fast.fused_lora = fused
        return fast

    monkeypatch.setattr(sft, "choose", chosen_so)


def stopped(fields, sft, monkeypatch, train_here, fused: bool) -> None:
    """A run that a signal ends in its second step."""
    with monkeypatch.context() as patched:
        choosing(sft, patched, fused)
        stop_in_step_two(patched)
        done = train_here(fields)
        assert read(Path(fields["output_dir"]))["status"] == "interrupted", done.stderr[-2000:]


@pytest.mark.parametrize(
    "began", [pytest.param("before this default", marks=pytest.mark.long), "without", "with"]
)
def test_a_run_goes_on_as_it_began(
    fields, sft, tmp_path, monkeypatch, train_here, trained_here, began
):
    fused = began == "with"
    stopped(fields, sft, monkeypatch, train_here, fused)
    before = began == "before this default"
    assert_checkpoints_say(tmp_path / "run", "fused_lora", fused, forget=before)
    with monkeypatch.context() as patched:
        choosing(sft, patched, not fused)
        done = trained_here(fields)
    assert ("fused_lora is off: the run began without it" in done.stdout) is not fused
    choosing(sft, monkeypatch, fused)
    trained_here(fields | {"output_dir": str(tmp_path / "whole")})
    run, whole = read(tmp_path / "run"), read(tmp_path / "whole")
    assert run["ran"]["fused_lora"] is whole["ran"]["fused_lora"] is fused
    assert run["losses"] == whole["losses"]
    assert adapter_hash(tmp_path / "run") == adapter_hash(tmp_path / "whole")


def test_float8_weights_keep_the_scales_that_they_began_with(
    fields, sft, tmp_path, monkeypatch, train_here, trained_here
):
    """They are rounded before it is known that LoRA stays peft's."""
    from sftlab.fastpath import fused_lora

    monkeypatch.setattr(sft, "check_devices", lambda _: None)
    monkeypatch.setattr(fused_lora, "fuse_mlp", lambda module: None)
    in_fp8 = exported(ROOT / "accelerate_configs" / "cpu.yaml", {"mixed_precision": "fp8"})
    monkeypatch.setattr(conftest, "exported", lambda _: in_fp8)
    stopped(fields, sft, monkeypatch, train_here, True)
    choosing(sft, monkeypatch, True)
    trained_here(fields)
    trained_here(fields | {"output_dir": str(tmp_path / "whole")})
    run, whole = read(tmp_path / "run"), read(tmp_path / "whole")
    assert run["ran"]["fused_lora"] is whole["ran"]["fused_lora"] is False
    assert run["losses"] == whole["losses"]
    assert adapter_hash(tmp_path / "run") == adapter_hash(tmp_path / "whole")


def test_a_run_that_cannot_go_on_with_it_is_refused(
    fields, sft, monkeypatch, train_here, trained_here
):
    stopped(fields, sft, monkeypatch, train_here, True)
    with monkeypatch.context() as patched:
        wrong(patched)
        done = train_here(fields)
    assert done.returncode and "something else than peft's layers" in done.stderr
    assert "the run began with it: begin anew with --overwrite" in done.stderr
    choosing(sft, monkeypatch, False)
    trained_here(fields | {"resume_anyway": "true"})


@pytest.mark.parametrize("began", [pytest.param("before", marks=pytest.mark.long), "with them"])
def test_a_run_goes_on_with_the_kernels_that_it_began_with(
    fields, sft, tmp_path, monkeypatch, train_here, trained_here, began
):
    from sftlab.fastpath import fused_lora

    before = began == "before"
    stopped(fields, sft, monkeypatch, train_here, True)
    assert_checkpoints_say(tmp_path / "run", "kernels_with_lora", True, forget=before)
    let, said = fused_lora.let_kernels_have_lora, []
    monkeypatch.setattr(
        fused_lora, "let_kernels_have_lora", lambda may: (said.append(may), let(may))
    )
    choosing(sft, monkeypatch, True)
    try:
        trained_here(fields)
        assert said == [not before]
        assert mlp_ops.may_have_lora() is not before
    finally:
        let(True)
    assert read(tmp_path / "run")["ran"]["kernels_with_lora"] is False, "a CPU"
