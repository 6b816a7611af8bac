"""A command that is printed can be pasted into a shell, whatever its paths are."""

import argparse
import shlex
import shutil
from collections import defaultdict
from pathlib import Path

import pytest
from conftest import arguments, load_script

from sftlab.data.column_names import as_words


def words_behind(said, start):
    [line] = [line for line in said.splitlines() if start in line]
    return shlex.split(line.partition(start)[2])


def test_a_training_names_what_comes_next(fields, trained_here, tmp_path):
    run = tmp_path / "my runs" / "it's one"
    done = trained_here({**fields, "output_dir": str(run), "max_steps": "1"})
    assert words_behind(done.stdout, "Next: python eval/quality.py ") == ["--run", str(run)]


def test_a_server_is_verified_by_the_printed_command(run, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "my run"
    run.rename(folder)
    monkeypatch.setenv("VLLM_API_KEY", "of a test")
    script = load_script("app/serve.py")
    script.main(["--run", str(folder), "--vllm", shutil.which("true")])
    found = words_behind(capsys.readouterr().out, "once it has loaded: python recipes/export.py ")
    assert found == ["--run", str(folder), "--verify_server", "http://127.0.0.1:8000/v1"]


def test_sampled_pairs_are_named_for_preference_tuning():
    options = argparse.Namespace(run=Path("my run"), out=Path("my pairs"), max_new_tokens=8)
    [*_, line] = load_script("recipes/sample_pairs.py").lines_of(options, defaultdict(lambda: 1))
    said = line.replace(" (docs/preference_tuning.md)", "")
    expected = ["--adapter_name_or_path", "my run", "--dataset_name", "my pairs"]
    assert words_behind(said, "Next: recipes/dpo.py with ") == expected


@pytest.mark.usefixtures("handlers")
def test_a_tokenized_data_set_is_named_for_training(fields, tmp_path, capsys):
    out = tmp_path / "my tokens"
    given = ["--out", str(out), "--workers", "1", *arguments(fields)]
    load_script("slurm/tokenize_dataset.py").main(given)
    said = capsys.readouterr().out
    assert words_behind(said, "Next: sft.py with ") == ["--dataset_name", str(out)]


def test_columns_are_words_of_a_shell():
    columns = {"question": "the $1 question", "answer": "output"}
    assert shlex.split(as_words(columns)) == ["question=the $1 question", "answer=output"]
