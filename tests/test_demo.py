"""The demo, as `make demo` runs it: the base model is made, LoRA lowers the response perplexity at least threefold."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, launch, load_script, read
from transformers import AutoTokenizer

from sftlab import demo


def build(out: Path, *flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "recipes" / "demo" / "build.py"), "--out", str(out), *flags]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=400)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    done = build(out)
    assert done.returncode == 0, done.stderr[-2000:]
    return out


def test_tuning_lowers_the_response_perplexity_at_least_threefold(built, tmp_path):
    fields = {
        "model_name_or_path": str(built / "base"),
        "dataset_name": str(built / "instructions.jsonl"),
        "output_dir": str(tmp_path / "run"),
    }
    done = launch("cpu", fields)
    assert done.returncode == 0, done.stderr[-2000:]
    quality = [sys.executable, str(ROOT / "eval" / "quality.py"), "--run", str(tmp_path / "run")]
    done = subprocess.run(quality, capture_output=True, text=True, cwd=ROOT, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads((tmp_path / "run" / "eval" / "quality.json").read_text())
    assert report["response_perplexity"]["ratio"]["interval_95"][0] > 3
    assert report["test_rows"] >= 300
    assert read(tmp_path / "run")["measured"]["timed_steps"] > 400


def test_a_second_build_keeps_what_is_there(built):
    before = (built / "base" / "model.safetensors").stat().st_mtime_ns
    started = time.time()
    done = build(built)
    assert done.returncode == 0
    assert "complete already" in done.stdout
    assert time.time() - started < 10
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
