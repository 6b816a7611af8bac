"""eval/harness.py refuses in one sentence what it cannot evaluate."""

import json

import pytest
from conftest import copy_of, load_script, read, write_jsonl
from harness_files import (
    TASKS,
    named,
    sample,
    write_files,
)
from lm_eval.tasks import TaskManager


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """Handmade files with the hub's columns, by the names that --files gives them."""
    return write_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def harness():
    return load_script("eval/harness.py")


@pytest.fixture
def run(finished, tmp_path):
    return copy_of(finished[0], tmp_path / "run")


def test_what_was_not_asked_alike_is_not_paired(harness):
    base = [sample(0), sample(1), sample(1, filter="strict")]
    records = harness.pair("task", base, list(reversed(base)))
    assert [(record["doc_id"], record["filter"]) for record in records] == [
        (0, "none"),
        (1, "none"),
        (1, "strict"),
    ]
    for tuned in (
        base[:2],
        [sample(2), *base[1:]],
        [sample(0, prompt_hash="x"), *base[1:]],
        [sample(0, doc_hash="x"), *base[1:]],
        [*base, sample(0)],
        [sample(0, target_hash="x"), *base[1:]],
    ):
        with pytest.raises(
            ValueError, match="task: base and tuned were not asked the same documents"
        ):
            harness.pair("task", base, tuned)


def test_a_figure_that_is_not_its_documents_mean_is_refused(harness):
    records = harness.pair("task", [sample(0), sample(1)], [sample(0, acc=0.0), sample(1)])

    def compared(base, tuned):
        figures = {
            side: {"task": {"acc,none": x, "other,none": 7}}
            for side, x in (("base", base), ("tuned", tuned))
        }
        return harness.compare_items("task", records, figures, {"acc"})

    assert list(compared(1.0, 0.5)) == ["acc,none"]
    assert compared(1.0, 0.5)["acc,none"]["tuned"]["value"] == 0.5
    for wrong in ((1.0, 0.6), (0.9, 0.5), (1.0, float("nan"))):
        with pytest.raises(ValueError, match="not the means of the documents"):
            compared(*wrong)


BAD_INPUT = [
    ("arc_easy_local", ["arc_easy_test"], ["--limit", "0"], "--limit is 0: expected 1 or more"),
    ("arc_easy_local", ["arc_easy_test"], ["--num_fewshot", "-1"], "--num_fewshot is -1"),
    ("arc_easy_local", ["arc_easy_test"], ["--batch_size", "0"], "--batch_size is 0"),
    ("arc_easy_local", [], [], "give --files arc_easy_test=FILE"),
    ("arc_easy_local", [], ["--files", "data.jsonl"], "--files data.jsonl: expected NAME=FILE"),
    (
        "arc_easy_local",
        [],
        ["--files", "arc_easy_test=nowhere.jsonl"],
        "data file nowhere.jsonl not found",
    ),
    (
        "arc_easy_local",
        ["arc_easy_test", "gsm8k_test"],
        [],
        "--files gsm8k_test: these tasks read arc_easy_test, arc_easy_tr",
    ),
    (
        "arc_easy_local",
        ["arc_easy_test"],
        ["--num_fewshot", "2"],
        "give --files arc_easy_train=FILE",
    ),
    ("gsm8k_local", ["gsm8k_test"], [], "cannot be asked with 5 examples: no file of examples"),
    (
        "gsm8k_local",
        ["gsm8k_test", "gsm8k_train"],
        ["--num_fewshot", "50"],
        "cannot be asked with 50 examples",
    ),
    (
        "mmlu_local",
        ["mmlu_test", "mmlu_dev"],
        ["--num_fewshot", "5"],
        "3 examples of subject high_school_physics",
    ),
    (
        "truthfulqa_mc2_local",
        ["truthfulqa_validation"],
        ["--num_fewshot", "5"],
        "fixes its examples itself",
    ),
    ("gsm8k_locl", [], [], "lm-eval has no task gsm8k_locl: did you mean gsm8k_local?"),
    ("gsm8k", [], [], "gsm8k_local reads files (--files)"),
]


@pytest.fixture(scope="module")
def all_tasks():
    return TaskManager(include_path=str(TASKS))


@pytest.mark.parametrize(("task", "names", "flags", "message"), BAD_INPUT)
def test_bad_input_is_one_sentence_before_the_model(
    harness, run, files, all_tasks, monkeypatch, task, names, flags, message
):
    def manager(include_defaults=True, **kwargs):
        return all_tasks if include_defaults else TaskManager(include_defaults=False, **kwargs)

    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("sftlab.evaluation.harness_tasks.TaskManager", manager)
    monkeypatch.setattr(harness, "load_pair", lambda *a: pytest.fail("the model was loaded"))
    given = named(files, *names) if names else []
    with pytest.raises(SystemExit) as caught:
        harness.main(["--run", str(run), "--tasks", task, *given, *flags])
    text = str(caught.value.code)
    assert text.startswith("error: ")
    assert message in text
    assert "\n" not in text


def test_files_with_other_columns_are_refused(harness, run, files, tmp_path):
    flat = write_jsonl(
        tmp_path / "flat.jsonl", [{"question": "?", "choices": "A or B", "answerKey": "A"}]
    )
    csv = tmp_path / "mmlu.csv"
    csv.write_text("question,subject,choices,answer\nOne?,law,\"['a', 'b', 'c', 'd']\",1\n")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "broken.jsonl").write_text("{")
    for task, name, path, message in (
        (
            "arc_easy_local",
            "arc_easy_test",
            flat,
            "column choices.text is missing; it has question, choices, answerKey",
        ),
        ("mmlu_local", "mmlu_test", csv, "column choices is str, expected list"),
        ("gsm8k_local", "gsm8k_test", files["arc_easy_test"], "column answer is missing"),
        (
            "gsm8k_local",
            "gsm8k_test",
            tmp_path / "empty.jsonl",
            "empty.jsonl cannot be read: it has no rows",
        ),
        ("gsm8k_local", "gsm8k_test", tmp_path / "broken.jsonl", "broken.jsonl cannot be read"),
    ):
        with pytest.raises(SystemExit) as caught:
            harness.main(["--run", str(run), "--tasks", task, "--files", f"{name}={path}"])
        assert message in str(caught.value.code)


def test_a_run_that_cannot_be_evaluated_is_refused(harness, run, files):
    record = read(run)
    command = ["--run", str(run), "--tasks", "arc_easy_local", *named(files, "arc_easy_test")]
    gone = record | {"recipe": record["recipe"] | {"model_name_or_path": str(run / "gone")}}
    for change, message in (
        (record | {"status": "failed"}, "did not succeed"),
        (gone, "gone of the run cannot be loaded"),
    ):
        (run / "run.json").write_text(json.dumps(change))
        with pytest.raises(SystemExit, match=message):
            harness.main(command)
