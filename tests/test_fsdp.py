"""FSDP2 over two CPU processes:

the training that DDP does, to the last bit, and its continuation.
"""

import os
import signal
import subprocess

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, launch, launch_command, read, short_fields
from packed_training import FOUR_BITS
from tiny_base import with_words_of_16, write_base_of
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from sftlab.fastpath import fsdp

pytestmark = pytest.mark.long

IN_BF16 = ("--mixed_precision", "bf16")
UNITS = "fsdp_layers_per_unit"
# as many as have their collectives counted
TWENTY_STEPS = {"max_steps": "20", "save_steps": "20"}


def command(fields, config="fsdp", flags=IN_BF16):
    typed = launch_command(config, fields, flags)
    return [word.replace("recipes/sft.py", "tests/fsdp_on_cpu.py") for word in typed]


def launch_fsdp(fields, *other, **more):
    done = subprocess.run(
        command(fields, *other, **more), capture_output=True, text=True, cwd=ROOT, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]


def adapter(folder):
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def launch_ddp(fields, folder, flags=IN_BF16):
    fields = {name: value for name, value in fields.items() if name != UNITS}
    done = launch("cpu_ddp", fields | {"output_dir": str(folder)}, flags)
    assert done.returncode == 0, done.stderr[-3000:]
    return read(folder)


def as_ddp(ran):
    """What ran under FSDP2, under the names of DDP."""
    return {name: value for name, value in ran.items() if name != UNITS} | {"strategy": "ddp"}


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """A base model of five layers, which are no whole number of units of two."""
    return write_base_of("llama", tmp_path_factory.mktemp("deep"), num_hidden_layers=5)


@pytest.fixture(scope="module")
def sharded(deep, rows, tmp_path_factory):
    """Folder and fields of a run in units of two, whose steps are two micro-batches a process."""
    folder = tmp_path_factory.mktemp("runs") / "fsdp"
    fields = {
        **short_fields(deep, rows, folder),
        "max_steps": "40",
        "save_steps": "20",
        "eval_strategy": "no",
        UNITS: "2",
    }
    fields |= {"per_device_train_batch_size": "2", "lora_dropout": "0.1"}
    launch_fsdp(fields)
    return folder, fields


def test_fsdp_trains_as_ddp_does(sharded, tmp_path):
    folder, fields = sharded
    fsdp, ddp = read(folder), launch_ddp(fields, tmp_path / "ddp")
    assert (fsdp["ran"]["strategy"], ddp["ran"]["strategy"]) == ("fsdp2", "ddp")
    assert fsdp["ran"][UNITS] == 2 and UNITS not in ddp["ran"]
    assert as_ddp(fsdp["ran"]) == ddp["ran"]
    assert (fsdp["ran"]["accumulation"], fsdp["ran"]["gradients_reduced_in"]) == (2, "float32")
    assert fsdp["losses"] == ddp["losses"]
    assert len(fsdp["losses"]) == 40
    assert adapter(folder) == adapter(tmp_path / "ddp")


def test_a_checkpointed_unit_is_gathered_once_for_its_backward_and_evaluated(
    deep, rows, sharded, tmp_path
):
    """Every layer runs forward again within the backward of its unit."""
    fields = short_fields(deep, rows, tmp_path / "fsdp") | {UNITS: "2"} | TWENTY_STEPS
    fields |= {"gradient_checkpointing": "true", "eval_strategy": "steps", "eval_steps": "10"}
    fields |= {"per_device_train_batch_size": "2", "lora_dropout": "0.1"}
    launch_fsdp(fields)
    fsdp, ddp = read(tmp_path / "fsdp"), launch_ddp(fields, tmp_path / "ddp")
    assert as_ddp(fsdp["ran"]) == ddp["ran"] and fsdp["ran"][UNITS] == 2
    assert len(fsdp["losses"]) == 20 and fsdp["losses"] == ddp["losses"]
    loss = "validation_loss"
    assert fsdp["measured"][loss] > 0 and fsdp["measured"][loss] == ddp["measured"][loss]
    assert adapter(tmp_path / "fsdp") == adapter(tmp_path / "ddp")
    talk, without = (run["measured"]["collectives"] for run in (fsdp, read(sharded[0])))
    assert talk["all_gather"] == without["all_gather"]


def test_all_that_trains_is_the_same_in_units_of_two_and_of_one(deep, rows, tmp_path):
    """Without LoRA every weight is sharded, and its gradient reduced."""
    runs = {size: tmp_path / size for size in ("1", "2")}
    for size, folder in runs.items():
        fields = short_fields(deep, rows, folder) | {UNITS: size, "use_peft": "false"}
        fields |= {"per_device_train_batch_size": "2", "eval_strategy": "no"} | TWENTY_STEPS
        launch_fsdp(fields | {"learning_rate": "0.001"})
    one, two = map(read, runs.values())
    assert len(one["losses"]) == 20 and one["losses"] == two["losses"]
    assert one["losses"][0] != one["losses"][-1]
    more, less = (run["measured"]["collectives"] for run in (one, two))
    saved = {kind: found["calls"] - less[kind]["calls"] for kind, found in more.items()}
    # gloo reduces and scatters by an all-reduce, once a step; weights are gathered twice
    assert saved == {"all_gather": 8, "all_reduce": 2}
    assert {kind: found["mb"] for kind, found in more.items()} == {
        kind: found["mb"] for kind, found in less.items()
    }
    weights = [next(folder.glob("adapter/model*.safetensors")) for folder in runs.values()]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_fsdp_trains_in_fp8_as_ddp_does(base, rows, tmp_path):
    """All layers are one unit here; the head's words are a multiple of 16."""
    of_16 = with_words_of_16(base, tmp_path / "of_16")
    runs = {config: tmp_path / config for config in ("fsdp", "cpu_ddp")}
    for config, folder in runs.items():
        fields = short_fields(of_16, rows, folder) | {"save_strategy": "no", "eval_strategy": "no"}
        fields |= {UNITS: "2"} if config == "fsdp" else {}
        launch_fsdp(fields, config, ("--mixed_precision", "fp8"))
    fsdp, ddp = map(read, runs.values())
    assert fsdp["ran"]["compute"]["linear"] == "FrozenFloat8Linear" and fsdp["ran"][UNITS] == 2
    assert fsdp["ran"]["float8_head"]
    assert as_ddp(fsdp["ran"]) == ddp["ran"]
    assert len(fsdp["losses"]) == 6 and fsdp["losses"] == ddp["losses"]
    assert adapter(runs["fsdp"]) == adapter(runs["cpu_ddp"])


def test_ddp_trains_weights_in_4_bits_in_fp8_and_fsdp_refuses_them(base, rows, tmp_path):
    """Two processes have the adapter of one, and what is asked for runs."""
    runs = {config: tmp_path / config for config in ("cpu", "cpu_ddp")}
    for config, folder in runs.items():
        fields = short_fields(base, rows, folder) | {"save_strategy": "no", "eval_strategy": "no"}
        fields |= FOUR_BITS | {"per_device_train_batch_size": "4"}
        launch_fsdp(fields, config, ("--mixed_precision", "fp8"))
    one, two = map(read, runs.values())
    for run in (one, two):
        ran = run["ran"]
        assert ran["compute"] == {"linear": "Float8Linear4bit", "output_dtype": "bfloat16"}
        assert ran["four_bit_weights"] == "one kernel, float8" and ran["precision"] == "fp8"
    assert (one["ran"]["strategy"], two["ran"]["strategy"]) == ("single", "ddp")
    losses = [[loss for _, loss in run["losses"]] for run in (one, two)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02) and losses[0][-1] < losses[0][0]
    typed = command(fields | {"overwrite": "true"}, "fsdp", ("--mixed_precision", "fp8"))
    done = subprocess.run(typed, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode and "which FSDP2 does not gather: launch with fp8.yaml" in done.stderr


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_sharded_matrices_get_their_gradients_at_the_end_of_a_step(base, rows, tmp_path, precision):
    """LoRA with a bias is sharded, and a micro-batch that ends no step leaves no gradient."""
    fields = short_fields(base, rows, tmp_path) | {"lora_bias": "true", "max_steps": "2"}
    fields |= {"per_device_train_batch_size": "2", "save_strategy": "no", "eval_strategy": "no"}
    launch_fsdp(fields, "fsdp", ("--mixed_precision", precision))
    assert read(tmp_path)["ran"]["accumulation"] > 1 and len(read(tmp_path)["losses"]) == 2


def test_fsdp_gathers_weights_and_averages_gradients_at_once(sharded):
    record = read(sharded[0])
    talk, trained = record["measured"]["collectives"], record["ran"]["trainable_parameters"]
    # of two micro-batches: three units in the forward, and two in the backward, which begins with
    # the third. Units of a layer would make it 27, frozen embeddings in the backward 2 more.
    assert talk["all_gather"]["calls"] == 19
    assert "reduce_scatter" not in talk, "no gradient of a sharded weight is there to be reduced"
    assert talk["all_reduce"]["mb"] == pytest.approx(trained * 4 / 2**20, abs=2e-3)


def test_fsdp_continues_after_a_kill_as_if_nothing_had_happened(sharded, tmp_path, monkeypatch):
    """With a loss scale as well, which changes nothing where no gradient overflows, and continues
    too.
    """
    monkeypatch.setenv("SCALED", "1")
    fields = {**sharded[1], "output_dir": str(tmp_path / "again"), "disable_tqdm": "true"}
    process = subprocess.Popen(
        command(fields), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    steps = (line for line in process.stdout if "'loss'" in line)
    for _ in range(22):
        next(steps)
    os.kill(read(tmp_path / "again")["host_pid"][1], signal.SIGKILL)
    process.wait(120)
    assert read(tmp_path / "again")["status"] != "succeeded"
    launch_fsdp(fields)
    assert read(tmp_path / "again")["interruptions"][0]["step"] == 20
    assert read(tmp_path / "again")["losses"] == read(sharded[0])["losses"]
    assert adapter(tmp_path / "again") == adapter(sharded[0])


def _clip_in_one_of_two(rank: int, store: str, out: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    found = {}
    for max_norm in (1.0, 1e6):
        for name in ("ours", "torch's"):
            torch.manual_seed(0)
            # one row cannot be halved: a rank has an empty shard of it
            parameters = [
                torch.nn.Parameter(distribute_tensor(torch.zeros(n, 5), mesh, [Shard(0)]))
                for n in (4, 7, 1)
            ]
            for parameter in parameters:
                parameter.grad = distribute_tensor(torch.randn(parameter.shape), mesh, [Shard(0)])
            clip = fsdp.clip_sharded_ if name == "ours" else torch.nn.utils.clip_grad_norm_
            norm = clip(parameters, max_norm)
            norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
            found[name, max_norm] = [
                norm,
                *(parameter.grad.full_tensor() for parameter in parameters),
            ]
    if rank == 0:
        torch.save(found, out)
    dist.destroy_process_group()


def test_sharded_gradients_are_clipped_as_torch_clips_them(tmp_path):
    torch.multiprocessing.spawn(
        _clip_in_one_of_two, (f"{tmp_path}/store", f"{tmp_path}/out"), nprocs=2
    )
    found = torch.load(f"{tmp_path}/out")
    for max_norm in (1.0, 1e6):
        torch.testing.assert_close(found["ours", max_norm], found["torch's", max_norm])
    assert found["ours", 1.0][1].norm() < found["ours", 1e6][1].norm()


def test_fsdp_trains_lora_on_experts_as_ddp_does(rows, tmp_path):
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    base = write_base_of("qwen3_moe", tmp_path, **experts)
    runs = {config: tmp_path / config for config in ("fsdp", "cpu_ddp")}
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    for config, folder in runs.items():
        fields = short_fields(base, rows, folder) | {"save_strategy": "no", "eval_strategy": "no"}
        launch_fsdp(fields | {"lora_dropout": "0", "lora_target_parameters": targets}, config)
    fsdp, ddp = map(read, runs.values())
    assert fsdp["ran"]["experts_lora"] == "factored"
    assert as_ddp(fsdp["ran"]) == ddp["ran"]
    assert len(fsdp["losses"]) == 6 and fsdp["losses"] == ddp["losses"]
    assert adapter(runs["fsdp"]) == adapter(runs["cpu_ddp"])
