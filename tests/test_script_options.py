"""Options are spelt with hyphens or underscores, in every script."""

import re

import pytest
from conftest import ROOT

from sftlab.script_options import Options

SCRIPTS = ("recipes/study.py", "recipes/plan.py", "recipes/doctor.py")


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


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_reads_its_options_so(script):
    text = (ROOT / script).read_text(encoding="utf-8")
    assert "Options(" in text and not re.search(r"argparse\.ArgumentParser\(", text)
