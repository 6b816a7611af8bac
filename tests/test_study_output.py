"""A study's tables go beside its runs; no mistake writes over results."""

import shutil

import pytest
from conftest import ROOT, load_script

from sftlab.comparison.study_output import RUNS_LINE, check_not_emptied, check_output

SCRIPT = load_script("recipes/study.py")
STUDY = ROOT / "recipes" / "studies" / "lora_rank.yaml"
DEMO = ["--recipe", "recipes/demo/attn_r16.yaml", "--launch", "cpu"]


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """The working folder is an empty one, with a committed result in it."""
    for name in ("recipes", "accelerate_configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "results" / "precision", tmp_path / "results" / "lora_rank")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(SCRIPT, "train", lambda *a, **k: pytest.fail("something was trained"))
    return tmp_path


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_is_not_trained_is_written_beside_the_runs_alone(elsewhere):
    before = contents(elsewhere / "results")
    with pytest.raises(SystemExit, match="no result"):
        SCRIPT.main([str(STUDY), *DEMO, "--no_train"])
    assert contents(elsewhere / "results") == before
    page = (elsewhere / "runs" / "study-lora_rank" / "study.md").read_text(encoding="utf-8")
    assert f"{RUNS_LINE}runs/study-lora_rank" in page


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--max_stepz", "3"], "unknown field 'max_stepz'; did you mean 'max_steps'"),
        (["--no_trian"], "unknown field 'no_trian'"),
        (["--cutoff_len=3"], "that is max_length here"),
        (["--hub_model_id=a/b"], "hub_model_id is not used here"),
        (["--out", "results/lora_rank"], "is about runs elsewhere, and this study's are in"),
        (["--out", "results/lora_rank/study.md"], "is no folder"),
    ],
)
def test_a_mistake_trains_and_writes_nothing(elsewhere, words, said):
    before = contents(elsewhere)
    with pytest.raises(SystemExit, match=said):
        SCRIPT.main([str(STUDY), *DEMO, *words])
    assert contents(elsewhere) == before


def test_tables_with_results_are_not_replaced_by_tables_without(tmp_path):
    (tmp_path / "runs.csv").write_text("cell,status\na,succeeded\n")
    with pytest.raises(ValueError, match="no run has a result"):
        check_not_emptied(tmp_path, [{"status": "not run"}])
    check_not_emptied(tmp_path, [{"status": "succeeded"}])


def test_the_tables_of_the_same_runs_are_replaced(tmp_path):
    (tmp_path / "study.md").write_text(f"# a\n{RUNS_LINE}runs/study-a\n")
    check_output(tmp_path, tmp_path.__class__("runs/study-a"))
    with pytest.raises(ValueError, match="is about the runs in runs/study-a"):
        check_output(tmp_path, tmp_path.__class__("runs/study-b"))
