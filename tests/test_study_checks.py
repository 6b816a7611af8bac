"""A study that its user cannot have meant is refused before anything is trained or printed."""

import pytest
import yaml
from conftest import ROOT
from small_studies import SCRIPT, TWO

RANK = str(ROOT / "recipes" / "studies" / "lora_rank.yaml")
STUDY = {
    "recipe": "recipes/demo/attn_r16.yaml",
    "launch": "cpu",
    "axis": ["lora_r"],
    "cells": TWO,
}


@pytest.fixture
def refused(tmp_path, monkeypatch):
    """Returns what a study is refused with; nothing may be trained."""
    monkeypatch.setattr(SCRIPT, "train", lambda *a, **k: pytest.fail("something was trained"))

    def start(study, *words):
        path = study
        if isinstance(study, dict):
            path = tmp_path / "small.yaml"
            text = yaml.safe_dump(STUDY | study, sort_keys=False)
            path.write_text(text, encoding="utf-8")
        with pytest.raises(SystemExit) as stopped:
            SCRIPT.main([str(path), "--runs", str(tmp_path / "runs"), *words])
        assert not (tmp_path / "runs").exists()
        return str(stopped.value)

    return start


@pytest.mark.parametrize("option", ["--difference", "--deviation"])
def test_a_question_of_power_is_not_the_start_of_a_study(refused, option):
    assert f"{option} belongs to --power" in refused(RANK, option, "2")


def test_a_dry_run_knows_the_fields(refused):
    said = refused(RANK, "--lerning_rate", "3", "--dry-run")
    assert "did you mean 'learning_rate'" in said
    cells = {"a": {"learning_rat": 1}, "b": {"learning_rat": 2}}
    said = refused({"axis": ["learning_rat"], "cells": cells}, "--dry-run")
    assert "small, a: " in said and "did you mean 'learning_rate'" in said


def test_what_every_cell_sets_itself_is_not_said_in_vain(refused, tmp_path, capsys):
    said = refused(RANK, "--lora_r", "3")
    assert "every cell sets lora_r itself: --lora_r would say nothing" in said
    launched = {name: {"launch": name} for name in ("cpu", "fp32")}
    said = refused({"axis": ["precision"], "cells": launched}, "--launch", "cpu")
    assert "--launch would say nothing" in said
    path = tmp_path / "some.yaml"
    some = {"cells": {"r2": {"lora_r": 2}, "as given": {}}, "axis": ["lora_r", "lora_scale"]}
    path.write_text(yaml.safe_dump(STUDY | some), encoding="utf-8")
    SCRIPT.main([str(path), "--dry-run", "--lora_r", "3"])
    assert "--lora_r=3" in capsys.readouterr().out
