"""A study's tables go beside its runs; no mistake writes over results."""

import shutil

import pytest
from conftest import ROOT, load_script

from sftlab.comparison.output_folder import check_output_folder, claim_output_folder
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


@pytest.mark.parametrize("name", ["README.md", ".git", "checkpoint-10"])
def test_no_table_goes_into_a_folder_of_another_program(name, tmp_path):
    out, runs = tmp_path / "out", tmp_path / "runs"
    out.mkdir()
    (out / name).mkdir() if "." not in name[1:] else (out / name).write_text("mine")
    with pytest.raises(ValueError, match=rf"has no study.md, but {name}.*empty or not there"):
        check_output(out, runs)
    with pytest.raises(ValueError, match=rf"has no report.md, but {name}"):
        check_output_folder(out, "report.md", "# Runs")


def test_a_study_s_tables_go_beside_the_folders_of_its_runs(tmp_path):
    (tmp_path / "cell-1").mkdir()
    check_output(tmp_path, tmp_path)
    (tmp_path / ".git").mkdir()
    with pytest.raises(ValueError, match=r"has no study.md, but .git/"):
        check_output(tmp_path, tmp_path)


def test_a_report_replaces_a_report_alone(tmp_path):
    claim_output_folder(tmp_path / "out", "report.md", "# Runs\n")
    check_output_folder(tmp_path / "out", "report.md", "# Runs")
    (tmp_path / "out" / "report.md").write_text("# My own report\n")
    with pytest.raises(ValueError, match="was not written by this program"):
        check_output_folder(tmp_path / "out", "report.md", "# Runs")
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(ValueError, match="is a link to nothing"):
        check_output_folder(tmp_path / "link", "report.md", "# Runs")
