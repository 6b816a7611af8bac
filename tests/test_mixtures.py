"""Several data sets in one run: own validation and test rows, and mixtures with weights."""

import json
from collections import Counter

import pytest
from accelerate.data_loader import prepare_data_loader
from conftest import arguments, byte_tokenizer, instruction_rows, load_script, read, write_jsonl
from packed_training import build, train
from test_data import load
from tokenizing import fields_of, tokenized_of
from torch.utils.data import DataLoader
from transformers import set_seed

from sftlab.config.launch import Launch
from sftlab.config.parser import parse_recipe
from sftlab.config.recipe import DataArguments
from sftlab.data.before_training import data_lines
from sftlab.data.chat_template import set_template
from sftlab.data.converter import turn_of
from sftlab.data.encoded_rows import encode_splits
from sftlab.data.mixtures import even_order, rows_of_an_epoch
from sftlab.data.splits import load_splits
from sftlab.evaluation.held_out import held_out


def questions(part):
    return [turn_of(row)["prompt"][-1]["content"] for row in part]


def words(name, count):
    return [{"question": f"{name} {i}?", "answer": f"{name} {i}."} for i in range(count)]


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Rows to train on, to validate on and to test on; one of each is in the file before it."""
    monkeypatch.chdir(tmp_path)
    train = words("train", 30)
    write_jsonl(tmp_path / "train.jsonl", train)
    write_jsonl(tmp_path / "validation.jsonl", [*words("validation", 4), train[7]])
    write_jsonl(tmp_path / "test.jsonl", [train[3], *words("test", 5), words("validation", 2)[1]])
    return tmp_path


@pytest.mark.parametrize("streaming", [False, True])
def test_own_files_are_the_validation_and_the_test_rows(streaming, files):
    splits = load_splits(
        DataArguments(
            dataset_name="train.jsonl",
            validation_file="validation.jsonl",
            test_file="test.jsonl",
            dataset_streaming=streaming,
        )
    )
    lines = "\n".join(data_lines(splits.facts))
    if streaming:  # a row of train is known before train is read
        assert questions(splits.train) == [f"train {i}?" for i in range(30) if i not in (3, 7)]
        assert questions(splits.validation)[-1] == "train 7?"
        assert questions(splits.test) == ["train 3?", *(f"test {i}?" for i in range(5))]
        assert splits.facts["left_out_as_known"] == {"test": {"rows": 1, "first": 6}}
        assert "1 test rows ask what rows of another split ask (the first is row 6)" in lines
        return
    assert questions(splits.train) == [f"train {i}?" for i in range(30)]
    assert questions(splits.validation) == [f"validation {i}?" for i in range(4)]
    assert questions(splits.test) == [f"test {i}?" for i in range(5)]
    known = {"validation": {"rows": 1, "first": 4}, "test": {"rows": 2, "first": 0}}
    assert splits.facts["left_out_as_known"] == known
    assert [one["test"] for one in splits.facts["sources"]] == [0, 0, 5]
    assert "2 test rows ask what rows of another split ask (the first is row 0)" in lines


def test_the_other_splits_keep_their_ratio(files):
    splits = load("train.jsonl", split_fractions=[0.6, 0.2, 0.2], test_file="test.jsonl")
    assert len(splits.train) + len(splits.validation) == 30
    whole = load("train.jsonl", split_fractions=[0.75, 0.25, 0.0])
    assert questions(splits.train) == questions(whole.train)


def test_splits_of_a_folder_are_taken_as_they_are(files):
    splits = load(
        ".",
        split_fractions=[0.8, 0.1, 0.1],
        dataset_validation_split="validation",
        dataset_test_split="test",
    )
    assert [len(part) for part in splits[:3]] == [30, 4, 5]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"test_file": "test.jsonl", "split_fractions": "0.8 0.1 0.1"}, "make the share 0"),
        ({"test_file": "test.jsonl", "dataset_test_split": "test"}, "both give the test rows"),
        ({"datasets": "a.jsonl=1 b.jsonl"}, "gives a.jsonl a weight and b.jsonl none"),
        ({"datasets": "a.jsonl=0 b.jsonl=1"}, "the weight 0.0: it must be a number above 0"),
        ({"datasets": "a.jsonl=x"}, "expected NAME or NAME=WEIGHT"),
        ({"datasets": "a.jsonl b.jsonl", "dataset_name": "c.jsonl"}, "are both given"),
        ({"datasets_stopping_strategy": "all_exhausted"}, "has no effect without weights"),
    ],
)
def test_data_sets_that_contradict_each_other_are_refused(more, message, fields):
    argv = arguments(fields)
    if "dataset_name" not in more:
        argv = [word for word in argv if "datasets" not in more or "--dataset_name" not in word]
    for name, value in more.items():
        argv += [f"--{name}", *value.split()]
    with pytest.raises(ValueError, match=message):
        parse_recipe(argv, Launch.from_environment())


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("{nmae: a.jsonl}", "the key 'nmae'; did you mean 'name'"),
        ("{weight: 2}", "an entry without a name"),
        ("{name: a.jsonl, weight: heavy}", "weight: 'heavy': expected a number"),
    ],
)
def test_entries_of_a_mixture_are_checked(part, message, fields, tmp_path):
    del fields["dataset_name"]
    (tmp_path / "it.yaml").write_text(f"datasets:\n  - {part}\n")
    with pytest.raises(ValueError, match=message):
        parse_recipe(
            ["--config", str(tmp_path / "it.yaml"), *arguments(fields)[2:]],
            Launch.from_environment(),
        )


@pytest.mark.parametrize(
    ("weights", "strategy", "counts"),
    [
        (None, "first_exhausted", [30, 10]),
        ([1, 1], "first_exhausted", [10, 10]),
        ([3, 1], "first_exhausted", [30, 10]),
        ([4, 1], "first_exhausted", [30, 8]),
        ([1, 1], "all_exhausted", [30, 30]),
        ([1, 100], "first_exhausted", [1, 10]),
    ],
)
def test_an_epoch_has_rows_in_the_ratio_of_the_weights(weights, strategy, counts):
    assert rows_of_an_epoch([30, 10], weights, strategy) == counts


def test_rows_are_spread_evenly_and_repeat_from_the_first():
    order = even_order([6, 2], [6, 3]).tolist()
    assert order == [0, 6, 1, 2, 7, 3, 4, 6, 5]


@pytest.fixture
def mixture(tmp_path, monkeypatch):
    """A recipe's fields of a mixture, 3 to 1, of two formats."""
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "a.jsonl", words("a", 90))
    write_jsonl(tmp_path / "b.jsonl", instruction_rows(60))
    return [{"name": "a.jsonl", "weight": 3}, {"name": "b.jsonl", "weight": 1}]


def test_a_mixture_reads_each_in_its_format_by_its_weight(mixture):
    splits = load_splits(DataArguments(datasets=mixture, split_fractions=[0.8, 0.1, 0.1]))
    sources = splits.facts["sources"]
    assert [one["shape"] for one in sources] == ["gsm8k", "dolly"]
    assert (
        sources[0]["train"] == 3 * sources[1]["train"]
        or abs(sources[0]["train"] - 3 * sources[1]["train"]) <= 1
    )
    assert Counter(splits.train["source"]) == {0: sources[0]["train"], 1: sources[1]["train"]}
    # three of a, one of b, all the way
    assert splits.train["source"][:8] == [0, 0, 1, 0] * 2 or sum(splits.train["source"][:8]) == 2
    assert not set(questions(splits.train)) & set(questions(splits.test))


def test_a_stream_mixes_too(mixture):
    args = {"datasets": mixture, "split_fractions": [0.8, 0.1, 0.1], "dataset_streaming": True}
    stream = load_splits(DataArguments(**args, streaming_eval_rows=6))
    asked = questions(stream.train)
    assert asked == questions(load_splits(DataArguments(**args)).train)
    share = sum(question.startswith("a ") for question in asked) / len(asked)
    assert 0.6 < share < 0.9
    assert {question[0] for question in questions(stream.test)} == {"a", "R"}


@pytest.mark.parametrize("strategy", ["first_exhausted", "all_exhausted"])
def test_a_tokenized_mixture_is_the_mixture(strategy, mixture, files, base, tmp_path):
    write_jsonl(tmp_path / "test.jsonl", [words("a", 2)[1], *words("test", 5)])
    path = tmp_path / "it.yaml"
    path.write_text(f"datasets: {json.dumps(mixture)}\ntest_file: test.jsonl\n")
    fields = fields_of(base, "x", tmp_path, max_length="64", datasets_stopping_strategy=strategy)
    del fields["dataset_name"]
    argv = ["--config", str(path), *arguments(fields)[2:]]
    script = load_script("slurm/tokenize_dataset.py")
    given, rest = script.parse_arguments(
        ["--out", str(tmp_path / "out"), "--rows_per_shard", "16", *argv]
    )
    places, *made = script.prepare(parse_recipe(rest, Launch.from_environment()), given)
    tokenized_of(places, made, tmp_path / "out")
    recipe = parse_recipe(argv, Launch.from_environment())
    text = load_splits(recipe.data)
    del fields["datasets_stopping_strategy"]
    argv = ["--config", str(path), *arguments(fields)[2:]]
    argv += ["--dataset_name", str(tmp_path / "out")]
    tokens = load_splits(parse_recipe(argv, Launch.from_environment()).data)
    assert tokens.facts == text.facts
    assert text.facts["left_out_as_known"]["test"]["rows"] == 1
    assert list(tokens.test) == list(text.test)
    tokenizer = byte_tokenizer()
    set_template(tokenizer)
    of_text, of_tokens = (encode_splits(it, tokenizer, recipe.training) for it in (text, tokens))
    for name in ("train", "validation"):
        assert list(of_tokens[name].rows) == list(of_text[name].rows)
    assert of_tokens["train"].facts == of_text["train"].facts
    assert of_text["train"].facts["dropped"] > 0
    assert all(one["kept"] for one in of_text["train"].facts["sources"])


def test_a_run_of_a_mixture_says_rows_and_tokens_of_each(mixture, fields, trained_here, tmp_path):
    del fields["dataset_name"]
    done = trained_here(fields | {"datasets": ["a.jsonl=3", "b.jsonl=1"]})
    run = read(fields["output_dir"])
    tokens = run["data"]["tokenized"]["sources"]
    assert [one["dataset"] for one in tokens] == ["a.jsonl", "b.jsonl"]
    assert sum(one["tokens"] for one in tokens) == run["data"]["tokenized"]["tokens"]
    assert "a.jsonl (gsm8k, weight 3): train " in done.stdout
    assert len(held_out(run).rows) == run["data"]["test"]["rows"]
    other = write_jsonl(tmp_path / "other.jsonl", words("other", 3))
    assert len(held_out(run, str(other)).rows) == 3


@pytest.fixture
def mixed_fields(mixture, fields):
    """Fields of a run of the mixture that steps through more than an epoch of it."""
    del fields["dataset_name"]
    several = {"datasets": ["a.jsonl=3", "b.jsonl=1"], "lora_dropout": "0.1"}
    batch = {"global_batch_size": "16", "per_device_train_batch_size": "16"}
    steps = {"max_steps": "8", "save_steps": "6", "streaming_eval_rows": "6"}
    return fields | several | batch | steps


@pytest.mark.long
@pytest.mark.parametrize("streaming", ["true", "false"])
def test_a_mixture_continues_exactly(streaming, mixed_fields):
    whole = build(mixed_fields, dataset_streaming=streaming)
    losses = [entry["loss"] for entry in train(whole)]
    assert whole.state.epoch > 1
    again = build(mixed_fields, dataset_streaming=streaming, overwrite="true")
    found = train(again, resume_from_checkpoint=f"{mixed_fields['output_dir']}/checkpoint-6")
    assert [entry["loss"] for entry in found] == losses
    if streaming == "true":
        counted = again.source_counts.facts(["a", "b"])
        assert counted == whole.source_counts.facts(["a", "b"])
        assert sum(one["sequences"] for one in counted) == 8 * 16
        assert counted[0]["sequences"] > 2 * counted[1]["sequences"] > 0
        assert sum(one["tokens"] for one in counted) == found[-1]["num_tokens"]


@pytest.mark.parametrize("streaming", ["true", "false"])
def test_two_processes_see_the_rows_of_one(streaming, mixed_fields):
    trainer = build(mixed_fields, dataset_streaming=streaming)
    rows = trainer.train_dataset

    def batches(size, count, index):
        set_seed(0)
        order = {} if streaming == "true" else {"sampler": trainer._get_train_sampler(rows)}
        loader = DataLoader(rows, size, collate_fn=lambda batch: batch, **order)
        dealt = {"num_processes": count, "process_index": index, "put_on_device": False}
        dealt |= {"use_seedable_sampler": True, "data_seed": 0}
        return [
            [tuple(row["input_ids"]) for row in batch]
            for batch in prepare_data_loader(loader, **dealt)
        ]

    whole = batches(16, 1, 0)
    halves = [batches(8, 2, index) for index in (0, 1)]
    assert len(whole) == 5
    assert [a + b for a, b in zip(*halves, strict=True)] == whole
