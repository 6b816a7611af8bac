"""Fields of a recipe that belong to its data set fall where the command line names another one."""

import json

import pytest
from conftest import ROOT, write_jsonl

from sftlab.config.launch import Launch
from sftlab.config.parser import parse_recipe

RECIPE = str(ROOT / "recipes/llama3.2-1b/attn_r16.yaml")


@pytest.fixture(autouse=True)
def _on_a_gpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")


def parsed(*argv):
    return parse_recipe(["--config", RECIPE, *argv], Launch("bf16", "single", 1, 1, True, {}))


@pytest.mark.parametrize("how", [["--dataset_name", "my.jsonl"], ["--dataset_name=my.jsonl"]])
def test_own_data_are_used_whole_and_it_is_said(how):
    recipe = parsed(*how)
    assert recipe.data.dataset_fraction == 1.0
    assert recipe.notes == [
        "dataset_fraction 0.01 of the recipe belongs to Open-Orca/OpenOrca and does not hold for "
        "my.jsonl"
    ]


def test_what_the_command_line_says_holds():
    recipe = parsed("--dataset_name", "my.jsonl", "--dataset_fraction", "0.5")
    assert recipe.data.dataset_fraction == 0.5
    assert recipe.notes == []


@pytest.mark.parametrize("how", [[], ["--dataset_name", "Open-Orca/OpenOrca"]])
def test_the_recipes_own_data_keep_their_fraction(how):
    recipe = parsed(*how)
    assert (recipe.data.dataset_fraction, list(recipe.notes)) == (0.01, [])


def test_every_field_of_the_data_set_falls(tmp_path):
    text = (ROOT / "recipes/llama3.2-1b/attn_r16.yaml").read_text()
    recipe = tmp_path / "it.yaml"
    recipe.write_text(
        text + "dataset_config: main\ndataset_train_split: test\ndataset_shape: gsm8k\n"
    )
    launch = Launch("bf16", "single", 1, 1, True, {})
    data = parse_recipe(["--config", str(recipe), "--dataset_name", "my.jsonl"], launch).data
    assert (data.dataset_config, data.dataset_shape, data.dataset_train_split) == (
        None,
        None,
        "train",
    )


def test_tokens_of_the_recipes_data_keep_its_fraction(tmp_path):
    manifest = {"settings": {"dataset_name": "Open-Orca/OpenOrca"}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert parsed("--dataset_name", str(tmp_path)).data.dataset_fraction == 0.01
    (tmp_path / "manifest.json").write_text(json.dumps({"settings": {"dataset_name": "my.jsonl"}}))
    assert parsed("--dataset_name", str(tmp_path)).data.dataset_fraction == 1.0


def test_own_recipes_ask_for_model_and_data(tmp_path):
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"question": "a", "answer": "b"}])
    recipe, launch = (
        str(ROOT / "recipes/own/attn_r16.yaml"),
        Launch("bf16", "single", 1, 1, True, {}),
    )
    with pytest.raises(ValueError, match="model_name_or_path is missing"):
        parse_recipe(["--config", recipe], launch)
    with pytest.raises(ValueError, match="dataset_name is missing"):
        parse_recipe(["--config", recipe, "--model_name_or_path", "a/b"], launch)
    given = ["--model_name_or_path", "a/b", "--dataset_name", str(rows)]
    assert parse_recipe(["--config", recipe, *given], launch).data.dataset_fraction == 1.0
