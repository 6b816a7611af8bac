"""What does rounding to float8 cost on real weights: in losses, and in the gradients of LoRA?

python benchmarks/float8_rounding.py [--model data/smollm2/base] \
    [--dataset data/gsm8k/train.jsonl] [--rows 16] [--out results/float8_rounding]
python benchmarks/float8_rounding.py --only bf16 "head in float8" "head's gradient in float8" \
    --out results/float8_head_rounding

A model with LoRA r=16 on all linears, whose B is drawn at random, since with zeros A would have no
gradient. Rows are question and answer, one at a time, on a CPU. A line for float32; for bf16; for
bf16 with frozen linears in float8, whose inputs and gradients have one scale for a tensor, or one
for each token, also with LoRA in the same products; for bf16 with the head in float8, or its
gradient alone; and for weights in 4 bits (nf4, nested scales) that multiply in bf16, or in float8
with a scale for each token. `perplexity` is that of all tokens, `nats_apart` the mean distance of a
token's nats from float32's. `lowest_cosine` and `median_cosine` are over LoRA matrices, between the
gradient of all rows and float32's. Writes float8_rounding.csv.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoTokenizer, BitsAndBytesConfig

from sftlab.exit_messages import mistakes_in_one_line
from sftlab.fastpath import float8
from sftlab.fastpath.four_bit_layers import four_bit_linears, swap
from sftlab.fastpath.fused_lora import SIBLINGS, fuse_lora
from sftlab.fastpath.fused_loss import add_frozen_head_loss, in_float8
from sftlab.models.loading import load_weights
from sftlab.paths import ROOT
from sftlab.runs.environment import provenance, typed_command
from sftlab.script_options import Options
from sftlab.tables import write_csv

FLOAT32, BF16, BY_TENSOR, BY_TOKEN = "float32", "bf16", "float8 by tensor", "float8 by token"
FUSED = "float8, fused LoRA"
FOUR_BITS, FOUR_BITS_FLOAT8 = "4 bits", "4 bits, float8"
HEAD, HEADS_GRADIENT = "head in float8", "head's gradient in float8"
PRECISIONS = (
    *(FLOAT32, BF16, BY_TENSOR, BY_TOKEN, FUSED, HEAD, HEADS_GRADIENT),
    *(FOUR_BITS, FOUR_BITS_FLOAT8),
)
B_SIZE = 0.02


def main(argv: list[str] | None = None) -> None:
    """Compute losses and gradients in every precision, and write a line for each."""
    options = parse_options(argv)
    batches = list(read_rows(options))
    command = typed_command("benchmarks/float8_rounding.py", argv or sys.argv[1:])
    about = provenance() | {"command": command}
    lines, exact = [], None
    for precision in dict.fromkeys([FLOAT32, *options.only]):
        found = losses_and_gradients(options.model, batches, precision)
        exact = exact or found
        line = {"precision": precision, "rows": len(batches)} | compared(*found, *exact)
        lines.append(line | about)
        print(*(f"{name} {value}" for name, value in line.items()), sep=", ", flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    write_csv(options.out / "float8_rounding.csv", lines)


def parse_options(argv: list[str] | None) -> argparse.Namespace:
    """Returns the command line."""
    parser = Options(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("data/smollm2/base"))
    parser.add_argument("--dataset", type=Path, default=Path("data/gsm8k/train.jsonl"))
    parser.add_argument("--rows", type=int, default=16, help="the first n rows (default: 16)")
    parser.add_argument(
        "--only", nargs="+", choices=PRECISIONS, default=PRECISIONS, help="beside float32"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "float8_rounding")
    return parser.parse_args(argv)


def read_rows(options: argparse.Namespace) -> Iterator[torch.Tensor]:
    """Yields the tokens of each row, [1, tokens]."""
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    with options.dataset.open(encoding="utf-8") as file:
        for _, line in zip(range(options.rows), file, strict=False):
            row = json.loads(line)
            yield tokenizer(f"{row['question']}\n{row['answer']}", return_tensors="pt").input_ids


def losses_and_gradients(
    folder: Path, batches: list[torch.Tensor], precision: str
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Returns the nats of all tokens [n], and the gradient of every LoRA matrix."""
    in_four_bits = precision in (FOUR_BITS, FOUR_BITS_FLOAT8)
    dtype = torch.float32 if precision == FLOAT32 else torch.bfloat16
    model = with_lora(folder, dtype, in_four_bits).train()
    if precision in (BY_TENSOR, BY_TOKEN, FUSED):
        float8.freeze_in_float8(model, together=SIBLINGS if precision == FUSED else ())
    if precision == FUSED and (left := fuse_lora(model, torch.bfloat16)):
        raise ValueError(f"not all LoRA layers are fused: {left}")
    base = model.get_base_model()
    rounded = in_float8(base.lm_head.weight.data) if precision == HEADS_GRADIENT else None
    if precision == HEAD:
        base.lm_head = float8.FrozenFloat8Linear(base.lm_head)
    else:
        add_frozen_head_loss(base, rounded=rounded)
    if precision == FOUR_BITS_FLOAT8 and (
        left := swap(four_bit_linears(model), torch.bfloat16, float8=True)
    ):
        raise ValueError(f"not all linears multiply in float8: {left}")
    casts = torch.autocast("cpu", torch.bfloat16) if precision != FLOAT32 else nullcontext()
    nats = []
    with casts, one_scale() if precision == BY_TENSOR else nullcontext():
        for ids in batches:
            targets = ids[0, 1:]
            if precision == HEAD:
                logits = model(input_ids=ids).logits[0, :-1].float()
                found = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
            else:
                places = torch.arange(len(targets))
                found = model(input_ids=ids, loss_positions=places, targets=targets)[0]
            nats.append(found)
            found.sum().backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return torch.cat(nats).detach(), trained


def with_lora(folder: Path, dtype: torch.dtype, in_four_bits: bool) -> PeftModel:
    """Returns the model with LoRA in float32 on all its linears."""
    four_bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    given = {"dtype": dtype, "trust_remote_code": False}
    base = load_weights(str(folder), given, None, four_bits if in_four_bits else None)
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model, generator = get_peft_model(base, config), torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            size = B_SIZE if "lora_B" in name else parameter.shape[1] ** -0.5
            drawn = torch.randn(parameter.shape, generator=generator) * size
            parameter.data = drawn
    return model


@contextmanager
def one_scale() -> Iterator[None]:
    """Inside, inputs and gradients are rounded with one scale for all their tokens."""
    own = float8.to_float8

    def by_tensor(
        tensor: torch.Tensor, dtype: torch.dtype, by_row: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rounded, scale = own(tensor, dtype)
        return rounded, scale.repeat(len(tensor), 1) if by_row else scale

    float8.to_float8 = by_tensor
    try:
        yield
    finally:
        float8.to_float8 = own


def compared(
    nats: torch.Tensor,
    gradients: dict[str, torch.Tensor],
    exact_nats: torch.Tensor,
    exact: dict[str, torch.Tensor],
) -> dict[str, Any]:
    """Returns how near losses and gradients are to those in float32."""
    cosines = [
        torch.cosine_similarity(gradients[name].flatten(), right.flatten(), dim=0).item()
        for name, right in exact.items()
    ]
    return {
        "perplexity": round(nats.mean().exp().item(), 4),
        "nats_apart": round((nats - exact_nats).abs().mean().item(), 5),
        "lowest_cosine": round(min(cosines), 4),
        "median_cosine": round(statistics.median(cosines), 4),
    }


if __name__ == "__main__":
    with mistakes_in_one_line():
        main()
