"""What do FSDP2's hooks cost the host, by the decoder layers in a unit? Two processes on a CPU.

python benchmarks/fsdp_units.py [--layers 16] [--sizes 1 2 4 8 16] [--steps 40]

A tiny Llama with LoRA takes steps of one row in each setting in turn: unsharded, and in units of so
many layers. Products are next to nothing, so what sharding adds is the hooks, the copies and the
waits of one process for the other. The table has milliseconds a step (median, lowest, highest of
the process that took longest), what it takes more than unsharded, and the share of that in units of
a layer. On a GPU the copies are its own and the waits differ: what carries over is the share.
"""

import os
import statistics
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from sftlab.exit_messages import mistakes_in_one_line
from sftlab.fastpath.compile_layers import decoder_layers
from sftlab.fastpath.fsdp import gather_ahead
from sftlab.fastpath.fsdp_units import units_of
from sftlab.script_options import Options
from sftlab.tables import aligned

PROCESSES = 2
WARM_UP = 5


def main(argv: list[str]) -> None:
    """Measure in two processes and print the table."""
    parser = Options(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args(argv)
    if min(*options.sizes, options.layers, options.steps) < 1:
        raise ValueError("--layers, --sizes and --steps are whole numbers of at least 1")
    with TemporaryDirectory() as folder:
        given = (Path(folder), options.layers, [0, *options.sizes], options.steps)
        torch.multiprocessing.spawn(measure, given, nprocs=PROCESSES)
        found = [torch.load(Path(folder) / str(rank)) for rank in range(PROCESSES)]
    print(aligned(table(found)))


def measure(rank: int, folder: Path, layers: int, sizes: list[int], steps: int) -> None:
    """Save the milliseconds of this process's steps, by the layers in a unit; 0 is unsharded."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=PROCESSES)
    models = {size: model(layers, size) for size in sizes}
    taken: dict[int, list[float]] = {size: [] for size in sizes}
    for turn in range(WARM_UP + steps):
        for size in sizes if turn % 2 else reversed(sizes):
            dist.barrier()
            began = time.perf_counter()
            step(models[size])
            if turn >= WARM_UP:
                taken[size].append(1e3 * (time.perf_counter() - began))
    torch.save(taken, folder / str(rank))
    dist.destroy_process_group()


def model(layers: int, size: int) -> nn.Module:
    """Returns a tiny Llama with whole LoRA matrices, its frozen weights in units of `size`."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "o_proj"])
    made = get_peft_model(LlamaForCausalLM(config).bfloat16(), lora)
    if not size:
        return made
    base = made.get_base_model()
    common = {
        "mesh": init_device_mesh("cpu", (PROCESSES,)),
        "mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16),
        "ignored_params": {p for p in made.parameters() if p.requires_grad},
    }
    for unit in units_of(decoder_layers(base), size):
        fully_shard(unit if size > 1 else unit[0], **common)
    fully_shard(made, **common)
    gather_ahead(base, size)
    return made


def step(model: nn.Module) -> None:
    """Run one row forward and backward."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=torch.arange(16)[None]).logits
    logits.float().logsumexp(-1).sum().backward()
    model.zero_grad()


def table(found: list[dict[int, list[float]]]) -> list[list[str]]:
    """Returns a row for each number of layers in a unit, under a head."""
    slowest = {size: list(map(max, *(one[size] for one in found))) for size in found[0]}
    plain = statistics.median(slowest[0])
    rows = [["layers a unit", "ms a step", "lowest", "highest", "more", "share"]]
    more = {size: statistics.median(ms) - plain for size, ms in slowest.items()}
    for size, ms in slowest.items():
        figures = [f"{value:.1f}" for value in (statistics.median(ms), min(ms), max(ms))]
        share = f"{more[size] / more[1]:.2f}" if size and 1 in more else ""
        rows.append([str(size or "unsharded"), *figures, f"{more[size]:.1f}", share])
    return rows


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with mistakes_in_one_line():
        main(sys.argv[1:])
