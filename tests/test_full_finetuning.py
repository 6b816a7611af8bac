"""A run with `use_peft: false` is evaluated, chatted with, reported and exported like any other."""

import json
import os
from threading import Event

import pytest
import torch
from conftest import arguments, load_script, read, short_fields
from transformers import AutoModelForCausalLM

from sftlab.chat.engine import Chat
from sftlab.chat.sampling import Settings
from sftlab.config.launch import exported
from sftlab.evaluation.base_and_tuned import answering, finished_run, load_pair
from sftlab.evaluation.full_models import hold_base
from sftlab.runs.run_directory import adapter_hash

IDS = torch.tensor([[3, 70, 5, 90, 7]])


@pytest.fixture(scope="module")
def full(base, rows, tmp_path_factory, sft):
    """The folder of a succeeded run that trained every weight."""
    folder = tmp_path_factory.mktemp("full") / "run"
    fields = {**short_fields(base, rows, folder), "use_peft": "false", "max_steps": "2"}
    before = dict(os.environ)
    os.environ |= exported("accelerate_configs/cpu.yaml") | {"TENSORBOARD_LOGGING_DIR": ""}
    try:
        sft.main(arguments(fields))
    finally:
        os.environ.clear()
        os.environ |= before
    return folder


def logits(folder) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder)(IDS).logits


def test_each_side_computes_what_its_own_folder_does(full, base):
    model = load_pair(full, finished_run(full))
    for _ in range(2):
        for side, folder in (("base", base), ("tuned", full / "adapter")):
            with answering(model, side), torch.no_grad():
                assert torch.equal(model(IDS).logits, logits(folder))
    assert not torch.equal(logits(base), logits(full / "adapter"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU beside the CPU")
def test_weights_that_wait_on_the_cpu_are_copied(full, base):
    tuned, other = (AutoModelForCausalLM.from_pretrained(f) for f in (full / "adapter", base))
    hold_base(tuned.cuda(), other)
    for folder in (base, full / "adapter"):
        with answering(tuned, "base" if folder == base else "tuned"), torch.no_grad():
            found = tuned(IDS.cuda()).logits.cpu()
        assert torch.allclose(found, logits(folder), atol=1e-3)


def test_a_base_of_another_shape_is_refused(full, base):
    run = finished_run(full)
    config = json.loads((full / "adapter" / "config.json").read_text())
    folder = full.parent / "other"
    torch.manual_seed(0)
    changed = AutoModelForCausalLM.from_pretrained(base).config
    changed.intermediate_size = config["intermediate_size"] // 2
    AutoModelForCausalLM.from_config(changed).save_pretrained(folder)
    run["recipe"]["model_name_or_path"] = str(folder)
    with pytest.raises(ValueError, match=r"base and tuned are not of one shape: .*mlp.* differs"):
        load_pair(full, run)
    run["recipe"] |= {"model_name_or_path": str(base), "load_in_4bit": True}
    with pytest.raises(ValueError, match=r"full fine-tuning .* leave out load_in_4bit"):
        load_pair(full, run)


def test_it_is_evaluated_and_chatted_with(full, base, capsys):
    quality = load_script("eval/quality.py")
    quality.main(["--run", str(full), "--max_new_tokens", "4"])
    assert "response perplexity" in capsys.readouterr().out
    found = json.loads((full / "eval" / "quality.json").read_text())
    assert found["adapter_hash"] == adapter_hash(full) is not None
    perplexity = found["scores"]["response_perplexity"]
    assert perplexity["base"]["value"] != perplexity["tuned"]["value"]
    chat = Chat(full)
    assert not chat.mixed
    settings = Settings(temperature=0, max_new_tokens=3)
    *_, last = chat.reply(
        [{"role": "user", "content": "Hello"}], ("base", "tuned"), settings, Event()
    )
    assert set(last.texts) == {"base", "tuned"}
    assert read(full)["recipe"]["use_peft"] is False


def test_it_is_exported_whole(full, tmp_path, capsys):
    export = load_script("recipes/export.py")
    with pytest.raises(SystemExit, match="is full fine-tuning, without an adapter"):
        export.main(["--run", str(full), "--to", "adapter", "--out", str(tmp_path / "a")])
    export.main(["--run", str(full), "--to", "merged", "--out", str(tmp_path / "m")])
    assert "it answers as" in capsys.readouterr().out
    assert torch.equal(logits(tmp_path / "m"), logits(full / "adapter"))
    card = (tmp_path / "m" / "README.md").read_text()
    assert "fully fine-tuned" in card
    assert "lora" not in card.lower()
