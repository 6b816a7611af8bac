"""eval/quality.py refuses in one sentence what it cannot score."""

import json
import shutil

import pytest
from conftest import copy_of, instruction_rows, load_script, pair_rows, read, write_jsonl
from judged_runs import SHORT, change_adapter, report


@pytest.fixture(scope="module")
def quality():
    return load_script("eval/quality.py")


@pytest.fixture
def run(finished, tmp_path):
    return copy_of(finished[0], tmp_path / "run")


def change_run(run, **recipe):
    record = read(run)
    record["recipe"] |= recipe
    (run / "run.json").write_text(json.dumps(record))


def test_another_data_set_is_judged_unless_it_was_trained_on(quality, run, rows, tmp_path):
    fresh = [
        row | {"instruction": f"Say {i} backwards."} for i, row in enumerate(instruction_rows(40))
    ]
    other = write_jsonl(tmp_path / "fresh.jsonl", fresh)
    quality.main(["--run", str(run), "--dataset_name", str(other), *SHORT])
    assert report(run, "quality-fresh")["rows"] == 40
    with pytest.raises(
        SystemExit, match=r"\d+ of 200 rows .* ask what the run was trained or validated on"
    ) as caught:
        quality.main(["--run", str(run), "--dataset_name", str(rows), *SHORT])
    assert "\n" not in str(caught.value.code)


def spoil_status(run, tmp_path):
    record = read(run) | {"status": "interrupted", "reason": "signal 15 at step 3 of 6"}
    (run / "run.json").write_text(json.dumps(record))


def spoil_data(run, tmp_path):
    change_run(run, dataset_name=str(write_jsonl(tmp_path / "other.jsonl", instruction_rows(150))))


def spoil_splits(run, tmp_path):
    change_run(run, split_fractions=[0.5, 0.4, 0.1])


def spoil_template(run, tmp_path):
    path = run / "adapter" / "chat_template.jinja"
    path.write_text(path.read_text() + " ")


def change_template(run, **facts):
    record = read(run)
    record["template"] |= facts
    (run / "run.json").write_text(json.dumps(record))


def without_data(run, tmp_path):
    record = read(run)
    del record["data"]
    (run / "run.json").write_text(json.dumps(record))


BAD_RUNS = [
    (without_data, (), "run.json has no data.train.fingerprint, expected a text"),
    (
        lambda run, _: change_run(run, dataset_fraction="all"),
        (),
        'recipe.dataset_fraction is "all", expected a share above 0',
    ),
    (
        lambda run, _: change_run(run, dataset_fraction=float("nan")),
        (),
        "recipe.dataset_fraction is NaN, expected a share above 0",
    ),
    (
        lambda run, _: change_run(run, split_fractions=[1, 0]),
        (),
        "recipe.split_fractions is [1, 0], expected three shares from 0 to 1",
    ),
    (
        lambda run, _: change_run(run, truncation_mode="sideways"),
        (),
        'recipe.truncation_mode is "sideways", expected one of keep_start, keep_end',
    ),
    (
        lambda run, _: change_template(run, day="9999-99-99"),
        (),
        'template.day is "9999-99-99", expected a day such as',
    ),
    (spoil_status, (), "did not succeed (status interrupted: signal 15 at step 3 of 6)"),
    (spoil_data, (), "has changed since the run"),
    (spoil_splits, (), "the train split of"),
    (spoil_template, (), "is not the one that the run trained with"),
    (
        lambda run, _: change_run(run, model_name_or_path="data/gone"),
        (),
        "base model data/gone of the run cannot be",
    ),
    (
        lambda run, _: (run / "adapter" / "adapter_model.safetensors").unlink(),
        (),
        "does not load on",
    ),
    (
        lambda run, _: (run / "adapter" / "adapter_model.safetensors").write_bytes(b"torn"),
        (),
        "does not load on",
    ),
    (lambda run, _: shutil.rmtree(run), (), "is no run directory"),
    (lambda run, _: change_adapter(run, lambda n, t: t * float("nan")), (), "tuned model, row"),
    (lambda run, _: None, ("--max_new_tokens", "0"), "max_new_tokens must be at least 1"),
    (lambda run, _: None, ("--max_new_tokens", "500"), "no room for an answer"),
    (lambda run, _: None, ("--max_new_tokens", "5000"), "leaves the model no room for a prompt"),
    (lambda run, _: None, ("--bleu_tokenize", "13b"), "unknown to sacrebleu"),
    (lambda run, _: None, ("--samples", "-1"), "--samples must be 0 (all) or more"),
    (lambda run, _: None, ("--batch_size", "0"), "--batch_size at least 1"),
    (lambda run, _: None, ("--dataset_name", "nowhere.jsonl"), "data file nowhere.jsonl not found"),
]


@pytest.mark.parametrize(("spoil", "flags", "message"), BAD_RUNS)
def test_bad_input_is_one_sentence(quality, run, tmp_path, spoil, flags, message):
    spoil(run, tmp_path)
    with pytest.raises(SystemExit) as caught:
        quality.main(["--run", str(run), *flags])
    text = str(caught.value.code)
    assert text.startswith("error: ")
    assert message in text
    assert "\n" not in text
    assert not (run / "eval" / "quality.json").exists()


def test_pairs_are_sent_to_what_scores_them(quality, run, tmp_path):
    pairs = write_jsonl(tmp_path / "pairs.jsonl", pair_rows(3))
    with pytest.raises(SystemExit) as caught:
        quality.main(["--run", str(run), "--dataset_name", str(pairs), *SHORT])
    assert f"{pairs} holds preference pairs: score" in caught.value.code
    assert "eval/preferences.py" in caught.value.code and "train" not in caught.value.code
