"""An export that is not its run is caught in every format, with the first prompt that differs."""

import copy
import json

import pytest
import torch
from conftest import instruction_rows, launched, load_script, short_fields, write_jsonl
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from sftlab.data.chat_template import set_template
from sftlab.models.demo import train_tokenizer

WRITERS = {"merged": "write_merged", "adapter": "write_adapter", "gguf": "write_gguf"}


def write_run(folder):
    """A short run, whose tokenizer has merges: GGUF has a name for it."""
    texts = [text for row in instruction_rows(200) for text in row.values()]
    tokenizer = train_tokenizer(texts, 300)
    set_template(tokenizer)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=320,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=512,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            initializer_range=0.1,
        )
    )
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    rows = write_jsonl(folder / "rows.jsonl", instruction_rows(200))
    launched("cpu", short_fields(folder / "base", rows, folder / "run"))


@pytest.fixture(scope="module")
def run(build_once):
    return build_once("exported", write_run) / "run"


@pytest.fixture(scope="module")
def script():
    return load_script("recipes/export.py")


@pytest.fixture
def export(script, run, tmp_path):
    def export(kind):
        out = tmp_path / "exports" / kind
        script.main(["--run", str(run), "--to", kind, "--out", str(out), "--prompts", "8"])
        return out

    return export


def zero_b(script, kind, monkeypatch):
    """The adapter changes nothing in what is written."""
    if kind == "adapter":
        write = script.write_adapter

        def zeroed(folder, base, out, *more):
            write(folder, base, out, *more)
            path = out / "adapter_model.safetensors"
            weights = {n: t * 0 if "lora_B" in n else t for n, t in load_file(path).items()}
            save_file(weights, path, metadata={"format": "pt"})

        return monkeypatch.setattr(script, "write_adapter", zeroed)
    merge = script.merge

    def without_b(model, *more):
        with torch.no_grad():
            for name, weight in model.named_parameters():
                weight.mul_(0 if "lora_B" in name else 1)
        return merge(model, *more)

    return monkeypatch.setattr(script, "merge", without_b)


def another_template(script, kind, monkeypatch):
    """What is written brings a template that asks otherwise."""
    write = getattr(script, WRITERS[kind])

    def changed(*given):
        return write(*[_with_other_words(one) for one in given])

    monkeypatch.setattr(script, WRITERS[kind], changed)


def _with_other_words(given):
    if not hasattr(given, "chat_template"):
        return given
    found = copy.deepcopy(given)
    found.chat_template = found.chat_template.replace("### Instruction:", "### Question:")
    return found


def another_end(script, kind, monkeypatch):
    """What is written ends an answer at a token that the run does not end it at."""
    write = getattr(script, WRITERS[kind])

    def changed(*given):
        if kind == "gguf":
            return write(*given[:-1], [*given[-1], 3])
        write(*given)
        path = given[2] / "generation_config.json"
        found = json.loads(path.read_text()) | {"eos_token_id": 3}
        return path.write_text(json.dumps(found))

    monkeypatch.setattr(script, WRITERS[kind], changed)


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize(
    ("sabotage", "said"),
    [
        (zero_b, r"nats a token .*, first at prompt \d+, .*: the weights are not the run's"),
        (another_template, r"prompt \d+ has other token ids .*: the template or the tokenizer"),
        (another_end, r"answers end at the tokens \[.*3\], and in the run at \[\d+\], .* prompt"),
    ],
)
def test_a_sabotaged_export_is_not_kept(
    script, run, export, monkeypatch, tmp_path, kind, sabotage, said
):
    sabotage(script, kind, monkeypatch)
    with pytest.raises(SystemExit, match=said) as stopped:
        export(kind)
    assert str(stopped.value).startswith(f"error: the export does not answer as {run}: ")
    assert not list((tmp_path / "exports").iterdir())


@pytest.mark.parametrize("kind", WRITERS)
def test_the_same_export_left_alone_is_kept(export, kind):
    verified = json.loads((export(kind) / "verified.json").read_text())
    assert (verified["differs"], verified["other_ends"]) == (None, 0)
