"""Trains one variant of benchmarks/throughput.py, which starts it, in a process of its own.

accelerate launch --config_file accelerate_configs/single.yaml benchmarks/throughput_worker.py \
    --kind sft --fields '{}' --base DIR --rows FILE --turns 3 --folder DIR

It warms up and writes `ready0`. At `go0` it trains a turn of steps and writes `done0` (JSON), and
so on. The turn after the last has ten steps and is profiled. The GPU is idle when a turn starts and
when it ends.
"""

import sftlab.startup.filter_warnings  # noqa: I001  (before the libraries that it quiets)
import sftlab.startup.single_process  # noqa: F401  (before they see the devices)

import importlib.util
import json
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback
from trl import SFTConfig, SFTTrainer

from sftlab.measurement.flops import Flops, flops_per_token
from sftlab.measurement.hardware_limit import synchronize
from sftlab.measurement.throughput import Meter
from sftlab.paths import ROOT
from sftlab.data.chat_template import encode, set_template
from sftlab.script_options import Options
from sftlab.training.trainer import LabTrainer

# Steps before the first turn and in a turn; the slower the variant, the fewer.
WARM_STEPS, STEPS = {"sft": 20, "trl": 10, "loop": 5}, {"sft": 30, "trl": 10, "loop": 8}
PROFILED_STEPS = 10
LORA = {
    "r": 16,
    "lora_alpha": 32,
    "target_modules": ["q_proj", "v_proj", "o_proj"],
    "task_type": "CAUSAL_LM",
}
# What a kernel's name says of its work; the first match counts.
KERNELS = {
    "matrix products": ("nvjet", "gemm", "cutlass", "cublas", "splitK"),
    "attention": ("_forward", "_backward_query", "_backward_key", "flash", "fmha"),
    "cross-entropy": ("_cross_entropy",),
    "communication": ("nccl",),
    "norms, sums and casts with scales": ("triton_red", "triton_per"),
    "elementwise": ("triton_poi", "elementwise", "vectorized"),
    "optimizer": ("multi_tensor",),
    "copies": ("Memcpy", "Memset", "index"),
    "dequantisation": ("Dequantize", "dequant"),
}


class Turnstile(TrainerCallback):
    """Lets a turn of steps train when its file appears, times it and counts its tokens.

    The counts are those of all processes.
    """

    def __init__(self, folder: Path, kind: str, turns: int) -> None:
        self._folder, self._turns, self._turn = folder, turns, 0
        self._first, self._steps = WARM_STEPS[kind], STEPS[kind]
        self.total = self._first + turns * self._steps + PROFILED_STEPS * (kind == "sft")
        self._profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
        self._counts: list[torch.Tensor | int] = [0, 0, 0]
        self._loss: float | None = None
        self.flops: Flops | None = None

    def count(self, *counts: torch.Tensor | int) -> None:
        """Add a micro-batch's tokens, rows and tokens in the loss; counts on the GPU stay there."""
        self._counts = [total + count for total, count in zip(self._counts, counts, strict=True)]

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any
    ) -> None:
        """Keep the training loss."""
        self._loss = logs.get("loss", self._loss)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Wait at the first step of a turn."""
        if state.global_step == self._first:
            synchronize()
            (self._folder / f"ready{self._turn}").touch()
            while not (self._folder / f"go{self._turn}").exists():
                time.sleep(0.01)
            if self._turn == self._turns:
                self._steps = PROFILED_STEPS
                self._profiler.start()
            self._counts, self._started = [0, 0, 0], time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Report at the last step of a turn."""
        if state.global_step != self._first + self._steps:
            return
        synchronize()
        seconds, report = time.perf_counter() - self._started, {}
        if self._turn == self._turns:
            self._profiler.stop()
            report["kernels"] = kernel_classes(self._profiler, seconds)
        counts, rank = (
            torch.tensor([float(count) for count in self._counts], dtype=torch.float64),
            0,
        )
        if dist.is_initialized():
            counts, rank = counts.cuda(), dist.get_rank()
            dist.all_reduce(counts)
        tokens, rows, loss_tokens = (counts / seconds).tolist()
        work = self.flops.token * tokens + self.flops.loss_token * loss_tokens
        report |= {
            "tokens_per_s": tokens,
            "rows_per_s": rows,
            "model_flops_per_s": work,
            "loss": self._loss,
        }
        report["peak_gb"] = (
            torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
        )
        if rank == 0:
            (self._folder / "report").write_text(json.dumps(report), encoding="utf-8")
            (self._folder / "report").rename(self._folder / f"done{self._turn}")
        self._turn, self._first = self._turn + 1, self._first + self._steps


def kernel_classes(profiler: torch.profiler.profile, seconds: float) -> dict[str, float]:
    """Returns the milliseconds a step that the GPU spends in each class of kernel, and in none."""
    spent = dict.fromkeys([*KERNELS, "other"], 0.0)
    for event in profiler.key_averages():
        found = (
            name for name, words in KERNELS.items() if any(word in event.key for word in words)
        )
        spent[next(found, "other")] += event.self_device_time_total / 1e3 / PROFILED_STEPS
    return spent | {"none": seconds / PROFILED_STEPS * 1e3 - sum(spent.values())}


def train_sft(
    fields: dict[str, Any], base: str, rows: str, steps: int, turnstile: Turnstile, folder: Path
) -> None:
    """Train with recipes/sft.py, the turnstile among its callbacks."""
    build, count = LabTrainer.__init__, Meter.count

    def with_turnstile(self: LabTrainer, *args: Any, callbacks: list, **kwargs: Any) -> None:
        build(self, *args, callbacks=[*callbacks, turnstile], **kwargs)
        turnstile.flops = self.flops

    LabTrainer.__init__ = with_turnstile
    Meter.count = lambda self, *counts: (count(self, *counts), turnstile.count(*counts))
    recipe, targets = (
        fields.pop("recipe", "llama3.2-1b/attn_r16"),
        fields.pop("lora_target_modules", None),
    )
    settings = {
        "model_name_or_path": base,
        "dataset_name": rows,
        "dataset_fraction": 1,
        "output_dir": folder / "run",
        "max_steps": steps,
        "eval_strategy": "no",
        "save_strategy": "no",
        "lora_dropout": 0,
        "disable_tqdm": "true",
        **fields,
    }
    argv = ["--config", f"recipes/{recipe}.yaml", *(f"--{k}={v}" for k, v in settings.items())]
    argv += [
        "--split_fractions",
        "0.99",
        "0",
        "0.01",
        *(["--lora_target_modules", *targets] if targets else []),
    ]
    spec = importlib.util.spec_from_file_location("sft", ROOT / "recipes" / "sft.py")
    sft = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sft)
    sft.main(argv)


def train_trl(
    fields: dict[str, Any], base: str, rows: str, steps: int, turnstile: Turnstile, folder: Path
) -> None:
    """Train with plain SFTTrainer on the same tokens, with TensorBoard."""

    class Counting(SFTTrainer):
        def training_step(
            self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any
        ) -> torch.Tensor:
            packed = inputs.get("attention_mask") is None
            tokens = inputs["input_ids"].numel() if packed else inputs["attention_mask"].sum()
            count = (inputs["position_ids"] == 0).sum() if packed else inputs["input_ids"].shape[0]
            turnstile.count(tokens, count, tokens - count)
            return super().training_step(model, inputs, *args, **kwargs)

    os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder / "tensorboard")
    model_fields = {"dtype": fields.pop("dtype", "bfloat16")}
    if fields.pop("load_in_4bit", False):
        model_fields["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
            bnb_4bit_quant_storage=torch.bfloat16,
        )
    lora = LoraConfig(**LORA | fields.pop("lora", {}))
    settings = {
        "per_device_train_batch_size": 20,
        "max_length": 512,
        "bf16": True,
        "gradient_checkpointing": False,
    }
    args = SFTConfig(
        output_dir=str(folder),
        max_steps=steps,
        model_init_kwargs=model_fields,
        report_to="tensorboard",
        logging_steps=10,
        save_strategy="no",
        learning_rate=2e-4,
        disable_tqdm=True,
        **settings | fields,
    )
    ids = token_rows(base, rows, args.max_length, 2 * steps * args.per_device_train_batch_size)
    dataset = Dataset.from_dict({"input_ids": ids, "labels": ids})
    trainer = Counting(
        model=base, args=args, train_dataset=dataset, peft_config=lora, callbacks=[turnstile]
    )
    turnstile.flops = flops_per_token(trainer.model)
    trainer.train()


def train_loop(
    fields: dict[str, Any], base: str, rows: str, steps: int, turnstile: Turnstile, folder: Path
) -> None:
    """The loop of the published 1B study, rebuilt.

    It has float32 weights, autocast, 20 rows a step padded to 512 tokens, and whole logits.
    """
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).cuda().train()
    model = get_peft_model(model, LoraConfig(**LORA))
    turnstile.flops = flops_per_token(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4)
    dtype = getattr(torch, fields["autocast"] or "float16")
    scaler = torch.amp.GradScaler(enabled=fields["autocast"] == "float16")
    texts = token_rows(base, rows, 512, steps * 20)
    for step in range(steps):
        turnstile.on_step_begin(None, SimpleNamespace(global_step=step), None)
        batch = texts[20 * step : 20 * step + 20]
        ids, labels = torch.zeros(20, 512, dtype=torch.long), torch.full((20, 512), -100)
        for i, row in enumerate(batch):
            ids[i, : len(row)] = labels[i, : len(row)] = torch.tensor(row)
        ids, labels = ids.cuda(), labels.cuda()
        with torch.autocast("cuda", dtype, enabled=fields["autocast"] is not None):
            loss = model(input_ids=ids, attention_mask=(labels != -100).long(), labels=labels).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        tokens = sum(map(len, batch))
        turnstile.count(tokens, len(batch), tokens - len(batch))
        turnstile.on_step_end(None, SimpleNamespace(global_step=step + 1), None)


def token_rows(base: str, path: str, max_length: int, count: int) -> list[list[int]]:
    """Returns the token ids of the first `count` rows of a file, as sft.py encodes them.

    A file with fewer rows is read again from its start.
    """
    tokenizer = AutoTokenizer.from_pretrained(base)
    set_template(tokenizer)
    rows = [json.loads(line) for line in (ROOT / path).read_text(encoding="utf-8").splitlines()]
    found = []
    for row in (rows * (1 + count // len(rows)))[:count]:
        asked = {"role": "user", "content": row["instruction"]}
        answer = {"role": "assistant", "content": row["response"]}
        found.append(
            encode(tokenizer, {"prompt": [asked], "completion": [answer]}, max_length)["input_ids"]
        )
    return found


def main() -> None:
    """Train one variant; it stops after its last turn."""
    parser = Options(description=__doc__.splitlines()[0])
    kinds = {"sft": train_sft, "trl": train_trl, "loop": train_loop}
    parser.add_argument("--kind", choices=kinds, required=True)
    parser.add_argument("--fields", type=json.loads, required=True)
    parser.add_argument("--base", required=True)
    parser.add_argument("--rows", required=True)
    parser.add_argument("--turns", type=int, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    arguments = parser.parse_args()
    turnstile = Turnstile(arguments.folder, arguments.kind, arguments.turns)
    kinds[arguments.kind](
        arguments.fields,
        arguments.base,
        arguments.rows,
        turnstile.total,
        turnstile,
        arguments.folder,
    )


if __name__ == "__main__":
    main()
