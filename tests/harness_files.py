"""Benchmark files, records and entries for the tests of eval/harness.py."""

import json

import lm_eval
import pytest
from conftest import ROOT, write_jsonl
from lm_eval.tasks import TaskManager

TASKS = ROOT / "eval" / "tasks"
LABELS = "ABCD"


def arc_rows(count, first=0):
    return [
        {
            "question": f"What comes after {i}?",
            "choices": {
                "text": [str(i + 1), f"{i} again", "nothing at all", str(i - 1)],
                "label": list(LABELS),
            },
            "answerKey": LABELS[i % 4],
        }
        for i in range(first, first + count)
    ]


def gsm8k_rows(count, first=0):
    return [
        {"question": f"What is {i} and {i}?", "answer": f"It is {2 * i}.\n#### {2 * i}"}
        for i in range(first, first + count)
    ]


def mmlu_rows(per_subject):
    subjects = ("high_school_physics", "us_foreign_policy")
    return [
        {
            "question": f" {subject} {i}? ",
            "subject": subject,
            "choices": [f"{i}{c}" for c in "abcd"],
            "answer": i % 4,
        }
        for i in range(per_subject)
        for subject in subjects
    ]


def truthful_rows(count):
    return [
        {
            "question": f"Is {i} odd?",
            "mc2_targets": {
                "choices": ["Yes.", "No.", "It is."],
                "labels": [i % 2, 1 - i % 2, i % 2],
            },
        }
        for i in range(count)
    ]


def write_files(folder):
    """Handmade files with the hub's columns, by the names that --files gives them."""
    rows = {
        "arc_challenge_test": arc_rows(32),
        "arc_challenge_train": arc_rows(6, 100),
        "arc_easy_test": arc_rows(9, 50),
        "gsm8k_test": gsm8k_rows(12),
        "gsm8k_train": gsm8k_rows(30, 20),
        "truthfulqa_validation": truthful_rows(5),
        "mmlu_test": mmlu_rows(4),
        "mmlu_dev": mmlu_rows(3),
    }
    return {
        name: str(write_jsonl(folder / f"{name}.jsonl", content)) for name, content in rows.items()
    }


def named(files, *names):
    return ["--files", *(f"{name}={files[name]}" for name in names)]


def entries(run):
    return {
        entry["task"]: entry
        for entry in json.loads((run / "eval" / "harness.json").read_text())["entries"]
    }


def sample(doc_id, **change):
    own = {
        "doc_id": doc_id,
        "filter": "none",
        "doc_hash": f"d{doc_id}",
        "prompt_hash": f"p{doc_id}",
        "target_hash": "t",
        "target": "0",
        "metrics": ["acc"],
        "acc": 1.0,
        "resps": [[(-1.0, True)]],
        "filtered_resps": [(-1.0, True)],
    }
    return own | change


def harness_records(run, entry):
    return [
        json.loads(line)
        for line in (run / "eval" / "harness" / entry["records"]).read_text().splitlines()
    ]


def by_hand(base, run, side, files, task, settings):
    """What lm-eval gives when it loads the models itself, in this process."""
    model = f"pretrained={base},tokenizer={run / 'adapter'},dtype=float32"
    model += f",peft={run / 'adapter'}" if side == "tuned" else ""
    manager = TaskManager(include_path=str(TASKS), include_defaults=False, metadata=files)
    return lm_eval.simple_evaluate(
        model="hf",
        model_args=model,
        tasks=[task],
        task_manager=manager,
        batch_size=8,
        device="cpu",
        **settings,
    )


def assert_same(entry, side, records, results, samples):
    """An entry and its records against lm-eval's results and samples of one model."""
    for key, metric in entry["metrics"].items():
        assert metric[side]["value"] == results[key]
    theirs = {(sample["doc_id"], sample["filter"]): sample for sample in samples}
    assert len(theirs) == len(records) == len(samples)
    for record in records:
        sample = theirs[record["doc_id"], record["filter"]]
        assert record["prompt_hash"] == sample["prompt_hash"]
        if "answer" in record[side]:
            assert record[side]["answer"] == sample["resps"][0][0]
        else:
            ours = record[side]["log_likelihoods"]
            assert ours == pytest.approx(
                [float(response[0][0]) for response in sample["resps"]], abs=1e-4
            )
