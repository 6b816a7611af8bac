"""A run, a base model and an adapter are data: what they say runs no code and loads no pickle."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import read
from judging import untrained_run
from safetensors.torch import load_file, save_file

from sftlab.config.model_overrides import check_overrides
from sftlab.evaluation.base_and_tuned import (
    finished_run,
    load_pair,
    model_settings,
    run_tokenizer,
)
from sftlab.files import write_json
from sftlab.runs.run_directory import adapter_hash

CODE = """
import os
open(os.environ["SFTLAB_PWNED"], "a").write("code ran")
from transformers import LlamaConfig, LlamaForCausalLM
class EvilConfig(LlamaConfig):
    model_type = "evil"
class EvilModel(LlamaForCausalLM):
    config_class = EvilConfig
"""


def changed(path: Path, **values: object) -> None:
    write_json(path, json.loads(path.read_text()) | values)


def tensors(folder: Path, change: Callable[[dict], dict]) -> None:
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


@pytest.fixture
def evil(base, tmp_path, monkeypatch) -> tuple[Path, Path]:
    """A run on a base model that brings code, and the file that the code would write."""
    model = shutil.copytree(base, tmp_path / "evil")
    (model / "evil.py").write_text(CODE)
    names = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel"}
    run = untrained_run(base, tmp_path / "run")
    changed(model / "config.json", model_type="evil", auto_map=names)
    changed(run / "run.json", recipe=read(run)["recipe"] | {"model_name_or_path": str(model)})
    monkeypatch.setenv("SFTLAB_PWNED", str(tmp_path / "pwned"))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    return run, tmp_path / "pwned"


@pytest.fixture
def own(base, tmp_path) -> Path:
    """A run with a base model of its own, which a test may spoil."""
    model = shutil.copytree(base, tmp_path / "model")
    run = untrained_run(base, tmp_path / "run")
    changed(run / "run.json", recipe=read(run)["recipe"] | {"model_name_or_path": str(model)})
    return run


@pytest.mark.parametrize(
    "says",
    [
        {},
        {"trust_remote_code": True},
        {"model_init_kwargs": {"trust_remote_code": True}},
        {"model_init_kwargs": {"code_revision": "main"}},
    ],
)
def test_a_run_cannot_make_its_base_models_code_run(evil, says):
    run, pwned = evil
    changed(run / "run.json", recipe=read(run)["recipe"] | says)
    with pytest.raises(ValueError, match=r"code|may not hold"):
        load_pair(run, finished_run(run))
    assert not pwned.exists()


@pytest.mark.parametrize(
    "key, value, named",
    [
        ("use_safetensors", False, "only safetensors"),
        ("subfolder", "other", "may not hold 'subfolder'"),
        ("gguf_file", "x.gguf", "may not hold 'gguf_file'"),
        ("adapter_kwargs", {"_adapter_model_path": "x"}, "may not hold 'adapter_kwargs'"),
        ("use_kernels", True, "may not hold 'use_kernels'"),
        ("auto_map", {"AutoConfig": "x.Y"}, "may not hold 'auto_map'"),
        ("attn_implementation", "org/kernel", "use attn_implementation"),
        ("num_hidden_layers", "two", "whole number"),
        ("num_hidden_layers", 0, "whole number"),
    ],
)
def test_a_recipes_overrides_are_listed_plain_data(key, value, named):
    with pytest.raises(ValueError, match=named):
        check_overrides({key: value})


def test_overrides_are_a_mapping():
    assert check_overrides(None) == {}
    assert check_overrides({"num_hidden_layers": 3}) == {"num_hidden_layers": 3}
    with pytest.raises(ValueError, match="expected a mapping"):
        check_overrides(["num_hidden_layers"])


def test_a_recipe_file_cannot_give_trust(sft, tmp_path, base):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model_name_or_path: {base}\ntrust_remote_code: true\n")
    with pytest.raises(SystemExit, match="pass --trust_remote_code on the command line"):
        sft.main(["--config", str(recipe), "--dataset_name", "x.jsonl"])


@pytest.mark.parametrize(
    "key, value",
    [
        ("megatron_config", {"a": 1}),  # peft imports the module `megatron_core`
        ("auto_mapping", {"parent_library": "os", "base_model_class": "system"}),
        ("peft_type", "XLORA"),  # it loads other adapters by name
        ("loftq_config", {"loftq_bits": 4}),
        ("init_lora_weights", "pissa"),  # it changes the base model
        ("task_type", "SEQ_CLS"),
        ("surprise", 1),
        ("r", "16"),
        ("lora_alpha", float("nan")),
        ("corda_config", "x" * 5000),
        ("lora_alpha", 1e30),
        ("lora_dropout", -1),
        ("target_modules", "("),
        ("modules_to_save", [5]),
        ("rank_pattern", {"q_proj": "x"}),
        ("alpha_pattern", {"q_proj": float("nan")}),
    ],
)
def test_an_adapters_config_may_not_hold_more_than_sft_writes(own, key, value):
    changed(own / "adapter" / "adapter_config.json", **{key: value})
    with pytest.raises(ValueError, match=rf"adapter_config\.json, {key}: ") as refused:
        load_pair(own, finished_run(own))
    assert len(str(refused.value)) < 1000


def test_pickled_weights_are_never_read(own, monkeypatch):
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("torch.load was called")

    monkeypatch.setattr(torch, "load", refuse)
    adapter, model = own / "adapter", Path(read(own)["recipe"]["model_name_or_path"])
    pickled = adapter / "adapter_model.bin"
    (adapter / "adapter_model.safetensors").rename(pickled)
    with pytest.raises(ValueError, match=r"no adapter_model.safetensors: pickled"):
        load_pair(own, finished_run(own))
    pickled.rename(adapter / "adapter_model.safetensors")
    (model / "model.safetensors").rename(model / "other.safetensors")
    torch.save({}, model / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"no file named model.safetensors"):
        load_pair(own, finished_run(own))
    write_json(model / "model.safetensors.index.json", {"weight_map": {"a": "pytorch_model.bin"}})
    with pytest.raises(ValueError, match=r'weight_map, a: got "pytorch_model.bin"'):
        load_pair(own, finished_run(own))


@pytest.mark.parametrize(
    "file, values, named",
    [
        ("config.json", {"attn_implementation": "org/kernel"}, "code from the hub"),
        ("config.json", {"transformers_weights": "x.bin"}, "expected a .safetensors file"),
        ("config.json", {"num_hidden_layers": "two"}, "num_hidden_layers"),
        ("config.json", {"num_hidden_layers": 40}, "missing .*layers.10"),
        ("config.json", {"num_hidden_layers": 1}, "unexpected .*layers.1"),
    ],
)
def test_a_base_models_config_is_data(own, file, values, named):
    changed(Path(read(own)["recipe"]["model_name_or_path"]) / file, **values)
    with pytest.raises(ValueError, match=named):
        load_pair(own, finished_run(own))


def test_a_base_folder_that_holds_an_adapter_is_refused(own):
    model = Path(read(own)["recipe"]["model_name_or_path"])
    shutil.copy(own / "adapter" / "adapter_config.json", model)
    with pytest.raises(ValueError, match="holds an adapter"):
        load_pair(own, finished_run(own))


@pytest.mark.parametrize(
    "change, named",
    [
        (lambda held: {"x": torch.zeros(1)}, "21 missing .*1 unexpected .x"),
        (lambda held: {k: v for k, v in held.items() if k != "model.norm.weight"}, "model.norm"),
        (lambda held: {f"evil.{k}": v for k, v in held.items()}, "21 missing .*evil.lm_head"),
        (lambda held: held | {"model.norm.weight": torch.zeros(5)}, "another shape .model.norm"),
    ],
)
def test_other_tensors_are_refused_with_their_names(own, train_here, fields, change, named):
    model = Path(read(own)["recipe"]["model_name_or_path"])
    tensors(model, change)
    with pytest.raises(ValueError, match=named):
        load_pair(own, finished_run(own))
    if "x" in change({}):
        done = train_here(
            fields | {"model_name_or_path": str(model), "output_dir": str(own / "out")}
        )
        assert done.returncode == 1
        assert done.stderr.splitlines()[-1].startswith("error: the weights of base model")
        assert "Traceback" not in done.stderr


def test_an_adapters_missing_tensors_are_refused(own):
    path = own / "adapter" / "adapter_model.safetensors"
    held = load_file(path)
    gone = sorted(held)[0]
    save_file({k: v for k, v in held.items() if k != gone}, path)
    with pytest.raises(ValueError, match=r"other tensors .*missing base_model"):
        load_pair(own, finished_run(own))


def test_the_identity_of_the_models_is_all_that_answers_depend_on(own):
    """Weights and config of the adapter, base model, tokenizer and template."""
    model = Path(read(own)["recipe"]["model_name_or_path"])
    run = finished_run(own)
    run_tokenizer(own, run)
    seen = [model_settings(own, run)]
    changed(own / "adapter" / "adapter_config.json", lora_alpha=3200)
    seen.append(model_settings(own, run))
    tensors(model, lambda held: held | {"model.norm.weight": held["model.norm.weight"] * 2})
    seen.append(model_settings(own, run))
    changed(own / "adapter" / "tokenizer_config.json", model_max_length=7)
    seen.append(model_settings(own, run))
    changed(model / "generation_config.json", eos_token_id=[1, 2])
    seen.append(model_settings(own, run))
    assert len({json.dumps(one) for one in seen}) == len(seen)


def test_the_order_of_targets_does_not_change_the_adapters_hash(own):
    path, before = own / "adapter" / "adapter_config.json", adapter_hash(own)
    config = json.loads(path.read_text())
    changed(path, target_modules=config["target_modules"][::-1])
    assert adapter_hash(own) == before
    changed(path, lora_alpha=3200)
    assert adapter_hash(own) != before
    path.write_text("[")
    assert len(adapter_hash(own)) == 16


@pytest.mark.parametrize(
    "change, named",
    [
        ({"recipe": None}, "recipe is null"),
        ({"recipe": {}}, "recipe.model_name_or_path"),
        ({"template": None}, "template"),
        ({"template": {"hash": 5}}, "template.hash is 5"),
    ],
)
def test_a_run_json_without_what_an_evaluation_needs_is_named(own, change, named):
    changed(own / "run.json", **change)
    with pytest.raises(ValueError, match=rf"run\.json.*{named}"):
        finished_run(own)


@pytest.mark.parametrize(
    "file, change",
    [
        ("tokenizer_config.json", {"eos_token": 5.0}),
        ("tokenizer_config.json", {"tokenizer_class": 5}),
        ("tokenizer.json", {"model": []}),
        ("tokenizer.json", {"added_tokens": {"id": {}}}),
        ("chat_template.jinja", "{{ messages[0].content.nothing.more }}"),
        ("chat_template.jinja", "{% if %}"),
    ],
)
def test_a_spoilt_tokenizer_is_a_sentence(own, file, change):
    path = own / "adapter" / file
    if isinstance(change, dict):
        changed(path, **change)
    else:
        path.write_text(change)
        run = read(own)
        mark = hashlib.sha256(change.encode()).hexdigest()[:16]
        changed(own / "run.json", template=run["template"] | {"hash": mark})
    with pytest.raises(ValueError, match=r"adapter") as caught:
        run_tokenizer(own, finished_run(own))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("eos_token_id", ["x"], "token ids"),
        ("bos_token_id", {"value": 1}, "token ids"),
        ("output_hidden_states", "all", "true or false"),
        ("output_attentions", [None], "true or false"),
    ],
)
def test_a_base_models_generation_config_is_checked(own, key, value, expected):
    model = Path(read(own)["recipe"]["model_name_or_path"])
    changed(model / "generation_config.json", **{key: value})
    with pytest.raises(ValueError, match=rf"{key} is .*, expected {expected}"):
        load_pair(own, finished_run(own))
