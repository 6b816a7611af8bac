"""The curves that SFTTrainer logs of a small seeded model with a LoRA adapter."""

from __future__ import annotations

import copy
import dataclasses
import random
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from reference_loop import Adapter, Curve, Settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

TEMPLATE = Path(__file__).resolve().parents[1] / "recipes" / "templates" / "instruction.jinja"
Rows = list[dict[str, Any]]
TARGETS = ["q_proj", "v_proj", "o_proj"]
# 100 rows do not divide into batches of 8, so step 13 is the short last batch of the first epoch.
ROWS = 100
WHOLE = Settings(
    batch_size=8,
    accumulation=1,
    steps=20,
    warmup_steps=3,
    learning_rate=2e-2,
    weight_decay=0.1,
    max_grad_norm=1.0,
    max_length=128,
    lora_alpha=8,
)
SPLIT = dataclasses.replace(WHOLE, batch_size=2, accumulation=4)
CONFIG = LlamaConfig(
    vocab_size=300,
    hidden_size=48,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    # The usual 0.02 gives logits so flat that a rank-4 adapter can hardly move the loss.
    initializer_range=0.2,
    bos_token_id=256,
    eos_token_id=257,
    pad_token_id=258,
)


@dataclass(frozen=True)
class TrainerRun:
    """What SFTTrainer logged, the adapter it started from, and how often its first attention layer
    ran.
    """

    curve: Curve
    adapter: Adapter
    forwards: int


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte (ids 0 to 255) and three special tokens, with the project's instruction
    template.
    """
    alphabet = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    raw = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )
    tokenizer.chat_template = TEMPLATE.read_text(encoding="utf-8")
    return tokenizer


def make_rows() -> Rows:
    """Rows whose responses run from 2 to 120 characters, so that micro-batches weigh very
    differently.
    """
    draw = random.Random(7)

    def text(length: int) -> str:
        return "x" + "".join(draw.choice("abcde fgh\n") for _ in range(length - 2)) + "y"

    rows = []
    for i in range(ROWS):
        question = text(draw.randint(4, 30))
        # The longest go past max_length, which cuts their end token off.
        answer = text(draw.randint(60, 120) if i % 4 == 3 else draw.randint(2, 20))
        rows.append(
            {
                "prompt": [{"role": "user", "content": f" {question}\n"}],
                "completion": [{"role": "assistant", "content": f"{answer}  "}],
            }
        )
    return rows


def base_state() -> dict[str, torch.Tensor]:
    """Weights of the seeded base model, the same on every call."""
    torch.manual_seed(11)
    return LlamaForCausalLM(CONFIG).state_dict()


def read_adapter(model: torch.nn.Module) -> Adapter:
    """Copy A (r, in) and B (out, r) out of a PEFT model, keyed by the base model's layer names."""
    halves: dict[str, dict[str, torch.Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            layer, _, rest = name.removeprefix("base_model.model.").partition(".lora_")
            halves.setdefault(layer, {})[rest[0]] = parameter.detach().clone()
    return {layer: (pair["A"], pair["B"]) for layer, pair in halves.items()}


def trainer_config(settings: Settings, checkpointing: bool, output_dir: Path) -> SFTConfig:
    """The same hyper-parameters in SFTTrainer's terms, with the rows taken in dataset order."""
    return SFTConfig(
        output_dir=str(output_dir),
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulation,
        max_steps=settings.steps,
        warmup_steps=settings.warmup_steps,
        lr_scheduler_type="linear",
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        max_length=settings.max_length,
        adam_beta1=settings.betas[0],
        adam_beta2=settings.betas[1],
        adam_epsilon=settings.epsilon,
        train_sampling_strategy="sequential",
        gradient_checkpointing=checkpointing,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        bf16=False,
        use_cpu=True,
    )


def run_trainer(
    settings: Settings, checkpointing: bool, rows: Rows, output_dir: Path
) -> TrainerRun:
    """Fine-tune the seeded model with SFTTrainer and collect its per-step log."""
    model = LlamaForCausalLM(CONFIG)
    model.load_state_dict(base_state())
    lora = LoraConfig(
        r=4,
        lora_alpha=settings.lora_alpha,
        lora_dropout=0.0,
        target_modules=TARGETS,
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        # Newer transformers renames gradient_checkpointing; older ones know only this name.
        warnings.simplefilter("ignore", FutureWarning)
        trainer = SFTTrainer(
            model=model,
            args=trainer_config(settings, checkpointing, output_dir),
            train_dataset=Dataset.from_list(copy.deepcopy(rows)),
            processing_class=make_tokenizer(),
            peft_config=lora,
        )
        adapter = read_adapter(trainer.model)
        forwards: list[None] = []
        model.model.layers[0].self_attn.register_forward_pre_hook(lambda *_: forwards.append(None))
        trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    curve = Curve(
        losses=[entry["loss"] for entry in logs],
        grad_norms=[entry["grad_norm"] for entry in logs],
        learning_rates=[entry["learning_rate"] for entry in logs],
    )
    return TrainerRun(curve, adapter, len(forwards))
