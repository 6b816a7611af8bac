"""eval/harness.py: lm-eval's own figures for both models, paired by document, and tasks that read
local files.
"""

import json
import shutil
import signal
import sqlite3
import subprocess
import time
from pathlib import Path

import fork_server
import lm_eval
import pytest
from conftest import ROOT, SHARED, copy_of, load_script, needs_shared, read, write_jsonl
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from lm_eval.utils import apply_template
from safetensors.torch import load_file, save_file

TASKS = ROOT / "eval" / "tasks"
STOCK = Path(lm_eval.__file__).parent / "tasks"
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


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """Handmade files with the hub's columns, by the names that --files gives them."""
    folder = tmp_path_factory.mktemp("files")
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


@pytest.fixture(scope="module")
def harness():
    return load_script("eval/harness.py")


@pytest.fixture
def run(finished, tmp_path):
    return copy_of(finished[0], tmp_path / "run")


def named(files, *names):
    return ["--files", *(f"{name}={files[name]}" for name in names)]


def entries(run):
    return {
        entry["task"]: entry
        for entry in json.loads((run / "eval" / "harness.json").read_text())["entries"]
    }


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


def test_the_figures_are_those_of_the_lm_eval_command(harness, run, base, files, tmp_path):
    tasks, names = (
        "arc_challenge_local,gsm8k_local",
        ("arc_challenge_test", "arc_challenge_train", "gsm8k_test", "gsm8k_train"),
    )
    harness.main(
        [
            "--run",
            str(run),
            "--tasks",
            tasks,
            *named(files, *names),
            "--num_fewshot",
            "1",
            "--batch_size",
            "8",
        ]
    )
    command = [
        fork_server.python(),
        "-m",
        "lm_eval",
        "run",
        "--model",
        "hf",
        "--batch_size",
        "8",
        "--device",
        "cpu",
        *(
            "--model_args",
            f"pretrained={base},peft={run / 'adapter'},tokenizer={run / 'adapter'},dtype=float32",
        ),
        *(
            "--include_path",
            str(TASKS),
            "--tasks",
            tasks,
            "--num_fewshot",
            "1",
            "--apply_chat_template",
        ),
        *("--metadata", *(f"{name}={files[name]}" for name in names)),
        *("--log_samples", "--output_path", str(tmp_path / "out")),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(next((tmp_path / "out").rglob("results_*.json")).read_text())["results"]
    for task, entry in entries(run).items():
        samples = next((tmp_path / "out").rglob(f"samples_{task}_*.jsonl")).read_text().splitlines()
        samples = [json.loads(line) for line in samples]
        assert_same(entry, "tuned", harness_records(run, entry), results[task], samples)
        records = harness_records(run, entry)
        assert any(record["base"] != record["tuned"] for record in records)


@pytest.mark.parametrize("template", [True, False])
def test_the_figures_are_those_of_lm_eval_for_either_model_and_template(
    harness, run, base, files, template
):
    names = ("arc_challenge_test", "arc_challenge_train")
    flags = [] if template else ["--no_chat_template"]
    harness.main(
        [
            "--run",
            str(run),
            "--tasks",
            "arc_challenge_local",
            *named(files, *names),
            "--batch_size",
            "8",
            *flags,
        ]
    )
    entry = entries(run)["arc_challenge_local"]
    records = harness_records(run, entry)
    for side in ("base", "tuned") if not template else ("base",):
        found = by_hand(
            base, run, side, files, "arc_challenge_local", {"apply_chat_template": template}
        )
        task = found["samples"]["arc_challenge_local"]
        assert_same(entry, side, records, found["results"]["arc_challenge_local"], task)
        assert ("### Response" in task[0]["arguments"][0][0]) == template


@needs_shared
def test_real_gsm8k_gives_lm_evals_figures(harness, run, base):
    real = {name: str(SHARED / f"{name}.jsonl") for name in ("gsm8k_test", "gsm8k_train")}
    settings = {"limit": 4, "num_fewshot": 1}
    flags = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    harness.main(
        [
            "--run",
            str(run),
            "--tasks",
            "gsm8k_local",
            *named(real, *real),
            "--batch_size",
            "8",
            *flags,
        ]
    )
    entry = entries(run)["gsm8k_local"]
    assert entry["main_metric"] == "exact_match,flexible-extract"
    found = by_hand(
        base, run, "tuned", real, "gsm8k_local", settings | {"apply_chat_template": True}
    )
    records = harness_records(run, entry)
    assert_same(
        entry, "tuned", records, found["results"]["gsm8k_local"], found["samples"]["gsm8k_local"]
    )
    assert len(records) == 8
    assert entry["documents"] == 4


def test_an_adapter_that_changes_nothing_gives_differences_of_zero(harness, run, files, capsys):
    weights = load_file(run / "adapter" / "adapter_model.safetensors")
    zeroed = {name: value.zero_() if "lora_B" in name else value for name, value in weights.items()}
    save_file(zeroed, run / "adapter" / "adapter_model.safetensors")
    tasks = "truthfulqa_mc2_local,mmlu_local,arc_easy_local"
    names = ("truthfulqa_validation", "mmlu_test", "arc_easy_test")
    harness.main(["--run", str(run), "--tasks", tasks, *named(files, *names)])
    found = entries(run)
    assert list(found) == tasks.split(",")
    for entry in found.values():
        for metric in entry["metrics"].values():
            assert metric["difference"]["value"] == 0
            assert metric["p_value"] == 1
        assert all(record["base"] == record["tuned"] for record in harness_records(run, entry))
    assert found["truthfulqa_mc2_local"]["metrics"]["acc,none"]["statistics"] == "paired bootstrap"
    assert found["mmlu_local"]["metrics"]["acc,none"]["statistics"].endswith("exact McNemar")
    assert found["arc_easy_local"]["main_metric"] == "acc_norm,none"
    assert [e["metrics"][e["main_metric"]]["p_holm"] for e in found.values()] == [1, 1, 1]
    printed = capsys.readouterr().out
    assert "mmlu_local: fewer than 30 documents" in printed
    assert "corrected for 3 task(s)" in printed


def test_settings_have_entries_of_their_own_and_a_repetition_replaces_its_entry(
    harness, run, files
):
    command = [
        "--run",
        str(run),
        "--tasks",
        "arc_challenge_local",
        *named(files, "arc_challenge_test"),
    ]
    for flags in ([], ["--limit", "4"], ["--no_chat_template"], ["--limit", "4"]):
        harness.main([*command, *flags])
    found = json.loads((run / "eval" / "harness.json").read_text())["entries"]
    assert [(entry["chat_template"], entry["limit"], entry["documents"]) for entry in found] == [
        (True, None, 32),
        (False, None, 32),
        (True, 4, 4),
    ]
    assert sorted(path.name for path in (run / "eval" / "harness").iterdir()) == sorted(
        e["records"] for e in found
    )
    assert (
        found[0]["adapter_hash"]
        and found[0]["versions"]["lm_eval"]
        and found[0]["hardware"]
        and found[0]["seconds"]
    )


def test_a_group_pools_the_documents_of_its_subtasks(harness, run, files, tmp_path, monkeypatch):
    folder = shutil.copytree(
        TASKS, tmp_path / "tasks", ignore=shutil.ignore_patterns("__pycache__")
    )
    group = {"group": "arcs", "task": ["arc_challenge_local", "arc_easy_local"]}
    group["aggregate_metric_list"] = [{"metric": "acc", "weight_by_size": True}]
    (folder / "arcs.yaml").write_text(json.dumps(group))
    group["aggregate_metric_list"][0]["weight_by_size"] = False
    (folder / "even.yaml").write_text(json.dumps(group | {"group": "even"}))
    monkeypatch.setattr(harness, "LOCAL_TASKS", str(folder))
    command = ["--run", str(run), *named(files, "arc_challenge_test", "arc_easy_test"), "--tasks"]
    harness.main([*command, "arcs"])
    (entry,) = entries(run).values()
    assert entry["documents"] == 32 + 9
    parts = entry["subtasks"]
    for side in ("base", "tuned"):
        right = sum(
            n * parts[t]["acc,none"][side]["value"]
            for t, n in (("arc_challenge_local", 32), ("arc_easy_local", 9))
        )
        assert entry["metrics"]["acc,none"][side]["value"] == pytest.approx(right / 41)
    assert set(parts["arc_easy_local"]) == {"acc,none", "acc_norm,none"}
    with pytest.raises(SystemExit, match="even weighs subtasks equally"):
        harness.main([*command, "even"])


def test_prompts_beyond_the_window_are_counted_and_said(harness, run, tmp_path, capsys, caplog):
    rows = gsm8k_rows(3) + [{"question": "long " * 100, "answer": "#### 1"}]
    path = write_jsonl(tmp_path / "long.jsonl", rows)
    harness.main(
        [
            "--run",
            str(run),
            "--tasks",
            "gsm8k_local",
            "--files",
            f"gsm8k_test={path}",
            "--num_fewshot",
            "0",
        ]
    )
    assert entries(run)["gsm8k_local"]["cut_prompts"] == 1
    assert "1 prompts do not fit the model's 512 tokens" in capsys.readouterr().out
    assert (
        "as fewshot_docs" not in caplog.text
    )  # lm-eval would draw examples from the documents under test


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


STOCK_TASKS = [
    ("gsm8k_local", "gsm8k/gsm8k.yaml", {"test": "gsm8k_test", "train": "gsm8k_train"}, 2),
    (
        "arc_challenge_local",
        "arc/arc_challenge.yaml",
        {"test": "arc_easy_test", "train": "arc_challenge_train"},
        2,
    ),
    (
        "arc_easy_local",
        "arc/arc_easy.yaml",
        {"test": "arc_easy_test", "train": "arc_challenge_train"},
        0,
    ),
    (
        "truthfulqa_mc2_local",
        "truthfulqa/truthfulqa_mc2.yaml",
        {"validation": "truthfulqa_validation"},
        0,
    ),
    (
        "mmlu_local",
        "mmlu/default/mmlu_high_school_physics.yaml",
        {"test": "mmlu_test", "dev": "mmlu_dev"},
        2,
    ),
]


@pytest.mark.parametrize(("name", "stock", "splits", "shots"), STOCK_TASKS)
def test_local_tasks_ask_and_score_as_the_stock_tasks_do(
    base, files, tmp_path, tokenizer, name, stock, splits, shots
):
    chosen = {split: files[file] for split, file in splits.items()}
    if name == "mmlu_local":
        for split in splits:
            rows = map(json.loads, Path(chosen[split]).read_text().splitlines())
            kept = [row for row in rows if row["subject"] == "high_school_physics"]
            chosen[split] = str(write_jsonl(tmp_path / f"{split}.jsonl", kept))
    config = load_yaml(STOCK / stock)
    config |= {
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": chosen},
        "tag": None,
    }
    if name.startswith("arc"):
        config["validation_split"] = None
    theirs = ConfigurableTask(config=config)
    given = files | {
        "arc_challenge_test": files["arc_easy_test"],
        "arc_easy_train": files["arc_challenge_train"],
    }
    manager = TaskManager(include_path=str(TASKS), include_defaults=False, metadata=given)
    ours = manager.load([name])["tasks"][name]
    assert ours.VERSION == theirs.VERSION
    tokenizer.chat_template = (ROOT / "recipes" / "templates" / "instruction.jinja").read_text()
    lm = HFLM(pretrained=str(base), tokenizer=tokenizer, device="cpu")
    docs = [
        doc
        for doc in ours.eval_docs
        if doc.get("subject", "high_school_physics") == "high_school_physics"
    ]
    assert docs == list(theirs.eval_docs)
    for count in {0, shots}:
        for template in (None, lm.apply_chat_template):
            requests = []
            for task in (ours, theirs):
                task.set_fewshot_seed(1234)
                kwargs = {"apply_chat_template": bool(template), "chat_template": template}
                contexts = [
                    task.fewshot_context(
                        doc, num_fewshot=count, fewshot_as_multiturn=True, **kwargs
                    )
                    for doc in docs
                ]
                made = [
                    task.construct_requests(doc, ctx, **kwargs)
                    for doc, ctx in zip(docs, contexts, strict=True)
                ]
                requests.append(
                    [[one.args for one in (m if isinstance(m, list) else [m])] for m in made]
                )
            assert requests[0] == requests[1]
    answers = (
        [(-float(i), False) for i in range(4)]
        if ours.OUTPUT_TYPE == "multiple_choice"
        else ["#### 0"]
    )
    for doc in docs:
        given = (
            answers[: len(ours.doc_to_choice(doc))]
            if ours.OUTPUT_TYPE == "multiple_choice"
            else answers
        )
        assert ours.process_results(doc, given) == theirs.process_results(doc, given)


def test_the_description_of_every_mmlu_subject_is_the_stock_one():
    description = load_yaml(TASKS / "mmlu_local.yaml", resolve_func=False)["description"]
    stock = [load_yaml(path) for path in (STOCK / "mmlu" / "default").glob("mmlu_*.yaml")]
    assert len(stock) == 57
    for task in stock:
        assert apply_template(description, {"subject": task["dataset_name"]}) == task["description"]


def answers_kept(run):
    total = 0
    for path in (run / "eval" / "harness").glob(".unfinished-*.db"):
        connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
        if connection.execute("select 1 from sqlite_master where name = 'unnamed'").fetchone():
            total += connection.execute("select count(*) from unnamed").fetchone()[0]
        connection.close()
    return total


def test_a_killed_evaluation_continues_where_it_stopped(harness, finished, files, tmp_path):
    killed, whole = (copy_of(finished[0], tmp_path / name) for name in ("killed", "whole"))
    flags = [
        "--tasks",
        "gsm8k_local",
        *named(files, "gsm8k_test"),
        "--num_fewshot",
        "0",
        "--batch_size",
        "3",
    ]
    process = subprocess.Popen(
        [fork_server.python(), str(ROOT / "eval" / "harness.py"), "--run", str(killed), *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=ROOT,
    )
    while answers_kept(killed) < 6:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    kept = answers_kept(killed)
    assert 6 <= kept < 24
    assert not (killed / "eval" / "harness.json").exists()
    for run in (killed, whole):
        harness.main(["--run", str(run), *flags])
        assert not list((run / "eval" / "harness").glob(".unfinished-*"))
    continued, undisturbed = entries(killed)["gsm8k_local"], entries(whole)["gsm8k_local"]
    assert sum(continued["answers_reused"].values()) == kept
    assert sum(undisturbed["answers_reused"].values()) == 0
    assert continued["metrics"] == undisturbed["metrics"]
    assert harness_records(killed, continued) == harness_records(whole, undisturbed)


def test_answers_of_another_adapter_are_not_reused(harness, run, files, monkeypatch):
    command = ["--run", str(run), "--tasks", "arc_easy_local", *named(files, "arc_easy_test")]
    monkeypatch.setattr(harness, "pair", lambda *a: (_ for _ in ()).throw(ValueError("stopped")))
    with pytest.raises(SystemExit, match="stopped"):
        harness.main(command)
    assert answers_kept(run) == 2 * 36
    monkeypatch.undo()
    weights = load_file(run / "adapter" / "adapter_model.safetensors")
    save_file(
        {name: value * 3 for name, value in weights.items()},
        run / "adapter" / "adapter_model.safetensors",
    )
    harness.main(command)
    assert entries(run)["arc_easy_local"]["answers_reused"] == {"base": 0, "tuned": 0}
