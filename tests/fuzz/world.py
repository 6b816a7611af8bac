"""The valid inputs that a case breaks one of, and the files of others that no case may touch."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet
import yaml
from conftest import ROOT, instruction_rows, pair_rows, write_base, write_jsonl

RECIPE = {
    "model_name_or_path": "base",
    "dataset_name": "rows.jsonl",
    "output_dir": "out",
    "chat_template_path": "template.jinja",
    "use_peft": True,
    "lora_r": 2,
    "lora_alpha": 4,
    "lora_dropout": 0.0,
    "lora_target_modules": ["q_proj", "v_proj"],
    "max_steps": 2,
    "max_length": 200,
    "global_batch_size": 2,
    "per_device_train_batch_size": 2,
    "learning_rate": 0.01,
    "logging_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
    "eval_strategy": "no",
    "report_to": "tensorboard",
    "disable_tqdm": True,
    "seed": 1,
}
# no shape is recognised of pairs alone: the method says what they are
DPO = RECIPE | {"method": "dpo", "dataset_name": "pairs.jsonl", "beta": 0.1, "loss_type": "sigmoid"}
MIXTURE = {name: value for name, value in RECIPE.items() if name != "dataset_name"} | {
    "datasets": [
        {"name": "rows.jsonl", "weight": 2},
        {"name": "chat.jsonl", "weight": 1, "shape": "messages"},
    ],
    "datasets_stopping_strategy": "all_exhausted",
}
STUDY = {
    "recipe": "recipe.yaml",
    "launch": "launch.yaml",
    "axis": ["lora_r"],
    "seeds": [1, 2],
    "reference": "r2",
    "cells": {"r2": {"lora_r": 2, "lora_alpha": 4}, "r4": {"lora_r": 4, "lora_alpha": 8}},
}
ROWS = instruction_rows(40)
QUESTIONS = [
    {
        "question_id": 80 + i,
        "category": "math",
        "turns": [f"What is {i} and {i}?", "And one more?"],
        "reference": [str(2 * i), str(2 * i + 1)],
    }
    for i in range(3)
]
# a person's files, in folders that belong to runs and beside them
FOREIGN = (
    "run/notes.txt",
    "run/adapter/mine.txt",
    "run/checkpoint-77/mine.txt",
    "stopped/notes.txt",
)


def build(folder: Path, call: Callable[[str, list[str]], None]) -> None:
    """Write work/ and beside/ into `folder`; `call` runs a script's main in work/."""
    work, beside = folder / "work", folder / "beside"
    work.mkdir()
    write_base(work / "base")
    _write_inputs(work)
    call("sft", ["--config", "recipe.yaml", "--output_dir", "run"])
    shutil.copytree(work / "run", work / "stopped")
    _interrupt(work / "stopped")
    call("sft", ["--config", "dpo.yaml", "--output_dir", "preferred"])
    scored = ["--run", "preferred", "--samples", "2", "--max_new_tokens", "4"]
    call("preferences", scored)
    call("quality", ["--run", "run", "--samples", "2", "--max_new_tokens", "4", "--no_compile"])
    call("tokenize", ["--config", "recipe.yaml", "--out", "tokens"])
    for name in FOREIGN:
        (work / name).parent.mkdir(exist_ok=True)
        (work / name).write_text(f"mine: {name}\n")
    (beside / "checkpoint-3").mkdir(parents=True)
    (beside / "run.json").write_text('{"status": "succeeded"}')
    (beside / "checkpoint-3" / "weights.bin").write_bytes(b"0" * 100)
    (beside / "link").symlink_to("run.json")


def _write_inputs(work: Path) -> None:
    (work / "recipe.yaml").write_text(yaml.safe_dump(RECIPE, sort_keys=False))
    (work / "dpo.yaml").write_text(yaml.safe_dump(DPO, sort_keys=False))
    write_jsonl(work / "pairs.jsonl", pair_rows(40))
    (work / "mixture.yaml").write_text(yaml.safe_dump(MIXTURE, sort_keys=False))
    (work / "study.yaml").write_text(yaml.safe_dump(STUDY, sort_keys=False))
    shutil.copy(ROOT / "accelerate_configs" / "cpu.yaml", work / "launch.yaml")
    (work / "eval").symlink_to(ROOT / "eval")
    shutil.copy(ROOT / "recipes" / "templates" / "instruction.jinja", work / "template.jinja")
    write_jsonl(work / "rows.jsonl", ROWS)
    (work / "rows.json").write_text(json.dumps(ROWS))
    write_jsonl(work / "chat.jsonl", [_conversation(row) for row in ROWS])
    table = pa.Table.from_pylist(ROWS)
    pa.parquet.write_table(table, work / "rows.parquet")
    with pa.ipc.new_stream(str(work / "rows.arrow"), table.schema) as writer:
        writer.write_table(table)
    lines = ["instruction,context,response", *(",".join(row.values()) for row in ROWS)]
    (work / "rows.csv").write_text("\n".join(lines) + "\n")
    outputs = [
        {"instruction": row["instruction"], "output": row["response"], "generator": "good"}
        for row in ROWS[:4]
    ]
    (work / "outputs.json").write_text(json.dumps(outputs))
    annotated = [
        {"instruction": f"Say {i}.", "output_1": "a", "output_2": "b", "preference": 1 + i % 2}
        for i in range(4)
    ]
    (work / "annotations.json").write_text(json.dumps(annotated))
    write_jsonl(work / "questions.jsonl", QUESTIONS)
    write_jsonl(work / "references.jsonl", [_reference(one) for one in QUESTIONS])
    vote = {"run": "run", "adapter_hash": "0" * 16, "blind": True}
    write_jsonl(work / "votes.jsonl", [vote | {"vote": one} for one in ("base", "tuned", "tie")])
    (work / "reply.json").write_text(json.dumps(completion("I compared them. [[A]]")))


def completion(said: str) -> dict:
    """What an OpenAI-compatible server answers."""
    message = {"role": "assistant", "content": said}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    usage = {"prompt_tokens": 9, "completion_tokens": 5, "total_tokens": 14}
    about = {"id": "x", "object": "chat.completion", "created": 0, "model": "judge"}
    return {**about, "choices": [choice], "usage": usage}


def _conversation(row: dict) -> dict:
    turns = [
        {"role": "user", "content": row["instruction"]},
        {"role": "assistant", "content": row["response"]},
    ]
    return {"messages": [*turns, {"role": "user", "content": "Again."}, turns[1]]}


def _reference(question: dict) -> dict:
    answer = {"choices": [{"index": 0, "turns": question["reference"]}]}
    return {"question_id": question["question_id"], "model_id": "gpt-4", **answer}


def _interrupt(run: Path) -> None:
    """Turn a finished run into one that stopped after its first step."""
    record = json.loads((run / "run.json").read_text())
    record |= {"status": "interrupted", "reason": "signal 15 at step 1"}
    (run / "run.json").write_text(json.dumps(record))
    for name in ("adapter", "checkpoint-2"):
        shutil.rmtree(run / name)
