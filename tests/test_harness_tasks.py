"""The local tasks ask and score as lm-eval's stock tasks do."""

import json
import shutil
from pathlib import Path

import lm_eval
import pytest
from conftest import ROOT, copy_of, load_script, write_jsonl
from harness_files import TASKS, entries, gsm8k_rows, named, write_files
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from lm_eval.utils import apply_template

STOCK = Path(lm_eval.__file__).parent / "tasks"


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
