"""SFTTrainer with a LoRA adapter must log the losses of an independent plain PyTorch loop, step by
step.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import os
import random
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from reference_loop import IGNORED, Adapter, Curve, Fault, Settings, build_model, encode, train
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

pytestmark = pytest.mark.long

TEMPLATE = Path(__file__).resolve().parents[1] / "recipes" / "templates" / "instruction.jinja"
TOLERANCE = 1e-4
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
# Values that switch a setting off.
NEUTRAL = [("warmup_steps", 0), ("weight_decay", 0.0), ("max_grad_norm", math.inf)]
ACCUMULATION_FAULTS = ("accumulation_not_divided", "mean_of_means")
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


# Keyed by accumulation and by whether gradient checkpointing is on.
Runs = dict[tuple[int, bool], TrainerRun]


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


def largest_gap(got: list[float], expected: list[float]) -> float:
    """Largest absolute difference over the steps; infinite where either side is not finite."""
    assert len(got) == len(expected)
    gaps = [abs(a - b) for a, b in zip(got, expected, strict=True)]
    return max(gap if math.isfinite(gap) else math.inf for gap in gaps)


def assert_same_losses(got: list[float], expected: list[float]) -> None:
    """Fail unless every step's losses agree within the tolerance."""
    gap = largest_gap(got, expected)
    assert gap <= TOLERANCE, f"losses differ by up to {gap:.3g}"


def assert_losses_differ(got: list[float], expected: list[float]) -> None:
    """Fail if finite losses pass for the same."""
    assert all(map(math.isfinite, got))
    with pytest.raises(AssertionError, match="losses differ by"):
        assert_same_losses(got, expected)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Keep torch on one thread:

    on so small a model, threads that wait for a busy core cost minutes.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def rows() -> Rows:
    """The training rows."""
    return make_rows()


@pytest.fixture(scope="module")
def runs(rows: Rows, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """SFTTrainer runs by (accumulation, gradient checkpointing)."""
    return {
        (settings.accumulation, checkpointing): run_trainer(
            settings, checkpointing, rows, tmp_path_factory.mktemp("run")
        )
        for settings in (WHOLE, SPLIT)
        for checkpointing in (False, True)
    }


def run_reference(
    settings: Settings, adapter: Adapter, rows: Rows, fault: Fault | None = None
) -> Curve:
    """Run the plain loop from the same base and adapter weights."""
    model = build_model(CONFIG, base_state(), adapter, settings.lora_alpha, fault)
    return train(model, rows, make_tokenizer(), settings, fault)


@pytest.fixture(scope="module")
def references(runs: Runs, rows: Rows) -> dict[int, Curve]:
    """The faultless loop by accumulation, from the adapter that SFTTrainer started from."""
    return {
        settings.accumulation: run_reference(
            settings, runs[settings.accumulation, False].adapter, rows
        )
        for settings in (WHOLE, SPLIT)
    }


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_losses_match(
    runs: Runs, references: dict[int, Curve], accumulation: int, checkpointing: bool
) -> None:
    """Losses agree at every step.

    So do the learning rates and the gradient norms before clipping.
    """
    logged, expected = runs[accumulation, checkpointing].curve, references[accumulation]
    assert len(logged.losses) == WHOLE.steps
    assert_same_losses(logged.losses, expected.losses)
    assert logged.learning_rates == pytest.approx(expected.learning_rates, abs=1e-9)
    assert logged.grad_norms == pytest.approx(expected.grad_norms, rel=1e-3)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_accumulation_does_not_change_losses(runs: Runs, checkpointing: bool) -> None:
    """Four micro-batches of 2 rows give the curve of one batch of 8 rows."""
    assert_same_losses(runs[4, checkpointing].curve.losses, runs[1, checkpointing].curve.losses)


def test_checkpointing_recomputes(runs: Runs) -> None:
    """The checkpointed runs really are checkpointed: backward runs each layer a second time."""
    for accumulation in (1, 4):
        assert runs[accumulation, True].forwards == 2 * runs[accumulation, False].forwards > 0


def test_data_can_tell_the_faults_apart(
    runs: Runs, references: dict[int, Curve], rows: Rows
) -> None:
    """Uneven micro-batches, some cut rows, losses that move, and clipping that acts on some steps
    only.
    """
    examples = [encode(row, make_tokenizer(), WHOLE.max_length, None) for row in rows]
    tokens = [sum(label != IGNORED for label in e.labels) for e in examples]
    micro = [sum(tokens[i : i + 2]) for i in range(0, ROWS, 2)]
    assert max(micro) > 5 * min(micro)
    assert 0 < sum(e.ids[-1] != CONFIG.eos_token_id for e in examples) < ROWS // 4
    wrapped = {f"model.layers.{i}.self_attn.{target}" for i in range(2) for target in TARGETS}
    assert set(runs[1, False].adapter) == wrapped
    curve = references[1]
    assert max(curve.losses) - min(curve.losses) > 0.5
    assert 3 <= sum(norm > WHOLE.max_grad_norm for norm in curve.grad_norms) <= WHOLE.steps - 3


@pytest.mark.parametrize("fault", get_args(Fault))
def test_fault_is_seen(runs: Runs, rows: Rows, fault: Fault) -> None:
    """The loop with one deliberate fault no longer agrees with SFTTrainer."""
    settings = SPLIT if fault in ACCUMULATION_FAULTS else WHOLE
    run = runs[settings.accumulation, False]
    losses = run_reference(settings, run.adapter, rows, fault).losses
    assert_losses_differ(losses, run.curve.losses)


@pytest.mark.parametrize(("setting", "value"), NEUTRAL)
def test_setting_is_seen(runs: Runs, rows: Rows, setting: str, value: float) -> None:
    """Warm-up, weight decay and clipping each shape the curve:

    dropping one breaks the agreement.
    """
    settings = dataclasses.replace(WHOLE, **{setting: value})
    losses = run_reference(settings, runs[1, False].adapter, rows).losses
    assert_losses_differ(losses, runs[1, False].curve.losses)
