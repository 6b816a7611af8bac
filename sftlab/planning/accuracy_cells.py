"""On which trainings are plans held against measurements?

A line of FITTED or HELD_OUT is a cell: shape, targets, precision, row length x rows of a
micro-batch, strategy, and any of these words:
- `checkpointed`, `compiled`, `dropout`
- `mixed`: lognormal row lengths up to the one named
- `r64`: the rank
- `accumulated`: over four micro-batches
- `within40`: the allocator is given 40 GB
- `alone`: FSDP on one GPU
"""

from typing import Any, NamedTuple

from sftlab.models.random_models import random_files
from sftlab.paths import ROOT

CELL_SHAPES = {"1b": "llama3.2-1b", "7b": "llama2-7b"}
ATTENTION = ["q_proj", "v_proj", "o_proj"]
TARGETS = {"attn": ATTENTION, "all": [*ATTENTION, "k_proj", "gate_proj", "up_proj", "down_proj"]}
STEPS = 12
QLORA = {
    "load_in_4bit": "true",
    "use_bnb_nested_quant": "true",
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_quant_storage": "bfloat16",
}


class Cell(NamedTuple):
    """One training, with micro-batches of `rows` rows of `length` tokens."""

    name: str
    shape: str
    targets: str
    precision: str
    length: int
    rows: int
    strategy: str
    checkpointing: bool = False
    compiled: bool = False
    mixed: bool = False
    rank: int = 16
    accumulation: int = 1
    within_gb: int = 0
    dropout: bool = False
    alone: bool = False

    @property
    def gpus(self) -> int:
        """The number of GPUs that it takes."""
        return 1 if self.alone or self.strategy == "single" else 2

    @property
    def held_out(self) -> bool:
        """Whether the planner's constants were not fitted to it."""
        return self.name in HELD_OUT.split("\n")

    def files(self) -> tuple[str, int, int]:
        """Returns shape, longest and shortest row, for sftlab/models/random_models.py."""
        return CELL_SHAPES[self.shape], self.length, 16 if self.mixed else self.length

    def launch(self) -> tuple[str, dict[str, Any]]:
        """Returns the launch config and accelerate's flags."""
        precision = {"fp32": "no", "nf4": "bf16"}.get(self.precision, self.precision)
        file = "fp8" if self.precision == "fp8" and self.strategy != "fsdp" else self.strategy
        return f"accelerate_configs/{file}.yaml", {
            "num_processes": self.gpus,
            "mixed_precision": precision,
        }

    def fields(self) -> dict[str, Any]:
        """Returns the recipe's fields."""
        model, data = (str(path.relative_to(ROOT)) for path in random_files(*self.files()))
        fields = {
            "model_name_or_path": model,
            "dataset_name": data,
            "dataset_fraction": 1,
            "max_length": self.length,
            "output_dir": f"runs/plan-{self.name.replace(' ', '_')}",
            "lora_r": self.rank,
            "lora_alpha": 2 * self.rank,
            "lora_dropout": 0.05 if self.dropout else 0,
            "per_device_train_batch_size": self.rows,
            "global_batch_size": self.rows * self.accumulation * self.gpus,
            "max_steps": STEPS,
            "gradient_checkpointing": self.checkpointing,
            "compile_layers": self.compiled,
            "eval_strategy": "no",
            "save_strategy": "no",
            "overwrite": True,
            "disable_tqdm": True,
            "warmup_steps": 2,
            "logging_steps": 4,
        }
        if self.precision == "nf4":
            fields |= QLORA | {
                "optim": "adamw_torch_fused" if self.strategy == "fsdp" else "paged_adamw_32bit"
            }
        # as results/plan_accuracy was measured
        fields["fused_lora"] = False
        if self.strategy == "fsdp":
            fields["fsdp_layers_per_unit"] = 1
        return fields

    def argv(self) -> list[str]:
        """Returns the arguments of recipes/sft.py."""
        words = [
            f"--{k}={str(v).lower() if isinstance(v, bool) else v}"
            for k, v in self.fields().items()
        ]
        words += [
            "--lora_target_modules",
            *TARGETS[self.targets],
            "--split_fractions",
            "0.99",
            "0",
            "0.01",
        ]
        return ["--config", "recipes/llama3.2-1b/attn_r16.yaml", *words]


FITTED = """
1b attn bf16 512x16 single
1b attn bf16 512x16 single compiled
1b attn bf16 512x16 single checkpointed
1b attn bf16 512x16 single checkpointed compiled
1b all bf16 512x32 single compiled
1b all bf16 1024x8 single
1b attn fp32 512x8 single
1b all fp32 1024x8 single compiled
1b attn fp16 512x32 single
1b all fp16 2048x4 single compiled
1b attn fp8 512x32 single compiled
1b attn fp8 1024x8 single
1b all nf4 512x16 single checkpointed
1b attn nf4 1024x8 single compiled
7b attn bf16 512x8 single compiled
7b all bf16 1024x4 single
7b all nf4 1024x4 single checkpointed compiled
7b all fp8 512x8 single compiled
7b attn fp32 512x4 single
7b all nf4 512x8 single
1b all bf16 2048x4 single checkpointed
1b attn bf16 4096x4 single compiled
1b all bf16 4096x4 single
1b attn bf16 512x64 single compiled mixed
1b all bf16 1024x16 single compiled r64
1b attn fp32 2048x2 single checkpointed
1b all fp16 4096x2 single checkpointed
1b all fp8 4096x2 single
7b attn bf16 4096x1 single
1b attn fp8 512x16 single checkpointed compiled
1b all bf16 1024x2 single
1b attn bf16 1024x2 single
1b all bf16 1024x2 single compiled
1b all bf16 1024x2 single checkpointed
1b all bf16 1024x2 single checkpointed compiled
1b all nf4 1024x2 single checkpointed
1b all bf16 1024x2 fsdp alone
1b all bf16 1024x2 fsdp alone checkpointed
1b all nf4 1024x2 fsdp alone checkpointed
1b attn fp8 512x32 fsdp alone
1b attn fp8 512x32 fsdp alone compiled
1b attn bf16 1024x2 single accumulated
1b all bf16 1024x2 single compiled accumulated
1b attn bf16 512x16 ddp compiled
1b all bf16 1024x8 fsdp
7b attn bf16 1024x4 ddp compiled
1b attn fp32 512x8 ddp
1b all fp32 512x8 fsdp
1b attn fp16 2048x4 fsdp
1b attn fp8 512x32 ddp compiled
7b all nf4 512x8 ddp checkpointed compiled
1b attn fp8 512x32 fsdp
"""
# Measured after the constants of sftlab/planning/step_memory.py and step_time.py were fixed. No
# constant was changed because of them.
HELD_OUT = """
1b all fp32 4096x1 single checkpointed
1b all fp8 2048x4 single checkpointed compiled
7b all bf16 2048x4 single checkpointed
7b all fp16 512x8 single compiled
7b all fp32 1024x2 single checkpointed
7b attn fp8 2048x2 single
7b attn nf4 4096x1 single checkpointed
7b attn nf4 2048x2 single compiled
1b attn bf16 512x8 single compiled accumulated
1b all bf16 4096x8 single within40
7b all bf16 1024x8 single within40
7b all bf16 4096x4 single within80
7b all nf4 4096x8 single compiled
1b attn bf16 512x16 fsdp compiled
1b all bf16 1024x8 ddp
7b all bf16 512x8 fsdp compiled
1b all fp16 2048x4 ddp checkpointed
1b all nf4 1024x8 ddp checkpointed
1b all nf4 1024x8 fsdp checkpointed
7b all bf16 4096x1 fsdp checkpointed
7b attn bf16 2048x2 fsdp
7b all nf4 1024x4 fsdp checkpointed
1b all bf16 1024x8 single compiled dropout
1b all fp8 1024x8 fsdp alone compiled
1b all bf16 1024x2 single checkpointed compiled accumulated
1b all bf16 512x16 single dropout
"""


def parse(line: str) -> Cell:
    """Returns the cell of a line."""
    shape, targets, precision, size, strategy, *rest = line.split()
    length, rows = map(int, size.split("x"))
    special: dict[str, Any] = {
        "checkpointing": "checkpointed" in rest,
        "compiled": "compiled" in rest,
        "dropout": "dropout" in rest,
        "alone": "alone" in rest,
        "mixed": "mixed" in rest,
        "accumulation": 4 if "accumulated" in rest else 1,
    }
    special["rank"] = next((int(word[1:]) for word in rest if word[1:].isdigit()), 16)
    special["within_gb"] = next((int(word[6:]) for word in rest if word.startswith("within")), 0)
    return Cell(line, shape, targets, precision, length, rows, strategy, **special)


CELLS = [parse(line) for line in (FITTED + HELD_OUT).split("\n") if line]
