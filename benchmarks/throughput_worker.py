"""Trains one variant of benchmarks/throughput.py, which starts it, in a process of its own.

accelerate launch --config_file accelerate_configs/single.yaml benchmarks/throughput_worker.py \
    --kind sft --fields '{}' --base DIR --rows FILE --turns 3 --folder DIR

It warms up and writes `ready0`. At `go0` it trains a turn of steps and writes `done0` (JSON), and
so on. With `--profiled 1` a turn of ten steps more is profiled. The GPU is idle when a turn starts
and when it ends. Slow ones end after LONGEST_S (sftlab/measurement/turnstile.py).
"""

import sftlab.startup.filter_warnings  # noqa: I001  (before the libraries that it quiets)
import sftlab.startup.single_process  # noqa: F401  (before they see the devices)

import importlib.util
import json
import os
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

if "--kind=unsloth" in sys.argv:  # it patches the libraries below
    os.environ |= {"UNSLOTH_DISABLE_STATISTICS": "1", "HF_HUB_OFFLINE": "1"}
    os.environ["UNSLOTH_COMPILE_LOCATION"] = tempfile.mkdtemp()
    import unsloth  # noqa: F401

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

from sftlab.data.chat_template import encode, set_template
from sftlab.measurement.flops import flops_per_token
from sftlab.measurement.throughput import Meter
from sftlab.measurement.turnstile import Turnstile
from sftlab.models.mixture import counts_of
from sftlab.paths import ROOT
from sftlab.script_options import Options

# Steps before the first turn and in a turn; the slower the variant, the fewer.
WARM_STEPS = {"sft": 20, "trl": 10, "loop": 5, "unsloth": 10}
STEPS = {"sft": 30, "trl": 10, "loop": 8, "unsloth": 10}
LORA = {
    "r": 16,
    "lora_alpha": 32,
    "target_modules": ["q_proj", "v_proj", "o_proj"],
    "task_type": "CAUSAL_LM",
}


def train_sft(
    fields: dict[str, Any], base: str, rows: str, steps: int, turnstile: Turnstile, folder: Path
) -> None:
    """Train with recipes/sft.py, the turnstile among its callbacks."""
    from sftlab.training.trainer import LabTrainer  # on trl's trainer, which Unsloth replaces

    build, count = LabTrainer.__init__, Meter.count

    def with_turnstile(self: LabTrainer, *args: Any, callbacks: list, **kwargs: Any) -> None:
        build(self, *args, callbacks=[*callbacks, turnstile], **kwargs)
        turnstile.flops, turnstile.parts = self.flops, lambda: parts_of(self.model, self.fast)

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
    if "attn_implementation" in fields:
        model_fields["attn_implementation"] = fields.pop("attn_implementation")
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
    turnstile.parts = lambda: parts_of(trainer.model, args=trainer.args)
    trainer.train()


def train_unsloth(
    fields: dict[str, Any], base: str, rows: str, steps: int, turnstile: Turnstile, folder: Path
) -> None:
    """Train with Unsloth on the same tokens, without dropout and gradient checkpointing."""
    from trl import SFTConfig, SFTTrainer  # Unsloth has replaced them
    from unsloth import FastLanguageModel

    longest = fields.pop("max_length")
    model, tokenizer = FastLanguageModel.from_pretrained(
        base,
        max_seq_length=longest,
        dtype=torch.bfloat16,
        load_in_4bit=fields.pop("load_in_4bit"),
        use_gradient_checkpointing=False,
        local_files_only=True,
    )
    lora = {name: value for name, value in LORA.items() if name != "task_type"}
    model = FastLanguageModel.get_peft_model(
        model,
        lora_dropout=0,
        bias="none",
        use_gradient_checkpointing=False,
        random_state=0,
        **lora | fields.pop("lora"),
    )
    args = SFTConfig(
        output_dir=str(folder),
        max_steps=steps,
        max_length=longest,
        bf16=True,
        gradient_checkpointing=False,
        optim="adamw_torch_fused",
        report_to="none",
        logging_steps=10,
        save_strategy="no",
        learning_rate=2e-4,
        disable_tqdm=True,
        dataset_num_proc=1,
        dataloader_drop_last=True,
        gradient_accumulation_steps=1,
        **fields,
    )
    ids = token_rows(base, rows, longest, 2 * steps * args.per_device_train_batch_size)
    trainer = SFTTrainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_dict({"input_ids": ids, "labels": ids}),
        processing_class=tokenizer,
        callbacks=[turnstile],
    )
    compute_loss, pad = trainer.compute_loss, tokenizer.pad_token_id

    def counting(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        mask, ids = inputs.get("attention_mask"), inputs["input_ids"]
        tokens = (mask if mask is not None and mask.shape == ids.shape else ids != pad).sum()
        count = (ids == tokenizer.eos_token_id).sum()  # every row ends with one
        turnstile.count(tokens, count, tokens - count)
        return compute_loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = counting
    turnstile.flops = flops_per_token(trainer.model)
    own = getattr(sys.modules.get("unsloth.models._utils"), "HAS_FLASH_ATTENTION", False)
    parts = f"; FlashAttention-2 in its own layers: {'yes' if own else 'no'}"
    turnstile.parts = lambda: parts_of(trainer.model, args=trainer.args) + parts
    trainer.train()


def parts_of(model: Any, fast: Any = None, args: Any = None) -> str:
    """Returns what makes a step fast or slow, as it runs: by recipes/sft.py's choices or by trl's.

    `fast` is the project's FastPath, with the reasons of parts that are off; `args` are trl's.
    """
    parts = {"attention": model.config._attn_implementation}
    if fast is not None:
        parts |= {"packing": fast.packing, "compiled layers": fast.compile_layers}
        parts |= {"fused loss": fast.fused_loss, "fused LoRA": fast.fused_lora}
        parts["steps captured"] = fast.captured_step
        parts |= {f"{part} is off": why for part, why in fast.reasons.items()}
        if fast.layers_per_unit:
            parts["layers a unit"] = fast.layers_per_unit
        experts = fast.experts
    else:
        parts |= {"packing": args.packing, "padding-free": args.padding_free}
        parts |= {"Liger": args.use_liger_kernel, "compiled": args.torch_compile}
        parts["checkpointing"] = args.gradient_checkpointing
        mixture = counts_of(model.config.get_text_config())
        experts = getattr(model.config, "_experts_implementation", None) if mixture else None
    if experts:
        parts["experts"] = experts
    said = {True: "yes", False: "no"}
    return "; ".join(f"{part}: {said.get(value, value)}" for part, value in parts.items())


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
    kinds = {"sft": train_sft, "trl": train_trl, "loop": train_loop, "unsloth": train_unsloth}
    parser.add_argument("--kind", choices=kinds, required=True)
    parser.add_argument("--fields", type=json.loads, required=True)
    parser.add_argument("--base", required=True)
    parser.add_argument("--rows", required=True)
    parser.add_argument("--turns", type=int, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--warm", type=int, help="steps before the first turn")
    parser.add_argument("--steps", type=int, help="steps of a turn")
    parser.add_argument("--profiled", type=int, default=0, help="1 for one turn more")
    arguments = parser.parse_args()
    kind = arguments.kind
    turnstile = Turnstile(
        arguments.folder,
        arguments.turns,
        arguments.warm or WARM_STEPS[kind],
        arguments.steps or STEPS[kind],
        bool(arguments.profiled),
    )
    kinds[kind](
        arguments.fields,
        arguments.base,
        arguments.rows,
        turnstile.total,
        turnstile,
        arguments.folder,
    )


if __name__ == "__main__":
    main()
