"""Options are spelt with hyphens or underscores, in every script."""

import pytest
from conftest import ROOT, load_script

from sftlab.script_options import Options, server_address


@pytest.fixture
def parser():
    found = Options()
    found.add_argument("study")
    found.add_argument("--at_once", type=int, default=1)
    found.add_argument("--dry-run", action="store_true")
    return found


@pytest.mark.parametrize("option", ["--at_once=3", "--at-once=3", "--at-once 3", "--at_once 3"])
def test_an_option_takes_both_spellings(parser, option):
    assert parser.parse_args(["a-b_c", *option.split()]).at_once == 3


def test_a_field_is_left_over_with_underscores_and_its_value_as_it_stands(parser):
    words = ["a", "--dry_run", "--output-dir", "runs/my-run", "--run-name=a-b"]
    found, rest = parser.parse_known_args(words)
    assert found.dry_run and rest == ["--output_dir", "runs/my-run", "--run_name=a-b"]


def test_an_abbreviation_is_not_guessed(parser):
    assert parser.parse_known_args(["a", "--at=3"])[1] == ["--at=3"]


def test_a_misspelt_option_is_told_the_near_one(parser, capsys):
    with pytest.raises(SystemExit) as refused:
        parser.parse_args(["a", "--at-onec", "3"])
    assert refused.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.endswith("error: unknown option --at_onec; did you mean --at_once?")


def test_every_script_reads_its_options_so():
    folders = ("recipes", "eval", "app", "slurm", "benchmarks", "sftlab")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    own = [path.name for path in files if "= argparse.ArgumentParser(" in path.read_text()]
    assert not own, "these scripts parse their options themselves"


def test_a_value_of_a_megabyte_is_not_said_whole(parser, capsys):
    with pytest.raises(SystemExit) as stopped:
        parser.parse_args(["a", "--at_once", "x" * 10**6])
    said = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2
    assert "argument --at_once: invalid int value: 'xxx" in said and len(said) < 1000


SERVED = (["--server_models", "a", "b"], ["--server_requests", "3"], ["--server-timeout=5"])
MERGED = ["--to", "merged", "--out", "x"]


@pytest.mark.parametrize(
    ("script", "given", "other"),
    [
        *(("eval/quality.py", flags, "--server") for flags in SERVED),
        ("eval/quality.py", ["--dataset_split", "test"], "--dataset_name"),
        ("eval/alpaca.py", SERVED[0], "--server"),
        ("eval/alpaca.py", ["--judge_timeout", "5"], "--judge_url"),
        ("eval/mt_bench.py", SERVED[1], "--server"),
        ("eval/harness.py", ["--tasks", "x", *SERVED[2]], "--server"),
        ("eval/harness.py", ["--server_likelihoods", "--tasks", "x"], "--server"),
        ("recipes/export.py", ["--gguf_type", "f16", *MERGED], "--to gguf"),
        ("recipes/export.py", ["--private", *MERGED], "--push"),
        ("recipes/export.py", ["--server-model", "base", *MERGED], "--verify_server"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(script, given, other, capsys):
    with pytest.raises(SystemExit) as refused:
        load_script(script).main(["--run", "runs/none", *given])
    said = capsys.readouterr().err.splitlines()[-1]
    assert refused.value.code == 2
    option = next(word for word in given if word not in ("--tasks", "x")).partition("=")[0]
    assert f"{option.replace('-', '_').replace('__', '--', 1)} does nothing without {other}" in said


def test_an_option_with_the_one_that_it_belongs_to_is_read(parser):
    parser.add_argument("--kind")
    parser.needs("--at_once", "--kind", "many")
    parser.needs("--kind", "--dry-run")
    given = ["a", "--kind", "many", "--at-once", "3", "--dry-run"]
    assert parser.parse_args(given).at_once == 3
    with pytest.raises(SystemExit):
        parser.parse_args(given[:-1])
    with pytest.raises(SystemExit):
        parser.parse_args(["a", "--kind", "one", "--at-once", "3", "--dry-run"])


@pytest.mark.parametrize("address", ["127.0.0.1", "localhost:8000/v1", "http:///v1", "http://a:b"])
@pytest.mark.parametrize(
    ("script", "option"),
    [("eval/quality.py", "--server"), ("recipes/export.py", "--verify_server")],
)
def test_what_is_no_address_is_refused_at_once(script, option, address, capsys):
    with pytest.raises(SystemExit) as refused:
        load_script(script).main(["--run", "runs/none", option, address])
    said = capsys.readouterr().err.splitlines()[-1]
    assert refused.value.code == 2
    assert f"{option}: {address} is no address of a server: write one such as http://127" in said
    assert server_address("https://host/v1") == "https://host/v1"
