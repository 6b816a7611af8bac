"""A tokenized data set: what trl makes of the same rows, the same bytes however it came about, and
what is refused.
"""

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from datetime import date
from pathlib import Path

import psutil
import pytest
from conftest import (
    ROOT,
    arguments,
    byte_tokenizer,
    instruction_rows,
    load_script,
    read,
    write_jsonl,
)
from datasets import Dataset, load_dataset
from slurm_cluster import FOUND, SlurmCluster
from test_data import SHAPED
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from sftlab.config.launch import Launch
from sftlab.config.parser import parse_recipe
from sftlab.data.batch_encoder import Encoder
from sftlab.data.chat_template import INSTRUCTION_TEMPLATE
from sftlab.data.shard_folder import begin, finish, finished_records
from sftlab.data.shard_writer import place_of, tokenize_shard
from sftlab.data.splits import SPLITS, load_splits
from sftlab.data.tokenized_dataset import MANIFEST, training_rows
from sftlab.evaluation.held_out import held_out
from sftlab.fastpath.selection import FastPath
from sftlab.training.trainer import build_trainer

TURNS = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start|>' + m['role'] + '<|end|>\n' + m['content'] "
    "+ '<|turn|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant<|end|>\n' }}{% endif %}"
)
ODD = (
    "Ordinary words! a  b \n\n \t\r\n# 'S don't 12345 é\u0301 日本語 <|turn|> "
    "### Response:\n \x85\u3000x"
)


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


def recipe_of(fields):
    return parse_recipe(arguments(fields), Launch.from_environment())


def tokenized(script, fields, out, size=64, share=0.0):
    """The data set of a recipe tokenized in this process, without a cluster; the manifest."""
    given, rest = script.parse_arguments(
        [
            "--out",
            str(out),
            "--rows_per_shard",
            str(size),
            "--max_bad_rows",
            str(share),
            *arguments(fields),
        ]
    )
    places, *made = script.prepare(parse_recipe(rest, Launch.from_environment()), given)
    manifest = begin(out, *made)
    records = finished_records(out, len(places))
    for number, place in enumerate(places):
        if number not in records:
            records[number] = tokenize_shard(str(out), number, place, number * size)
    finish(out, manifest, [records[number] for number in sorted(records)])
    return manifest


def contents(folder):
    """Every file of a folder with its hash; hidden ones too."""
    return {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(Path(folder).iterdir())
    }


def shards_of(folder):
    """Hashes of what must not depend on how it was made: all but the plot."""
    return {name: digest for name, digest in contents(folder).items() if name != "lengths.png"}


def odd_rows(shape, count=150):
    """Rows of a shape with odd white space, empty and long responses, prompts beyond max_length,
    several turns.
    """
    rng = random.Random(0)
    rows = []
    for i in range(count):
        question = f"{i} " + "".join(rng.choices(ODD, k=rng.choice([5, 40, 90, 160])))
        answer = rng.choice(
            [
                "",
                " \n",
                "".join(rng.choices(ODD, k=60)),
                "Fine! " * rng.choice([1, 5, 40]),
                "\n\nok ",
            ]
        )
        turns = [("user", question), ("assistant", answer), ("user", "And?"), ("assistant", "So.")][
            : rng.choice([2, 4])
        ]
        rows.append(
            {
                "openorca": {
                    "system_prompt": rng.choice(["", "Be brief."]),
                    "question": question,
                    "response": answer,
                },
                "dolly": {
                    "instruction": question,
                    "context": rng.choice(["", "Given."]),
                    "response": answer,
                },
                "alpaca": {
                    "instruction": question,
                    "input": rng.choice(["", "Given."]),
                    "output": answer,
                },
                "gsm8k": {"question": question, "answer": answer},
                "sharegpt": {"conversations": [{"from": r, "value": c} for r, c in turns]},
                "messages": {"messages": [{"role": r, "content": c} for r, c in turns]},
                "prompt_completion": {"prompt": question, "completion": answer},
            }[shape]
        )
    return rows


@pytest.fixture(scope="module")
def model_of(base, llama_like, tmp_path_factory):
    """Folders of the tiny model with each tokenizer."""
    turned = shutil.copytree(base, tmp_path_factory.mktemp("models") / "turned")
    llama_like.chat_template = TURNS
    llama_like.save_pretrained(turned)
    return {"bytes": base, "llama": turned}


@pytest.fixture(scope="module")
def trl_rows(model_of, tmp_path_factory):
    """(rows, recipe) -> the rows that trl's own preparation makes."""
    trainers, folder = {}, str(tmp_path_factory.mktemp("trl"))

    def prepare(rows, recipe):
        name, args = recipe.model.model_name_or_path, recipe.training
        tokenizer = AutoTokenizer.from_pretrained(name)
        if not tokenizer.chat_template:
            tokenizer.chat_template = INSTRUCTION_TEMPLATE.read_text()
        if name not in trainers:
            one = Dataset.from_list([{"prompt": "a", "completion": "b"}])
            trainers[name] = SFTTrainer(
                name, SFTConfig(folder, report_to="none", use_cpu=True), train_dataset=one
            )
        trainer = trainers[name]
        trainer.completion_only_loss = args.completion_only_loss is not False
        made = trainer._prepare_dataset(rows, tokenizer, args, False, None, "train")
        return [(row["input_ids"], row["labels"]) for row in made]

    return prepare


def fields_of(model, rows, folder, **more):
    return {
        "model_name_or_path": str(model),
        "dataset_name": str(rows),
        "output_dir": str(folder / "run"),
        "max_length": "100",
        **more,
    }


def assert_same_as_trl(script, trl_rows, fields, out):
    manifest = tokenized(script, fields, out)
    text = load_splits(recipe_of(fields).data)
    recipe = recipe_of(fields | {"dataset_name": str(out)})
    tokens = load_splits(recipe.data)
    assert tokens.facts == text.facts
    assert list(tokens.test) == list(text.test)
    for name in ("train", "validation"):
        rows = training_rows(getattr(tokens, name), manifest, name)
        found = [(row["input_ids"], row["labels"]) for row in rows]
        assert found == trl_rows(getattr(text, name), recipe)
        assert len(getattr(tokens, name)) == len(getattr(text, name))
    return manifest


@pytest.mark.parametrize("model", ["bytes", "llama"])
@pytest.mark.parametrize("shape", SHAPED)
def test_rows_are_those_that_trl_makes_of_every_shape_and_template(
    shape, model, script, trl_rows, model_of, tmp_path
):
    rows = write_jsonl(tmp_path / "rows.jsonl", odd_rows(shape))
    fields = fields_of(model_of[model], rows, tmp_path)
    manifest = assert_same_as_trl(script, trl_rows, fields, tmp_path / "out")
    assert manifest["tokenized"]["train"]["dropped"] > 0
    assert manifest["tokenized"]["train"]["cut"] > 0
    assert manifest["facts"]["empty_responses_dropped"] > 0


@pytest.mark.parametrize(
    "how",
    [
        {"truncation_mode": "keep_end"},
        {"completion_only_loss": "false"},
        {"dataset_fraction": "0.5"},
    ],
)
def test_rows_are_those_that_trl_makes_under_every_setting(
    how, script, trl_rows, model_of, tmp_path
):
    rows = write_jsonl(tmp_path / "rows.jsonl", odd_rows("messages"))
    fields = fields_of(model_of["llama"], rows, tmp_path, **how)
    assert_same_as_trl(script, trl_rows, fields, tmp_path / "out")


@pytest.mark.parametrize("template", [INSTRUCTION_TEMPLATE.read_text(), TURNS])
@pytest.mark.parametrize("which", ["bytes", "llama", "metaspace", "stripping"])
def test_a_prompt_encoded_once_gives_the_ids_of_one_encoded_alone(which, template, llama_like):
    backend = {"bytes": byte_tokenizer()._tokenizer, "llama": llama_like._tokenizer}.get(which)
    if which == "metaspace":
        # words are not split at blanks: no place to join is known
        backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
        backend.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
        backend.train_from_iterator(
            [ODD * 3] * 9, trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>"])
        )
    if which == "stripping":
        # tokens that take the white space beside them with them
        backend = Tokenizer.from_str(llama_like._tokenizer.to_str())
        backend.add_special_tokens([AddedToken("###", lstrip=True, rstrip=True)])
    draw = random.Random(1)
    pieces = [*ODD, "\n\n", " \n", "### ", "<|end|>", "<|turn|>\n", "! R", "'s"]
    texts = [
        ["".join(draw.choices(pieces, k=draw.randint(1, 12))) for _ in "qa"] for _ in range(1500)
    ]
    prompts = [[{"role": "user", "content": q}] for q, _ in texts]
    completions = [[{"role": "assistant", "content": a}] for _, a in texts]
    special = {"bos_token": "<bos>", "eos_token": "<eos>"}
    joined, plain = (
        list(
            Encoder(Tokenizer.from_str(backend.to_str()), template, special, shortcut)(
                prompts, completions
            )
        )
        for shortcut in (True, False)
    )
    assert joined == plain


@pytest.fixture(scope="module")
def made(script, base, rows, tmp_path_factory):
    """Fields of a recipe, and the folder of its tokens, in shards of 16 rows."""
    folder = tmp_path_factory.mktemp("made")
    fields = fields_of(base, rows, folder)
    tokenized(script, fields, folder / "tokens", size=16)
    return fields, folder / "tokens"


def test_a_stopped_job_goes_on_and_makes_the_same_bytes(script, made, tmp_path):
    fields, whole = made
    folder = shutil.copytree(whole, tmp_path / "tokens")
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | {"facts": None, "shards": []}))
    (folder / "shard-00002.json").unlink()  # killed before the record was written
    (folder / "train-00003.arrow").unlink()
    broken = folder / "train-00004.arrow"
    broken.write_bytes(broken.read_bytes()[:-9] + b"\0" * 9)
    (folder / "shard-00005.json").write_text('{"number": 5, "fi')
    (folder / ".train-00006.arrow.host.17.part").write_bytes(b"half")
    kept = folder / "train-00007.arrow"
    before = kept.stat().st_mtime_ns
    tokenized(script, fields, folder, size=16)
    assert shards_of(folder) == shards_of(whole)
    assert kept.stat().st_mtime_ns == before


def command(fields, out, *more):
    return [
        sys.executable,
        str(ROOT / "slurm" / "tokenize_dataset.py"),
        "--out",
        str(out),
        *more,
        *arguments(fields),
    ]


@contextmanager
def started(command, **how):
    """A process that does not outlive a test that fails."""
    with subprocess.Popen(command, cwd=ROOT, **how) as running:
        try:
            yield running
        finally:
            running.terminate()


def wait_for(look, seconds=60):
    end = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
    return found


def forty_shards(script, base, folder, size=20):
    """Fields of a recipe with 40 shards of `size` long rows, and the files of every tenth shard,
    made here.
    """
    lines = [{"instruction": f"{i} {ODD * 80}", "response": ODD} for i in range(40 * size)]
    fields = fields_of(base, write_jsonl(folder / "rows.jsonl", lines), folder, max_length="8000")
    out = ["--out", str(folder / "some"), "--rows_per_shard", str(size)]
    given, rest = script.parse_arguments([*out, *arguments(fields)])
    places, *made = script.prepare(parse_recipe(rest, Launch.from_environment()), given)
    begin(folder / "some", *made)
    for number in range(0, 40, 10):
        tokenize_shard(str(folder / "some"), number, places[number], number * size)
    return fields, {
        name: digest for name, digest in contents(folder / "some").items() if name != MANIFEST
    }


def shards_there(out):
    return len(list(out.glob("shard-*.json")))


def test_two_workers_one_of_them_killed_make_the_bytes_of_one(script, base, tmp_path):
    (fields, some), out = forty_shards(script, base, tmp_path), tmp_path / "tokens"
    log = tmp_path / "log"
    two = command(fields, out, "--workers", "2", "--rows_per_shard", "20")
    with log.open("w") as file, started(two, stdout=file, stderr=file) as running:
        wait_for(lambda: shards_there(out) > 3)
        workers = [
            p
            for p in psutil.Process(running.pid).children()
            if "spawn_main" in " ".join(p.cmdline())
        ]
        assert len(workers) == 2
        workers[1].suspend()
        workers[0].kill()
        assert shards_there(out) < 40, "it was over before a worker was killed"
        workers[1].resume()
        assert running.wait(120) == 0, log.read_text()
    assert shards_there(out) == 40
    assert some.items() <= contents(out).items()
    assert not [name for name in contents(out) if name.startswith(".")]
    assert (out / "lengths.png").stat().st_size > 5000


@pytest.mark.cluster
@pytest.mark.skipif(not all(FOUND.values()), reason="Slurm is not installed (Debian: slurm-wlm)")
def test_jobs_of_slurm_one_of_them_cancelled_make_the_same_bytes(script, base, tmp_path):
    (fields, some), out = forty_shards(script, base, tmp_path), tmp_path / "tokens"
    log = tmp_path / "log"
    two = command(fields, out, "--cluster", "slurm", "--workers", "2", "--rows_per_shard", "20")
    with (
        SlurmCluster(tmp_path / "slurm") as slurm,
        log.open("w") as file,
        started(two, stdout=file, stderr=file, env=slurm.env) as running,
    ):
        wait_for(lambda: shards_there(out) > 3)
        first = slurm.run("squeue", "-h", "-o", "%i").split()
        assert len(first) == 2
        # the other waits, or it might be done before the lost one is replaced
        slurm.run("scontrol", "suspend", first[1])
        slurm.run("scancel", first[0])
        wait_for(
            lambda: (
                set(slurm.run("squeue", "-h", "-t", "PENDING,RUNNING", "-o", "%i").split())
                - set(first)
            )
        )
        assert shards_there(out) < 40, "it was over before the job was cancelled"
        slurm.run("scontrol", "resume", first[1])
        assert running.wait(120) == 0, log.read_text()
        slurm.wait_until(lambda: slurm.run("squeue", "-h", "-o", "%i"), "")
    assert shards_there(out) == 40
    assert some.items() <= contents(out).items()


def test_little_travels_to_a_worker_and_back(script, made, tmp_path):
    fields, folder = made
    given, rest = script.parse_arguments(["--out", str(folder), *arguments(fields)])
    places, *_ = script.prepare(parse_recipe(rest, Launch.from_environment()), given)
    assert all(len(place) < 10_000 for place in places)
    assert all(path.stat().st_size < 2_000 for path in folder.glob("shard-*.json"))


def test_a_template_that_writes_the_date_is_held_to_its_day(script, base, rows, tmp_path):
    template = tmp_path / "dated.jinja"
    template.write_text("{{ strftime_now('%d %b %Y') }}" + TURNS)
    fields = fields_of(base, rows, tmp_path, chat_template_path=str(template))
    manifest = tokenized(script, fields, tmp_path / "out")
    assert manifest["settings"]["day"] == date.today().isoformat()
    path = tmp_path / "out" / MANIFEST
    path.write_text(path.read_text().replace(manifest["settings"]["day"], "2020-02-02"))
    part = load_dataset("json", data_files=str(rows), split="train")
    with pytest.raises(ValueError, match="2020-02-02 is over"):
        tokenize_shard(str(tmp_path / "out"), 0, place_of(part, 0, 9), 0)


def refused(script, fields, out, *more):
    """What the script says as it ends."""
    with pytest.raises(SystemExit) as caught:
        script.main(["--out", str(out), *more, *arguments(fields)])
    message = str(caught.value)
    assert message.startswith("error: ")
    assert "\n" not in message
    return message


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


def test_a_job_that_slurm_does_not_take_is_one_sentence(script, made, tmp_path, monkeypatch):
    sbatch = tmp_path / "sbatch"
    sbatch.write_text(
        "#!/bin/sh\necho 'sbatch: error: invalid partition specified: nowhere' >&2\nexit 1\n"
    )
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    said = refused(
        script, made[0], tmp_path / "out", "--cluster", "slurm", "--partition", "nowhere"
    )
    assert "invalid partition specified: nowhere" in said


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
    fast = FastPath(packing=False, compile_layers=False, fused_loss=None, attn_implementation=None)
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
    with pytest.raises(ValueError, match="is not the manifest"):
        load_splits(data)


def test_training_and_judging_on_tokens_is_that_on_the_text(
    finished, script, tmp_path, trained_here
):
    text, fields, _ = finished
    tokenized(script, fields, tmp_path / "tokens", size=32)
    run = tmp_path / "run"
    trained_here({**fields, "dataset_name": str(tmp_path / "tokens"), "output_dir": str(run)})
    on_text, on_tokens = read(text), read(run)
    assert on_tokens["losses"] == on_text["losses"]
    assert on_tokens["measured"]["validation_loss"] == on_text["measured"]["validation_loss"]
    assert on_tokens["data"] == on_text["data"]
    weights = [
        (folder / "adapter" / "adapter_model.safetensors").read_bytes() for folder in (text, run)
    ]
    assert weights[0] == weights[1]
    rows = held_out(on_tokens)
    assert list(rows.rows) == list(held_out(on_text).rows)
    with pytest.raises(ValueError, match="ask what the run was trained or validated on"):
        held_out(on_tokens, dataset=fields["dataset_name"])


@pytest.mark.cluster
@pytest.mark.skipif(not all(FOUND.values()), reason="Slurm is not installed (Debian: slurm-wlm)")
def test_jobs_that_end_before_they_report_are_not_waited_for_for_ever(script, base, tmp_path):
    fields, _ = forty_shards(script, base, tmp_path)
    words = command(
        fields,
        tmp_path / "tokens",
        "--cluster",
        "slurm",
        "--workers",
        "2",
        "--rows_per_shard",
        "20",
    )
    with SlurmCluster(tmp_path / "slurm") as slurm:
        broken = slurm.env | {"DASK_JOBQUEUE__SLURM__PYTHON": "/bin/false"}
        done = subprocess.run(
            words, env=broken, capture_output=True, text=True, cwd=ROOT, timeout=120
        )
    assert done.returncode == 1
    assert "none of them reported: see" in done.stderr.strip().splitlines()[-1], done.stderr[-3000:]
