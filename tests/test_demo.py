"""The demo, as `make demo` runs it:

the base model is made, LoRA lowers the response perplexity at least threefold.
"""

import json
import subprocess
import sys
from pathlib import Path

import fork_server
import pytest
import torch
from conftest import ROOT, answered, copy_of, launch, load_script, read
from peft import PeftConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from sftlab.config.recipe import DataArguments
from sftlab.data.chat_template import encode
from sftlab.data.splits import load_splits
from sftlab.models import demo

# the base model is pre-trained here, on one core in three minutes
pytestmark = pytest.mark.long


def build(out: Path, *flags: str) -> subprocess.CompletedProcess:
    command = [
        sys.executable,
        str(ROOT / "recipes" / "demo" / "build.py"),
        "--out",
        str(out),
        *flags,
    ]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=400)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    done = build(out)
    assert done.returncode == 0, done.stderr[-2000:]
    return out


@pytest.fixture(scope="module")
def tuned(built, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "tuned"
    data, base = built / "instructions.jsonl", built / "base"
    done = launch("cpu", {"model_name_or_path": base, "dataset_name": data, "output_dir": folder})
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


def judge(run, *flags):
    quality = [fork_server.python(), str(ROOT / "eval" / "quality.py"), "--run", str(run), *flags]
    done = subprocess.run(quality, capture_output=True, text=True, cwd=ROOT, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads((run / "eval" / "quality.json").read_text()), done.stdout


def test_tuning_lowers_the_response_perplexity_and_teaches_the_answers(tuned):
    report, text = judge(tuned)
    perplexity, bleu = (report["scores"][name] for name in ("response_perplexity", "bleu"))
    assert perplexity["tuned"]["interval_95"][1] * 3 < perplexity["base"]["interval_95"][0]
    assert bleu["base"]["interval_95"][1] < 10
    assert bleu["tuned"]["interval_95"][0] > 80
    assert all(one["p_holm"] < 0.01 for one in report["scores"].values())
    assert report["rows"] >= 300
    assert report["warnings"] == []
    assert read(tuned)["measured"]["timed_steps"] > 400
    assert "tuned      The " in text


def test_a_model_tuned_on_unshifted_labels_is_detected(tuned, tmp_path):
    folder = copy_of(tuned, tmp_path / "unshifted")
    tokenizer = AutoTokenizer.from_pretrained(folder / "adapter")
    model = AutoModelForCausalLM.from_pretrained(read(tuned)["recipe"]["model_name_or_path"])
    config = PeftConfig.from_pretrained(folder / "adapter")
    config.inference_mode = False
    torch.manual_seed(0)
    model = get_peft_model(model, config)
    arguments = {
        k: v for k, v in read(tuned)["recipe"].items() if k in DataArguments.__dataclass_fields__
    }
    rows = [
        encode(tokenizer, row, 256)
        for row in answered(load_splits(DataArguments(**arguments)).train.select(range(1600)))
    ]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for row in (rows[i : i + 16] for i in range(0, len(rows), 16)):
        batch = DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id)(row)
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder / "adapter")
    report, text = judge(folder, "--samples", "64")
    perplexity = report["scores"]["response_perplexity"]
    assert perplexity["difference"]["interval_95"][0] > 0
    assert report["answers"]["tuned"]["repetitive"] > report["rows"] / 2
    assert len(report["warnings"]) == 3
    assert "warning:" in text
    assert "labels that were not shifted by one" in text


def test_a_second_build_keeps_what_is_there(built):
    before = (built / "base" / "model.safetensors").stat().st_mtime_ns
    done = build(built)
    assert done.returncode == 0
    assert "complete already" in done.stdout
    assert (built / "base" / "model.safetensors").stat().st_mtime_ns == before


def test_an_interrupted_build_is_not_taken_for_a_finished_one(built, tmp_path):
    script = load_script("recipes/demo/build.py")
    assert script.is_complete(built)
    (tmp_path / "base").mkdir()
    assert not script.is_complete(tmp_path)


def test_the_tokenizer_keeps_any_text(built):
    tokenizer = AutoTokenizer.from_pretrained(built / "base")
    assert tokenizer.chat_template is None
    for text in ("plain", "Ünïcödé ☃", "日本語 🙂", "a\r\n\tb", "\x00"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_the_base_has_never_seen_the_format_or_an_answer():
    text = "\n".join(demo.pretraining_text(3000, seed=0))
    rows = demo.instruction_rows(500, seed=0)
    assert "### Instruction:" not in text
    assert "### Response:" not in text
    assert not [row["response"] for row in rows if row["response"] in text]
    assert demo.instruction_rows(500, seed=0) == rows
    assert len({(r["instruction"], r["context"]) for r in rows}) == 500
