"""A study that its user cannot have meant is refused before anything is trained or printed."""

import pytest
import yaml
from conftest import ROOT
from small_studies import SCRIPT, TWO

from sftlab.comparison.study_checks import check_recipes
from sftlab.comparison.study_file import load

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


@pytest.mark.parametrize(
    "change",
    [
        {"cells": {"a": {"lora_r": 4}, "b": {"lora_r": 4}}},
        {"cells": {"a": {"lora_r": 16}, "b": {}}},
        {"cells": {"a": {"launch": "cpu"}, "b": {"processes": 1}}, "axis": ["world_size"]},
    ],
)
def test_one_training_is_not_compared_with_itself(refused, change):
    assert "the cells a and b are the same training" in refused(change)


@pytest.mark.parametrize(
    ("axis", "bad", "said"),
    [
        ("init_lora_weights", "corda", "init_lora_weights corda is not possible here"),
        ("loraplus_lr_ratio", 0, "loraplus_lr_ratio is 0.0: it must be positive"),
        ("lora_dropout", "much", "lora_dropout"),
    ],
)
def test_a_value_that_sft_py_refuses_stops_the_study_before_its_first_training(
    refused, axis, bad, said
):
    refusal = refused({"axis": [axis], "cells": {"plain": {}, "bad": {axis: bad}}})
    assert "small, bad, 1: " in refusal and said in refusal


def test_a_tuned_value_and_a_seed_are_checked_with_their_cell(refused):
    tuned = {"tune": {"learning_rate": [-1, 0.1]}}
    assert "r4, 1, learning_rate -1: learning_rate" in refused(tuned)
    assert "seed" in refused({"seeds": [1, -2]})


def test_what_this_machine_lacks_is_left_to_the_training(tmp_path):
    cells = {"fp8": {"launch": "fp8"}, "many": {"processes": 64}, "TF32": {"tf32": True}}
    path = tmp_path / "machine.yaml"
    content = STUDY | {"launch": "ddp", "axis": ["precision", "world_size", "tf32"]}
    content |= {"cells": cells, "fields": {"global_batch_size": 64, "bf16_full_eval": True}}
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    check_recipes(load(path, tmp_path / "runs", {}))


def test_an_axis_that_no_cell_sets_is_left_out(refused):
    assert "no cell sets use_dora: leave it out of axis" in refused({"axis": ["use_dora"]})
    assert "error: axis lora_rank: expected a field" in refused({"axis": ["lora_rank"]})


def test_the_advice_for_confounded_cells_is_an_axis_that_the_file_may_have(refused, tmp_path):
    cells = {"a": {"lora_r": 4, "lora_alpha": 8}, "b": {"lora_r": 8, "lora_alpha": 8}}
    said = refused({"cells": cells})
    assert "Name what is compared in the study file (axis: [lora_r, lora_scale])" in said
    assert "--axis" not in said and "no axis" not in said
    path = tmp_path / "advised.yaml"
    content = STUDY | {"cells": cells, "axis": ["lora_r", "lora_scale"]}
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    SCRIPT.main([str(path), "--dry-run"])


def test_a_flag_that_accelerate_lacks_is_one_sentence(refused):
    said = refused({"flags": {"mixed_precisionn": "fp16"}})
    assert said == "error: small, r4, 1: flags: unrecognized arguments: --mixed_precisionn=fp16"
