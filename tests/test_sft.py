"""What a user types: launches on the CPU, what they leave behind, and how they fail."""

import re
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import (
    ROOT,
    answered,
    launch_command,
    launched,
    read,
    write_jsonl,
)
from peft import PeftModel
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from sftlab.config.recipe import DataArguments
from sftlab.data.chat_template import template_hash
from sftlab.data.converter import split_index
from sftlab.data.splits import SPLITS, load_splits
from sftlab.evaluation.base_and_tuned import finished_run
from sftlab.runs.run_directory import adapter_hash

FACTS = {
    "status",
    "recipe",
    "launch",
    "ran",
    "measured",
    "data",
    "template",
    "versions",
    "git_commit",
    "hardware",
}


def losses(run):
    return dict(map(tuple, read(run)["losses"]))


def test_a_run_directory_holds_what_the_contract_says(finished, base):
    folder, _, done = finished
    record = read(folder)
    assert record["status"] == "succeeded"
    assert set(record) >= FACTS
    assert record["ran"]["precision"] == "fp32"
    assert record["ran"]["compute"] == {"linear": "Linear", "output_dtype": "float32"}
    assert (record["ran"]["strategy"], record["ran"]["world_size"]) == ("single", 1)
    assert record["ran"]["lora_scale"] == [2.0]
    assert record["ran"]["trainable_parameters"] == 2 * 16 * ((32 + 32) + (32 + 16) + (32 + 32))
    assert record["recipe"]["lora_r"] == 16
    measured = record["measured"]
    assert measured["tokens_per_s"] > 0
    assert measured["share_of_limit"] is None  # on a CPU
    assert measured["peak_memory"][0]["resident_gb"] > 0
    assert measured["validation_loss"] > 0
    sizes = [record["data"][name]["rows"] for name in ("train", "validation", "test")]
    assert sum(sizes) == 200
    assert (folder / "tensorboard").is_dir()
    assert not list(folder.rglob("adapter/*.bin"))
    assert "succeeded" in done.stdout
    assert "real tokens/s" in done.stdout
    curve = EventAccumulator(str(folder / "tensorboard")).Reload().Scalars("train/loss")
    assert [(e.step, pytest.approx(e.value, rel=1e-6)) for e in curve] == [
        (s, losses(folder)[s]) for s in range(1, 7)
    ]


def test_the_adapter_loads_with_plain_peft_and_changes_the_model(finished, base):
    folder, _, _ = finished
    tokenizer = AutoTokenizer.from_pretrained(folder / "adapter")
    assert "### Response:" in tokenizer.chat_template
    ids = tokenizer("Repeat", return_tensors="pt").input_ids
    model = AutoModelForCausalLM.from_pretrained(base)
    before = model(ids).logits
    tuned = PeftModel.from_pretrained(model, folder / "adapter")
    assert (tuned(ids).logits - before).abs().max() > 1e-3
    with tuned.disable_adapter():
        assert torch.equal(tuned(ids).logits, before)


def test_the_adapters_card_says_what_the_run_knows(finished, base):
    adapter = finished[0] / "adapter"
    card = (adapter / "README.md").read_text()
    assert "More Information Needed" not in card and "[None]" not in card
    assert f"local base model `{base}`" in card and "rank 16, alpha 32" in card
    assert f'pipeline("text-generation", "{adapter}", tokenizer="{adapter}"' in card
    pipe = pipeline("text-generation", model=str(adapter), tokenizer=str(adapter))
    assert template_hash(pipe.tokenizer) == read(adapter.parent)["template"]["hash"]


def test_a_finished_run_is_not_overwritten_by_the_same_command(finished, train_here):
    folder, fields, _ = finished
    before = adapter_hash(folder)
    done = train_here(fields)
    assert done.returncode != 0
    assert "error: " in done.stderr
    assert "--overwrite" in done.stderr
    assert adapter_hash(folder) == before
    assert read(folder)["status"] == "succeeded"


@pytest.mark.long
def test_two_processes_give_the_losses_of_one(finished, tmp_path, trained_here):
    _, fields, _ = finished
    own = {**fields, "lora_dropout": "0", "save_strategy": "no", "max_steps": "45"}
    trained_here({**own, "output_dir": str(tmp_path / "one"), "per_device_train_batch_size": "2"})
    launched("cpu_ddp", {**own, "output_dir": str(tmp_path / "two")}, cold=True)
    one, two = read(tmp_path / "one"), read(tmp_path / "two")
    assert (one["ran"]["micro_batch"], one["ran"]["accumulation"]) == (2, 4)
    assert (two["ran"]["strategy"], two["ran"]["world_size"]) == ("ddp", 2)
    assert len(two["measured"]["peak_memory"]) == 2
    assert one["data"] == two["data"]
    talk = two["measured"]["collectives"]
    assert talk["all_reduce"]["mb"] == pytest.approx(
        two["ran"]["trainable_parameters"] * 4 / 2**20, abs=2e-3
    )
    assert "broadcast" not in talk, "a model's buffers need not be sent"
    assert one["measured"]["collectives"] is None
    first, second = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert first.keys() == second.keys() == set(range(1, 46))
    assert max(abs(first[s] - second[s]) for s in first) < 1e-3
    # three epochs, none of which ends in a whole batch
    assert one["data"]["train"]["rows"] // 8 * 2 < 45
    assert one["data"]["tokenized"]["left_over_an_epoch"] == one["data"]["train"]["rows"] % 8 > 0
    assert abs(one["measured"]["validation_loss"] - two["measured"]["validation_loss"]) < 1e-4


def test_the_mean_training_loss_of_two_processes_has_the_steps_that_were_not_logged(
    finished, tmp_path
):
    folder, fields, _ = finished
    launched("cpu_ddp", {**fields, "output_dir": str(tmp_path / "run"), "logging_steps": "4"})
    assert list(losses(tmp_path / "run")) == [4]
    mean = read(tmp_path / "run")["measured"]["train_loss"]
    # another dropout, which comes to 6e-4; one process's share of the last two steps, to 0.05
    assert mean == pytest.approx(read(folder)["measured"]["train_loss"], abs=5e-3)


FAULTY = """
import os, sys
sys.path.insert(0, {folder!r})
import sft
plain = sft.RecordedTrainer.training_step
def training_step(self, *args, **kwargs):
    if os.environ["RANK"] == "1" and self.state.global_step == 2:
        raise RuntimeError("the second rank broke")
    return plain(self, *args, **kwargs)
sft.RecordedTrainer.training_step = training_step
sft.main(sys.argv[1:])
"""


def test_a_failing_rank_fails_the_run_with_its_reason(finished, tmp_path):
    _, fields, _ = finished
    script = tmp_path / "faulty.py"
    script.write_text(FAULTY.format(folder=str(ROOT / "recipes")))
    command = launch_command("cpu_ddp", {**fields, "output_dir": str(tmp_path / "run")})
    command[command.index(str(ROOT / "recipes" / "sft.py"))] = str(script)
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=200)
    record = read(tmp_path / "run")
    assert done.returncode != 0
    assert (record["status"], record["failed_rank"]) == ("failed", 1)
    assert record["reason"] == "RuntimeError: the second rank broke"


def test_a_run_that_only_measures_keeps_no_adapter_and_says_so(finished, tmp_path, trained_here):
    folder, fields, _ = finished
    run = tmp_path / "run"
    done = trained_here({**fields, "output_dir": str(run), "save_adapter": "false"})
    assert losses(run) == losses(folder)
    assert not (run / "adapter").exists() and "The adapter was not saved" in done.stdout
    with pytest.raises(ValueError, match="saved no adapter"):
        finished_run(run)


IN_ALL = {"global_batch_size": "200", "per_device_train_batch_size": "200"}


@pytest.mark.parametrize(
    ("long", "change", "message"),
    [
        ((), IN_ALL, "training rows do not fill one global batch of 200: give more rows"),
        (
            ("train", "validation"),
            {},
            r"0 .* fill one global batch of 8 \((\d+) of \1 have no response token",
        ),
        (
            ("validation",),
            {},
            r"all \d+ validation rows have no response token within max_length 100: raise it",
        ),
    ],
)
def test_rows_that_cannot_be_trained_or_validated_on_are_a_sentence(
    fields, tmp_path, train_here, long, change, message
):
    def split(question: str) -> str:
        return SPLITS[split_index([{"role": "user", "content": question}], (0.8, 0.1, 0.1))]

    questions = [
        q
        for i in range(200)
        for q, is_long in ((f"q{i}", False), (f"q{i}" + "?" * 200, True))
        if (split(q) in long) == is_long
    ]
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"question": q, "answer": "a"} for q in questions])
    done = train_here({**fields, "dataset_name": str(rows), "max_length": "100", **change})
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert re.search(message, done.stderr)
    if long:
        assert re.search(message, read(fields["output_dir"])["reason"])
    else:
        assert not (Path(fields["output_dir"]) / "run.json").exists(), "it could not begin"


def test_what_max_length_cuts_and_drops_is_counted(finished, tmp_path, trained_here):
    _, fields, _ = finished
    questions = [f"q{i}" + "?" * (200 if i % 5 == 0 else 0) for i in range(200)]
    long = [{"instruction": q, "response": "a" * (1 + i % 100)} for i, q in enumerate(questions)]
    rows = write_jsonl(tmp_path / "long.jsonl", long)
    own = {
        **fields,
        "dataset_name": str(rows),
        "output_dir": str(tmp_path / "run"),
        "max_steps": "1",
    }
    done = trained_here({**own, "max_length": "100"})
    facts = read(tmp_path / "run")["data"]["tokenized"]
    # one token a character, and bos, the frame of the template, eos
    frame = 1 + len("### Instruction:\n\n\n### Response:\n")
    train = load_splits(DataArguments(dataset_name=str(rows))).train
    lengths = [
        (frame + len(r["prompt"][0]["content"]), len(r["completion"][0]["content"]) + 1)
        for r in answered(train)
    ]
    kept = [prompt + response for prompt, response in lengths if prompt < 100]
    assert facts["dropped"] == len(lengths) - len(kept) > 0
    assert facts["cut"] == sum(length > 100 for length in kept) > 0
    assert facts["tokens"] == sum(min(length, 100) for length in kept)
    assert f"{facts['cut']}, {facts['dropped']} train rows" in done.stdout


def test_a_diverged_run_fails(finished, tmp_path, train_here):
    _, fields, _ = finished
    done = train_here(
        {
            **fields,
            "output_dir": str(tmp_path / "run"),
            "learning_rate": "1e30",
            "max_grad_norm": "0",
        }
    )
    assert done.returncode != 0
    assert read(tmp_path / "run")["status"] == "failed"
    assert "diverged" in read(tmp_path / "run")["reason"]
