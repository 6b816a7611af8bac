"""The planner against what PyTorch itself counts:

weights, optimizer state, kept tensors, and its own arithmetic.
"""

import contextlib
import sys
import types

import pytest
import torch
from conftest import arguments
from peft import LoraConfig, get_peft_model
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Phi3Config

from sftlab.config.launch import exported, launched
from sftlab.config.parser import parse_recipe
from sftlab.data.collator import tiles
from sftlab.data.samplers import balanced
from sftlab.fastpath import compile_layers, varlen_attention
from sftlab.models.random_models import MODEL_SHAPES, random_lengths
from sftlab.planning.gpu_specs import GPUS
from sftlab.planning.plan import make_plan, most_rows, resized
from sftlab.planning.row_lengths import RowLengths, of_lengths
from sftlab.planning.step import Shape, Step
from sftlab.planning.step_memory import kept_bytes
from sftlab.planning.weight_memory import Weights, count_weights, optimizer_bytes, packed_bytes

ATTENTION = ["q_proj", "v_proj", "o_proj"]
ALL = [*ATTENTION, "k_proj", "gate_proj", "up_proj", "down_proj"]
HIDDEN, MLP, HEADS, KEY_HEADS, TOKENS, RANK = 64, 160, 4, 2, 256, 4


def forecast(launch="single", gpu="h200", rows=None, shape="llama3.2-1b", flags=None, **fields):
    targets = fields.pop("targets", None)
    argv = [
        "--config",
        "recipes/llama3.2-1b/attn_r16.yaml",
        *(f"--{k}={v}" for k, v in fields.items()),
    ]
    argv += ["--lora_target_modules", *targets] if targets else []
    with launched(exported(f"accelerate_configs/{launch}.yaml", flags)) as asked:
        recipe = parse_recipe(argv, asked)
        rows = rows or RowLengths(38_000, 315, 140, 512, "said")
        return make_plan(recipe, LlamaConfig(**MODEL_SHAPES[shape]), asked, GPUS[gpu], rows)


@pytest.mark.parametrize(
    "peft, targets", [("true", ATTENTION), ("true", ALL), ("false", ATTENTION)]
)
def test_weights_gradients_and_optimizer_state_are_torchs_own(base, fields, peft, targets):
    with launched(exported("accelerate_configs/fp32.yaml")) as launch:
        argv = [*arguments(fields), f"--use_peft={peft}", "--lora_target_modules", *targets]
        recipe = parse_recipe(argv, launch)
        counted = count_weights(recipe, AutoConfig.from_pretrained(base))
    model = AutoModelForCausalLM.from_pretrained(base)
    own = sum(p.nbytes for p in model.parameters())
    if peft == "true":
        model = get_peft_model(
            model, LoraConfig(r=recipe.model.lora_r, target_modules=targets, task_type="CAUSAL_LM")
        )
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    model(input_ids=torch.arange(9)[None], labels=torch.arange(9)[None]).loss.backward()
    optimizer.step()
    state = sum(value.nbytes for one in optimizer.state.values() for value in one.values())
    assert (counted.base, counted.adapter) == (own, sum(p.nbytes for p in model.parameters()) - own)
    assert counted.gradients == sum(p.grad.nbytes for p in trained)
    assert counted.optimizer_state == state


@pytest.mark.parametrize("nested", [True, False])
def test_4_bit_weights_are_bitsandbytes_own(nested):
    functional = pytest.importorskip("bitsandbytes.functional")
    packed, state = functional.quantize_4bit(
        torch.randn(192, 352), compress_statistics=nested, quant_type="nf4"
    )
    scales = state.absmax.nbytes + (state.state2.absmax.nbytes if nested else 0)
    assert packed_bytes(192 * 352, nested) == packed.nbytes + scales


def test_an_unknown_optimizer_is_refused():
    assert optimizer_bytes("adamw_8bit", [10_000], 4) < optimizer_bytes("adamw_torch", [10_000], 4)
    with pytest.raises(ValueError, match="no plan for optim adafactor: known are adamw_torch"):
        optimizer_bytes("adafactor", [1], 4)


@pytest.fixture
def attention_on_cpu(monkeypatch):
    """The variable-length kernels' shapes without the kernels."""
    stub = types.ModuleType("sftlab.fastpath.triton_kernels")
    stub.attention_forward = lambda q, k, v, *_: (
        torch.zeros_like(q),
        torch.zeros(q.shape[1], q.shape[0]),
    )
    stub.attention_backward = lambda g, q, k, v, *_: tuple(map(torch.zeros_like, (q, k, v)))
    monkeypatch.setitem(sys.modules, "sftlab.fastpath.triton_kernels", stub)
    varlen_attention.register()


def llama(targets, dtype, casts, dropout):
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=HIDDEN,
        intermediate_size=MLP,
        num_hidden_layers=3,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS,
        attn_implementation="varlen",
    )
    lora = LoraConfig(r=RANK, target_modules=targets, lora_dropout=dropout, task_type="CAUSAL_LM")
    model = get_peft_model(LlamaForCausalLM(config).to(dtype), lora)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(torch.float32 if casts else dtype)
    return model.train()


def kept_by_autograd(model, dtype, casts):
    """Bytes of activations that the second of three layers keeps.

    Weights and what is as large as they are left out.
    """
    sizes, marks = {}, []
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if TOKENS in tensor.shape and storage.data_ptr() not in weights:
            sizes.setdefault(storage.data_ptr(), (storage.nbytes(), tensor))
        return tensor

    for layer in model.get_base_model().model.layers[1:]:
        layer.register_forward_pre_hook(lambda *_: marks.append(len(sizes)))
    autocast = (
        torch.autocast("cpu", dtype)
        if casts and dtype != torch.float32
        else contextlib.nullcontext()
    )
    ids = torch.randint(0, 64, (1, TOKENS))
    with autocast, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.get_base_model().model(
            input_ids=ids,
            position_ids=torch.arange(TOKENS)[None],
            tiles=tiles([TOKENS]),
            use_cache=False,
        )
    return sum(size for size, _ in list(sizes.values())[slice(*marks)])


def planned_step(targets, precision, casts, compiled, dropout):
    weights = Weights(*[0] * 10, None)
    shape = (HIDDEN, MLP, 2, HEADS, KEY_HEADS, HIDDEN // HEADS, 64)

    return Step(
        Shape(*shape),
        weights,
        precision,
        frozenset(targets),
        RANK,
        TOKENS,
        TOKENS,
        quantized=not casts,
        weight_bytes=4 if precision == "fp32" else 2,
        compiled=compiled,
        dropout=dropout > 0,
    )


@pytest.mark.parametrize("targets", [ATTENTION, ALL], ids=["attention", "all"])
@pytest.mark.parametrize(
    "precision, casts, dropout",
    [
        ("bf16", True, 0.0),
        ("bf16", False, 0.0),
        ("fp32", True, 0.0),
        ("bf16", True, 0.1),
        ("bf16", False, 0.1),
    ],
)
def test_what_a_layer_keeps_is_what_autograd_keeps(
    attention_on_cpu, targets, precision, casts, dropout
):
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    held = kept_by_autograd(llama(targets, dtype, casts, dropout), dtype, casts)
    planned = TOKENS * kept_bytes(planned_step(targets, precision, casts, False, dropout))
    # on a CPU the mask of dropout has the dtype of what is dropped
    inputs = {
        "q_proj": HIDDEN,
        "k_proj": HIDDEN,
        "v_proj": HIDDEN,
        "o_proj": HIDDEN,
        "gate_proj": HIDDEN,
    }
    wide = sum((inputs | {"up_proj": HIDDEN, "down_proj": MLP})[name] for name in targets)
    extra = TOKENS * wide * (3 if casts else 1) if dropout else 0
    assert planned == pytest.approx(held - extra, rel=0.01)


@pytest.mark.parametrize("targets", [ATTENTION, ALL], ids=["attention", "all"])
def test_what_a_compiled_layer_keeps_is_what_inductors_partitioner_keeps(
    attention_on_cpu, targets, monkeypatch
):
    backend = aot_autograd(
        fw_compiler=lambda graph, _: graph.forward,
        bw_compiler=lambda graph, _: graph.forward,
        partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table(),
    )
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda forward: compile_(forward, backend=backend))
    torch.compiler.reset()
    model = llama(targets, torch.bfloat16, True, 0.0)
    compile_layers.compile_layers(model.get_base_model())
    held = kept_by_autograd(model, torch.bfloat16, True)
    assert TOKENS * kept_bytes(planned_step(targets, "bf16", True, True, 0.0)) == pytest.approx(
        held, rel=0.01
    )


def test_the_parts_sum_to_the_peak():
    for launch, fields in (
        ("single", {}),
        ("ddp", {"targets": ALL}),
        ("fsdp", {"gradient_checkpointing": "true"}),
    ):
        plan = forecast(launch, **fields).memory
        parts = (
            "parameters",
            "adapter",
            "gradients",
            "optimizer_state",
            "activations",
            "logits",
            "communication",
        )
        assert plan.allocated == sum(getattr(plan, part) for part in parts) + plan.workspace
        assert plan.needed > plan.allocated + plan.fragmentation > plan.allocated
        assert all(size >= 0 for size in plan[:-1])


def test_memory_grows_with_rows_length_and_rank():
    fields = {"global_batch_size": 0}
    for extra in ({"gradient_checkpointing": "true"}, {"compile_layers": "false", "targets": ALL}):
        peaks = [
            forecast(per_device_train_batch_size=n, **fields, **extra).memory.allocated
            for n in (1, 8, 9)
        ]
        assert peaks == sorted(set(peaks))
        lengths = [RowLengths(1000, n, 0, n, "said") for n in (128, 640, 4096)]
        peaks = [
            forecast(rows=rows, max_length=4096, **fields, **extra).memory.allocated
            for rows in lengths
        ]
        assert peaks == sorted(set(peaks))
        peaks = [forecast(lora_r=n, **fields, **extra).memory.allocated for n in (1, 64)]
        assert peaks == sorted(set(peaks))


def test_techniques_change_memory_in_the_direction_they_are_for():
    peak = {
        name: forecast(launch, **fields).memory
        for name, launch, fields in (
            ("plain", "single", {}),
            ("checkpointed", "single", {"gradient_checkpointing": "true"}),
            ("eager", "single", {"compile_layers": "false"}),
            ("fsdp", "fsdp", {"global_batch_size": 128}),
            ("4 bits", "single", {"load_in_4bit": "true", "bnb_4bit_quant_storage": "bfloat16"}),
            ("fp8", "fp8", {}),
            ("fp32", "fp32", {}),
        )
    }
    assert peak["checkpointed"].activations < 0.4 * peak["plain"].activations
    assert peak["eager"].activations > 1.3 * peak["plain"].activations
    assert peak["fsdp"].parameters == peak["plain"].parameters // 2
    assert peak["4 bits"].parameters < 0.5 * peak["plain"].parameters
    assert peak["fp8"].parameters == peak["plain"].parameters
    assert peak["fp32"].allocated > 1.8 * peak["plain"].allocated


def test_measured_runs_of_the_fast_path_are_near():
    """results/throughput/throughput.csv: 1B shape on an H200, 120 steps of lognormal rows."""
    rows = of_lengths(random_lengths(3000, 512), None, "its own")
    for launch, count, fields, peak in (
        ("single", 32, {}, 14.445),
        ("single", 64, {"targets": ALL}, 33.456),
        ("fp8", 64, {}, 25.278),
        ("single", 32, {"compile_layers": "false"}, 19.694),
        ("ddp", 64, {}, 24.014),
        ("fsdp", 64, {}, 23.456),
    ):
        batch = {
            "per_device_train_batch_size": count,
            "global_batch_size": 0,
            "max_steps": 120,
            "lora_dropout": 0,
        }
        assert forecast(
            launch, rows=rows, **batch, **fields
        ).memory.allocated / 2**30 == pytest.approx(peak, rel=0.05)


def test_measured_runs_of_whole_trainings_are_near():
    """results/techniques: fp32 weights, 16 rows a step, a gradient beside each of them, AdamW's
    copies.
    """
    rows = of_lengths(random_lengths(3000, 512), None, "its own")
    whole = {"use_peft": "false", "dtype": "float32", "global_batch_size": 16, "max_steps": 10}
    for precision, micro_batch, checkpointing, optimizer, peak, at in (
        ("no", 16, "true", "sgd", 10.35, "gradients"),
        ("no", 4, "true", "sgd", 11.24, "gradients"),
        ("no", 16, "true", "adamw_torch", 23.11, "optimizer"),
        ("bf16", 4, "true", "adamw_torch", 23.09, "optimizer"),
        ("no", 4, "false", "adamw_torch", 23.16, "optimizer"),
        ("bf16", 16, "false", "adamw_torch", 24.18, "loss"),
        ("no", 16, "false", "adamw_torch", 28.52, "loss"),
    ):
        fields = {
            "per_device_train_batch_size": micro_batch,
            "gradient_checkpointing": checkpointing,
        }
        plan = forecast(
            "fp32",
            rows=rows,
            flags={"mixed_precision": precision},
            **whole,
            **fields,
            optim=optimizer,
        )
        assert plan.memory.allocated / 2**30 == pytest.approx(peak, rel=0.05)
        assert plan.memory.at == at


def test_layers_of_another_kind_and_8_bits_are_refused(base, fields):
    with launched(exported("accelerate_configs/fp32.yaml")) as launch:
        recipe = parse_recipe([*arguments(fields), "--load_in_8bit=true"], launch)
        with pytest.raises(ValueError, match="no plan is made for weights in 8 bits"):
            count_weights(recipe, AutoConfig.from_pretrained(base))
        recipe = parse_recipe([*arguments(fields), "--lora_target_modules=all-linear"], launch)
        sizes = {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
        }
        with pytest.raises(ValueError, match="phi3 has gate_up_proj, qkv_proj in a layer"):
            count_weights(recipe, Phi3Config(**sizes, vocab_size=100, pad_token_id=0))
    with pytest.raises(ValueError, match="LoRA on qkv_proj: plans are made for q_proj"):
        forecast(targets=["q_proj", "qkv_proj"])


def test_the_largest_micro_batch_is_about_what_sampling_finds():
    import numpy as np

    lengths, generator = random_lengths(3000, 512), np.random.default_rng(0)
    rows = of_lengths(lengths, len(lengths), "its own")
    for processes in (1, 2):  # or micro-batches of one process
        most = []
        for _ in range(20):
            batches = [generator.choice(3000, 32 * processes, replace=False) for _ in range(100)]
            most.append(
                max(
                    lengths[bin_].sum()
                    for one in batches
                    for bin_ in balanced(list(one), lengths, processes)
                )
            )
        assert rows.largest(32, processes, True, 100) == pytest.approx(np.mean(most), rel=0.04)
    assert RowLengths(1, 512, 0, 512, "full").largest(8, 1, True, 10) == 4096
    assert rows.largest(8, 1, False, 10) == 8 * 512


def test_4_bit_weights_are_whole_until_they_are_sharded():
    short = {
        "per_device_train_batch_size": 1,
        "global_batch_size": 4,
        "gradient_checkpointing": "true",
    }
    rows = RowLengths(1000, 64, 0, 64, "said")
    quantized = {"load_in_4bit": "true", "bnb_4bit_quant_storage": "bfloat16", "dtype": "bfloat16"}
    plan = forecast(
        "fsdp", shape="llama2-7b", rows=rows, flags={"num_processes": 4}, **short, **quantized
    ).memory
    assert plan.at == "sharding"
    assert plan.allocated > 1.25 * plan.parameters
    # every linear in 4 bits, embedding and head in 16
    assert 3.5 < plan.parameters / 2**30 < 4
    plain = forecast(
        "fsdp", shape="llama2-7b", rows=rows, flags={"num_processes": 4}, **short
    ).memory
    assert plain.at != "sharding"
    assert plain.parameters == pytest.approx(6.74e9 * 2 / 4, rel=0.01), "read a layer at a time"


def test_the_largest_rows_fit_and_one_more_does_not():
    plan = forecast(gpu="a100-40")
    most = most_rows(plan)
    assert resized(plan, most).fits
    assert not resized(plan, most + 1).fits
    assert most_rows(forecast(gpu="t4", shape="llama2-7b", launch="fp16")) == 0


def test_speed_follows_the_gpu_and_what_is_known_of_the_h200():
    assert forecast(gpu="h100-80").tokens_per_s < forecast(gpu="h200").tokens_per_s
    assert forecast(gpu="a100-80").tokens_per_s < 0.6 * forecast(gpu="h200").tokens_per_s
    assert forecast(gradient_checkpointing="true").tokens_per_s < 0.9 * forecast().tokens_per_s
    assert forecast(gradient_checkpointing="true").time.matrices > 1.3 * forecast().time.matrices
    one, two = forecast(global_batch_size=128), forecast("ddp", global_batch_size=128)
    assert 1.8 < two.tokens_per_s / one.tokens_per_s <= 2
    # results/throughput/throughput.csv
    rows = of_lengths(random_lengths(3000, 512), None, "its own")
    for launch, fields, speed in (
        ("single", {}, 100_047),
        ("fp8", {}, 116_991),
        ("single", {"targets": ALL}, 85_827),
    ):
        assert forecast(launch, rows=rows, lora_dropout=0, **fields).tokens_per_s == pytest.approx(
            speed, rel=0.15
        )


def test_checkpointing_costs_a_forward_whatever_is_trained():
    lora, whole = (
        [forecast(use_peft=peft, gradient_checkpointing=c).time for c in ("false", "true")]
        for peft in ("true", "false")
    )
    again = [checkpointed.matrices - plain.matrices for plain, checkpointed in (lora, whole)]
    assert again[0] == pytest.approx(again[1])
    assert again[0] == pytest.approx(
        lora[0].matrices * 2 / 4 * 0.79, rel=0.01
    )  # a fifth is the head
    assert lora[1].attention / lora[0].attention == pytest.approx(4.5 / 3.5)


def test_bitsandbytes_optimizers_wait_for_every_tensor_once_a_step():
    rows, a_step = RowLengths(38_000, 64, 0, 64, "said"), {}
    for targets, accumulation in ((ATTENTION, 1), (ALL, 1), (ALL, 4)):
        fields = {"rows": rows, "targets": targets, "per_device_train_batch_size": 4}
        two = (
            forecast(optim=name, global_batch_size=4 * accumulation, **fields)
            for name in ("paged_adamw_32bit", "adamw_torch_fused")
        )
        paged, fused = (plan.step_seconds for plan in two)
        a_step[len(targets), accumulation] = paged - fused
    assert a_step[7, 1] == pytest.approx(7 / 3 * a_step[3, 1])
    assert a_step[7, 4] == pytest.approx(a_step[7, 1]) and 0.02 < a_step[7, 1] < 0.04


def test_a_loss_scale_is_waited_for_once_a_step():
    waits = [
        forecast("fp16", per_device_train_batch_size=8, global_batch_size=n).time.waiting
        for n in (8, 32)
    ]
    assert waits[1] == pytest.approx(waits[0] / 4)


def test_accumulation_shares_a_steps_work_and_keeps_gradients_beside_activations():
    rows = RowLengths(38_000, 64, 0, 64, "said")
    one, four = (
        forecast(rows=rows, per_device_train_batch_size=4, global_batch_size=n) for n in (4, 16)
    )
    assert one.time.host > one.time.gpu, "a step so short waits for the host"
    assert four.time.gpu == one.time.gpu and four.time.host < one.time.host
    assert one.step_seconds < four.step_seconds < 4 * one.step_seconds
    whole = forecast(use_peft="false")
    assert whole.step.accumulation == 1 and whole.memory.gradients == 0, (
        "they come as the activations go"
    )
    halved = resized(whole, whole.micro_batch // 2)
    assert halved.step.accumulation == 2 and halved.memory.gradients > 0


def test_time_and_work_follow_from_rows_and_epochs():
    once, twice = forecast(num_train_epochs=1), forecast(num_train_epochs=2)
    assert once.steps == 38_000 // 64
    assert twice.steps == 2 * once.steps or twice.steps == (38_000 // 64 * 2)
    assert twice.total_flops == pytest.approx(2 * once.total_flops, rel=0.01)
    assert twice.hours == pytest.approx(2 * once.hours, rel=0.01)
    # 4 FLOPs a parameter and token
    assert once.total_flops / (once.steps * 64 * 315) == pytest.approx(4.08 * 1.236e9, rel=0.03)


def test_a_model_of_experts_is_refused():
    from transformers import MixtralConfig

    with launched(exported("accelerate_configs/single.yaml")) as launch:
        recipe = parse_recipe(["--config", "recipes/llama3.2-1b/attn_r16.yaml"], launch)
        with pytest.raises(ValueError, match="mixture of experts"):
            make_plan(
                recipe,
                MixtralConfig(num_hidden_layers=1),
                launch,
                GPUS["h200"],
                RowLengths(1, 10, 0, 10, ""),
            )
