"""recipes/plan.py on preference tuning: two sides a pair, and the reference's forward."""

import numpy as np
import pytest
from conftest import load_script, write_jsonl
from packed_training import build
from planned_steps import GPUS, MODEL_SHAPES, exported, launched, make_plan, parse_recipe
from preference_runs import pair_fields
from transformers import LlamaConfig

from sftlab.data.encoded_pairs import IDS
from sftlab.data.samplers import row_lengths
from sftlab.planning.plan import planned_memory
from sftlab.planning.row_lengths import RowLengths, of_encoded, of_pairs

WORDS = ["--config", "recipes/llama3.2-1b-dpo/attn_r16.yaml"]
PAIRS = RowLengths(6000, 600, 200, 2048, "said", sequences=2)


def plan_of(*more, words=WORDS, rows=PAIRS):
    with launched(exported("accelerate_configs/single.yaml")) as asked:
        recipe = parse_recipe([*words, *more], asked)
        config = LlamaConfig(**MODEL_SHAPES["llama3.2-1b"])
        return make_plan(recipe, config, asked, GPUS["h200"], rows)


def test_a_pair_costs_a_forward_more_than_two_rows():
    sft = ["--config", "recipes/llama3.2-1b/attn_r16.yaml", "--packing=false"]
    sft += ["--compile_layers=false", "--lora_dropout=0", "--max_length=1024"]
    sft += ["--per_device_train_batch_size=16", "--global_batch_size=64"]
    # rows of the length that a side has where the average token is
    pairs, rows = (
        plan_of("--packing=false", "--compile_layers=false"),
        plan_of(words=sft, rows=RowLengths(12_000, 300, 100, 1024, "said")),
    )
    assert pairs.step.tokens == rows.step.tokens == 16 * 1024
    assert pairs.time.matrices == pytest.approx(1.5 * rows.time.matrices)
    assert pairs.time.attention == pytest.approx(4.5 / 3.5 * rows.time.attention)
    assert pairs.time.host > rows.time.host
    flops = rows.step.weights.flops
    of_rows = 6000 // 64 * 64 * 600 * (flops.token + flops.loss_token)
    assert pairs.total_flops == pytest.approx(1.5 * of_rows)


def test_packed_sides_are_planned_without_padding():
    step = plan_of().step
    assert step.packed and step.tokens == 8 * 600
    assert plan_of("--packing=false").step.tokens == 8 * PAIRS.longest


def test_the_copy_of_the_adapter_takes_its_memory(tmp_path):
    kept = plan_of()
    fresh = plan_of("--adapter_name_or_path=null")
    assert kept.memory.adapter == 2 * fresh.memory.adapter
    assert kept.memory.optimizer_state == fresh.memory.optimizer_state


def test_the_padding_of_the_shorter_side_counts():
    rows = of_pairs(np.array([10, 30]), np.array([20, 8]), 2, "said")
    assert (rows.mean, rows.longest, rows.count) == (34, 60, 2)
    assert rows.attended == pytest.approx((34 + 4**2 / 34) / 2)


def test_lengths_are_read_from_the_pairs_of_a_file(tmp_path, base, capsys):
    rows = [{"prompt": f"Why {n}?", "chosen": "a" * 9, "rejected": "b" * 19} for n in range(40)]
    path = write_jsonl(tmp_path / "pairs.jsonl", rows)
    fields = pair_fields(base, path, tmp_path / "run") | {"max_steps": "-1"}
    trainer = build(fields)
    known = of_encoded(trainer.train_dataset)
    sides = [row_lengths(trainer.train_dataset, name) for name in IDS]
    assert known.longest == 2 * sides[1].max()
    words = [f"--{name}={value}" for name, value in fields.items()]
    load_script("recipes/plan.py").main([*WORDS, *words, "--adapter_name_or_path=null"])
    said = capsys.readouterr().out
    assert f"{known.mean:,.0f} tokens on average, {known.longest:,} at most" in said
    assert "a pair is a row of both sides" in said


def test_the_memory_plan_of_a_finished_preference_run_is_made(base, pairs_file, tmp_path):
    fields = pair_fields(base, pairs_file, tmp_path / "run")
    trainer = build(fields)
    trainer.state.max_steps = 4
    recipe = plan_recipe(fields)
    planned = planned_memory(recipe, trainer.launch, trainer.fast, trainer)
    longest = max(row_lengths(trainer.train_dataset, name).max() for name in IDS)
    assert planned["largest_tokens"] == 8 * 2 * longest
    assert planned["allocated_gb"] > 0


def plan_recipe(fields):
    with launched(exported("accelerate_configs/cpu.yaml")) as asked:
        words = [f"--{name}={value}" for name, value in fields.items()]
        return parse_recipe(["--config", "recipes/demo/attn_r16.yaml", *words], asked)
