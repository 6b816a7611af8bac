"""Tokens of other rows, another template or an unfinished job are refused."""

import json
import os
import shutil
from contextlib import contextmanager

import pytest
from conftest import instruction_rows, load_script, write_jsonl
from dask.distributed import LocalCluster
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from tokenizing import ODD, TURNS, contents, fields_of, recipe_of, refused, tokenized
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from sftlab.config.launch import Launch
from sftlab.data.chat_template import INSTRUCTION_TEMPLATE
from sftlab.data.splits import SPLITS, load_splits
from sftlab.data.tokenized_dataset import MANIFEST, read_record, record_path
from sftlab.fastpath.selection import FastPath
from sftlab.models.layers import Layers
from sftlab.training.building import build_trainer

ROWS = instruction_rows(60)


@pytest.fixture(scope="module")
def script():
    return load_script("slurm/tokenize_dataset.py")


@pytest.fixture(scope="module")
def llama_like() -> PreTrainedTokenizerFast:
    """A BPE tokenizer with Llama 3's way of splitting and tokens for the turns."""
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    backend = Tokenizer(models.BPE(ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(False, use_regex=False),
        ]
    )
    special = ["<bos>", "<eos>", "<pad>", "<|start|>", "<|end|>", "<|turn|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    text = [ODD * 3, INSTRUCTION_TEMPLATE.read_text(), *map(str, instruction_rows(60))]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=special, initial_alphabet=alphabet)
    backend.train_from_iterator(text, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )


@pytest.fixture(scope="module")
def model_of(base, llama_like, tmp_path_factory):
    """Folders of the tiny model with each tokenizer."""
    turned = shutil.copytree(base, tmp_path_factory.mktemp("models") / "turned")
    llama_like.chat_template = TURNS
    llama_like.save_pretrained(turned)
    return {"bytes": base, "llama": turned}


@pytest.fixture(scope="module")
def made(script, base, rows, tmp_path_factory):
    """Fields of a recipe, and the folder of its tokens, in shards of 16 rows."""
    folder = tmp_path_factory.mktemp("made")
    fields = fields_of(base, rows, folder)
    tokenized(script, fields, folder / "tokens", size=16)
    return fields, folder / "tokens"


def test_bad_input_is_one_sentence_and_changes_nothing(
    script, made, base, rows, tmp_path, monkeypatch
):
    fields, folder = made
    before, out = contents(folder), tmp_path / "out"
    assert "at least 1" in refused(script, fields, out, "--workers", "0")
    assert "recipe nowhere.yaml not found" in refused(script, {}, out, "--config", "nowhere.yaml")
    longer = refused(script, fields | {"max_length": "90"}, folder, "--rows_per_shard", "16")
    assert "holds shards made with max_length 100, asked for is 90" in longer
    assert "rows_per_shard 16" in refused(script, fields, folder, "--rows_per_shard", "17")
    template = tmp_path / "turns.jinja"
    template.write_text(TURNS)
    other = refused(
        script, fields | {"chat_template_path": str(template)}, folder, "--rows_per_shard", "16"
    )
    assert "another chat template" in other
    changed = write_jsonl(tmp_path / "rows.jsonl", instruction_rows(199))
    assert "dataset_name" in refused(
        script, fields | {"dataset_name": str(changed)}, folder, "--rows_per_shard", "16"
    )
    assert contents(folder) == before
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "thesis.txt").write_text("mine")
    assert "is no tokenized data set" in refused(script, fields, taken)
    assert contents(taken).keys() == {"thesis.txt"}
    monkeypatch.setattr(PreTrainedTokenizerFast, "is_fast", False)
    assert "is not a fast tokenizer" in refused(script, fields, out)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "sbatch, which is not here" in refused(script, fields, out, "--cluster", "slurm")
    assert not out.exists()


def test_rows_that_are_no_text_are_counted_and_refused_above_the_share(script, base, tmp_path):
    lines = [
        json.dumps(
            {
                "messages": [
                    {"role": "user", "content": f"{i}?"},
                    {"role": "assistant", "content": "Yes."},
                ]
            }
        )
        for i in range(60)
    ]
    for i in (3, 40):
        lines[i] = lines[i].replace('"assistant"', '"robot"')
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(lines))
    fields = fields_of(base, rows, tmp_path)
    assert "unknown role 'robot'" in refused(script, fields, tmp_path / "out")
    assert "allows 1 of 60" in refused(script, fields, tmp_path / "out", "--max_bad_rows", "0.02")
    assert not (tmp_path / "out").exists()
    manifest = tokenized(script, fields, tmp_path / "out", share=0.05)
    assert manifest["facts"]["bad_rows_left_out"] == 2
    assert sum(manifest["facts"][name]["rows"] for name in SPLITS) == 58


def test_an_empty_split_is_refused_as_in_the_text(script, base, tmp_path):
    fields = fields_of(base, write_jsonl(tmp_path / "rows.jsonl", instruction_rows(3)), tmp_path)
    with pytest.raises(ValueError, match=r"split of .* is empty: 3 usable rows") as of_text:
        load_splits(recipe_of(fields).data)
    with pytest.raises(ValueError, match=r"split of .* is empty: 3 usable rows") as of_tokens:
        tokenized(script, fields, tmp_path / "out")
    assert str(of_tokens.value) == str(of_text.value)
    with pytest.raises(ValueError, match="is not finished"):
        load_splits(recipe_of(fields | {"dataset_name": str(tmp_path / "out")}).data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"split_fractions": [0.7, 0.2, 0.1]},
            r"made with split_fractions \[0.8, 0.1, 0.1\], asked for is \[0.7",
        ),
        ({"dataset_fraction": 0.5}, "dataset_fraction 1.0, asked for is 0.5"),
        ({"dataset_shape": "alpaca"}, "dataset_shape dolly, asked for is alpaca"),
        ({"dataset_streaming": True}, "leave dataset_streaming out"),
    ],
)
def test_tokens_of_other_rows_or_splits_are_refused(change, message, made):
    fields, folder = made
    data = recipe_of(fields | {"dataset_name": str(folder)}).data
    for name, value in change.items():
        setattr(data, name, value)
    with pytest.raises(ValueError, match=message) as caught:
        load_splits(data)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_length": "99"}, "max_length 100, asked for is 99"),
        ({"truncation_mode": "keep_end"}, "truncation_mode keep_start"),
        ({"completion_only_loss": "false"}, "completion_only_loss True"),
        ({"template": TURNS}, "another chat template"),
        ({"tokenizer": "llama"}, "another tokenizer"),
        ({"eos": "<pad>"}, "another tokenizer"),
    ],
)
def test_tokens_of_another_template_tokenizer_or_length_are_refused(
    change, message, made, model_of
):
    fields, folder = made
    tokenizer = AutoTokenizer.from_pretrained(
        model_of["llama" if "tokenizer" in change else "bytes"]
    )
    tokenizer.chat_template = change.get("template", INSTRUCTION_TEMPLATE.read_text())
    tokenizer.eos_token = change.get("eos", tokenizer.eos_token)
    settings = {
        name: value
        for name, value in change.items()
        if name not in ("template", "tokenizer", "eos")
    }
    recipe = recipe_of(fields | {"dataset_name": str(folder)} | settings)
    fast = FastPath(False, False, None, None, Layers(2))
    with pytest.raises(ValueError, match=message) as caught:
        build_trainer(recipe, Launch.from_environment(), fast, tokenizer, load_splits(recipe.data))
    assert "\n" not in str(caught.value)


def test_tokens_that_are_not_finished_or_not_whole_are_refused(made, tmp_path):
    fields, whole = made
    folder = shutil.copytree(whole, tmp_path / "tokens")
    data = recipe_of(fields | {"dataset_name": str(folder)}).data
    (folder / "train-00003.arrow").write_bytes(b"short")
    with pytest.raises(ValueError, match=r"train-00003.arrow is missing or damaged"):
        load_splits(data)
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | {"facts": None}))
    with pytest.raises(ValueError, match="is not finished"):
        load_splits(data)
    (folder / MANIFEST).write_text("{")
    with pytest.raises(ValueError, match="it is not JSON"):
        load_splits(data)


BAD_VALUES = {
    "format": (lambda m: m.update(format=7), "not the manifest of a tokenized data set of format"),
    "settings": (lambda m: m.update(settings=[]), "settings is [], expected an object"),
    "rows": (lambda m: m["facts"].update(rows_read="many"), 'facts.rows_read is "many", expected'),
    "split": (lambda m: m["facts"].update(train=None), "has no facts.train.rows"),
    "fields": (lambda m: m["facts"].pop("rows_with"), "has no facts.rows_with"),
    "not used": (lambda m: m["facts"].update(not_used={"x": 1}), "facts.not_used is"),
    "kept": (lambda m: m["tokenized"].update(train={"kept": -1}), "tokenized.train.kept is -1"),
    "longest": (lambda m: m["tokenized"]["train"].pop("longest"), "has no tokenized.train.longest"),
    "shards": (lambda m: m["shards"].append(3), "shards is [{"),
    "shard": (lambda m: m["shards"][0].update(files={"a": 1}), "shards[0]: files is {"),
}


@pytest.mark.parametrize("name", BAD_VALUES)
def test_a_manifest_that_was_edited_is_named_with_its_key(made, tmp_path, name):
    fields, whole = made
    folder = shutil.copytree(whole, tmp_path / "tokens")
    change, said = BAD_VALUES[name]
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ValueError) as refused:
        load_splits(recipe_of(fields | {"dataset_name": str(folder)}).data)
    assert said in str(refused.value) and str(folder / MANIFEST) in str(refused.value)


def test_a_manifest_that_is_a_pipe_is_not_waited_for(made, tmp_path):
    fields, whole = made
    folder = shutil.copytree(whole, tmp_path / "tokens")
    (folder / MANIFEST).unlink()
    os.mkfifo(folder / MANIFEST)
    with pytest.raises(ValueError, match=r"manifest.json cannot be read: it is a pipe"):
        load_splits(recipe_of(fields | {"dataset_name": str(folder)}).data)


@pytest.mark.parametrize(
    "change", [{"bad": "none"}, {"notes": 3}, {"files": []}, {"source_rows": None}, {"number": 1}]
)
def test_a_shard_whose_record_was_edited_is_made_again(made, tmp_path, change):
    folder = shutil.copytree(made[1], tmp_path / "tokens")
    whole = record_path(folder, 0)
    whole.write_text(json.dumps(json.loads(whole.read_text()) | change))
    assert read_record(folder, 0) is None
    assert read_record(folder, 1)["number"] == 1


def test_a_template_that_refuses_every_question_is_one_sentence(script, base, rows, tmp_path):
    (tmp_path / "none.jinja").write_text("{{ raise_exception('no questions') }}")
    fields = fields_of(base, rows, tmp_path, chat_template_path=str(tmp_path / "none.jinja"))
    said = refused(script, fields, tmp_path / "out")
    assert "row 0 of " in said and "the chat template refuses it: no questions" in said


def test_what_a_worker_raises_ends_the_job_in_its_sentence(script, made, tmp_path, monkeypatch):
    @contextmanager
    def in_this_process(*_):
        with LocalCluster(
            1, threads_per_worker=1, processes=False, dashboard_address=None
        ) as cluster:
            yield cluster

    monkeypatch.setattr(script, "cluster_of", in_this_process)
    fields, whole = made
    folder = shutil.copytree(whole, tmp_path / "tokens")
    record_path(folder, 0).unlink()
    record_path(folder, 0).mkdir()
    said = refused(script, fields, folder, "--rows_per_shard", "16")
    assert "shard-00000.json" in said and said.endswith(": Is a directory")


def test_an_encoder_that_was_edited_is_refused(script, made, tmp_path):
    fields, whole = made
    folder = shutil.copytree(whole, tmp_path / "tokens")
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["encoder"]["template"] = "x"
    (folder / MANIFEST).write_text(json.dumps(manifest))
    said = refused(script, fields, folder, "--rows_per_shard", "16")
    assert "manifest.json: encoder is not what its settings are a hash of" in said


def test_rows_beyond_the_models_positions_are_refused(script, base, tmp_path):
    rows = [row | {"response": "word " * (120 if i == 7 else 1)} for i, row in enumerate(ROWS)]
    fields = fields_of(base, write_jsonl(tmp_path / "rows.jsonl", rows), tmp_path)
    with pytest.raises(ValueError, match=r"has 6\d\d tokens, and the model has 512 positions"):
        tokenized(script, fields | {"max_length": "700"}, tmp_path / "out")
    assert tokenized(script, fields | {"max_length": "512"}, tmp_path / "cut")["facts"]
