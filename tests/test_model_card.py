"""A model card read as a newcomer reads it: its snippets run, its commands serve the run."""

import json
import re
import shutil
from pathlib import Path

import pytest
from conftest import load_script
from transformers import GenerationMixin

from sftlab.evaluation.base_and_tuned import finished_run
from sftlab.export.model_card import adapter_card, model_card
from sftlab.export.usage import Export, serve_command
from sftlab.files import write_json

ADAPTER = Export(
    "ann/mine", "adapter", "bfloat16", [2], "org/base", "v1", rank=32, layers=("k_proj", "q_proj")
)


@pytest.fixture(scope="module")
def script():
    return load_script("recipes/export.py")


@pytest.fixture
def export(script, finished, tmp_path, monkeypatch):
    """Exports the run, and goes to where the card says that its reader is; returns the folder."""

    def export(kind):
        out = tmp_path / "exports" / "mine"
        script.main(["--run", str(finished[0]), "--to", kind, "--out", str(out), "--prompts", "4"])
        monkeypatch.chdir(out.parent)
        return out

    return export


@pytest.fixture
def ends(monkeypatch):
    """The token ids that ended what was generated, of each call."""
    seen, generate = [], GenerationMixin.generate

    def watched(self, *given, **more):
        seen.append(more.get("eos_token_id", self.generation_config.eos_token_id))
        return generate(self, *given, **more | {"max_new_tokens": 3})

    monkeypatch.setattr(GenerationMixin, "generate", watched)
    return seen


def snippets(card):
    return re.findall(r"```python\n(.*?)```", str(card), re.DOTALL)


def another_end_in_base(folder, tmp_path):
    """The base model of an adapter now ends at another token than the template does."""
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    base = shutil.copytree(config["base_model_name_or_path"], tmp_path / "other_base")
    write_json(base / "generation_config.json", {"eos_token_id": 3})
    write_json(path, config | {"base_model_name_or_path": str(base)})


@pytest.mark.parametrize(("kind", "count"), [("merged", 1), ("adapter", 2)])
def test_the_snippets_of_an_export_run_as_they_stand(export, ends, tmp_path, capsys, kind, count):
    out = export(kind)
    if kind == "adapter":
        another_end_in_base(out, tmp_path)
    found = snippets((out / "README.md").read_text())
    assert len(found) == count
    ends.clear()
    capsys.readouterr()
    for code in found:
        exec(compile(code, "README.md", "exec"), {})
    assert ends == [[257]] * count, "an answer ends where the template ends it"
    assert "### Instruction" not in capsys.readouterr().out, "the answer alone is printed"


def test_the_snippets_of_a_runs_own_card_run_as_they_stand(finished, ends, tmp_path):
    adapter = shutil.copytree(finished[0] / "adapter", tmp_path / "run" / "adapter")
    another_end_in_base(adapter, tmp_path)
    card = adapter_card(finished_run(finished[0]), adapter, [257])
    for code in snippets(card):
        exec(compile(code, "README.md", "exec"), {})
    assert ends == [[257]] * 2
    assert f"python app/serve.py --run {tmp_path / 'run'}\n" in str(card)
    assert "[257]" in (finished[0] / "adapter" / "README.md").read_text()


def test_a_runs_own_card_names_no_server_that_refuses_it(finished, tmp_path):
    adapter = shutil.copytree(finished[0] / "adapter", tmp_path / "adapter")
    path = adapter / "adapter_config.json"
    write_json(path, json.loads(path.read_text()) | {"modules_to_save": ["lm_head"]})
    assert "serve" not in str(adapter_card(finished_run(finished[0]), adapter, [257]))


@pytest.mark.parametrize(
    ("made", "command"),
    [
        (
            ADAPTER,
            "vllm serve org/base --revision v1 --dtype bfloat16 --tokenizer ann/mine "
            "--generation-config ann/mine --enable-lora --max-lora-rank 32 "
            "--lora-target-modules k_proj q_proj --lora-modules tuned=ann/mine",
        ),
        (ADAPTER._replace(rank=None), None),
        (ADAPTER._replace(kind="merged", dtype="float32"), "vllm serve ann/mine --dtype float32"),
        (
            ADAPTER._replace(kind="gguf", file="mine.gguf", hub=True),
            "llama-server --jinja -hf ann/mine -hff mine.gguf",
        ),
        (
            ADAPTER._replace(kind="gguf", name="a b", file="m.gguf"),
            "llama-server --jinja -m 'a b/m.gguf'",
        ),
    ],
)
def test_a_server_is_told_all_that_it_would_guess(made, command):
    assert serve_command(made) == command


def test_the_printed_command_names_the_folder(export, capsys):
    out = export("adapter")
    [said] = re.findall(r"serve it: (.*)", capsys.readouterr().out)
    assert f"--tokenizer {out} --generation-config {out} " in said
    assert "--max-lora-rank 16 --lora-target-modules " in said and f"tuned={out}" in said
    assert said.replace(str(out), "mine") in (out / "README.md").read_text()


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({}, "rank 16, alpha 32, TARGETS"),
        ({"use_dora": True}, "rank 16, alpha 32, TARGETS; DoRA"),
        ({"lora_bias": True}, "rank 16, alpha 32, TARGETS; LoRA with biases"),
        (
            {"use_rslora": True, "init_lora_weights": "pissa_niter_4"},
            "rank 16, alpha 32, TARGETS; rsLoRA (its scale is 8; alpha / rank is 2); "
            "began with PiSSA (pissa_niter_4) (the saved adapter has rank 32)",
        ),
        (
            {"init_lora_weights": "eva", "loraplus_lr_ratio": 16.0},
            "rank 16, alpha 32, TARGETS; began with EVA; "
            "LoRA+ (the B matrices have 16.0 times the learning rate)",
        ),
    ],
)
def test_a_card_names_the_variant_of_lora(finished, fields, line):
    run = finished_run(finished[0])
    run["recipe"] |= fields | {"lora_target_modules": "TARGETS"}
    assert f"| LoRA | {line} |" in str(model_card(run, {}, ADAPTER))


def test_the_rank_of_a_card_is_that_of_the_saved_adapter(fields, trained_here):
    trained_here({**fields, "init_lora_weights": "olora", "lora_r": "4"})
    adapter = Path(fields["output_dir"]) / "adapter"
    rank = json.loads((adapter / "adapter_config.json").read_text())["r"]
    said = f"began with OLoRA (the saved adapter has rank {rank})"
    assert said in (adapter / "README.md").read_text()


def test_every_score_of_a_card_has_its_interval_and_its_corrected_p(finished):
    side = {"value": 0.5, "interval_95": [0.25, 0.75]}
    score = {"base": side, "tuned": side, "difference": side, "p_value": 0.01, "p_holm": 0.04}
    about = {"rows": 40, "held_out": {"dataset": "rows.jsonl"}}
    quality = about | {"scores": {"bleu": score}}
    card = str(model_card(finished_run(finished[0]), quality, ADAPTER))
    cell = "0.5 [0.25, 0.75]"
    assert f"| BLEU | {cell} | {cell} | {cell} | 0.040 |" in card
    assert "p is after Holm" in card
