"""Numbers and words are held to what their fields mean, before anything is loaded."""

import pytest
from conftest import arguments

from sftlab.config.launch import Launch
from sftlab.config.parser import parse_recipe
from sftlab.config.value_checks import WORDS

LARGE = "9" * 400
OUT_OF_RANGE = [
    ("learning_rate", ["0", "-1", "nan", "inf", "1e999"]),
    ("num_train_epochs", ["0", "-1", "nan", "inf", "1e30"]),
    ("max_steps", ["0", "-2", "1" + "0" * 30]),
    ("lora_r", ["0", "-1", "1000000000"]),
    ("lora_alpha", ["0", "-1", "1000000000000"]),
    ("lora_dropout", ["nan", "-0.1", "1", "1.5"]),
    ("label_smoothing_factor", ["nan", "-0.1", "2"]),
    ("weight_decay", ["nan", "-0.1", "inf"]),
    ("max_grad_norm", ["nan", "-1", "inf"]),
    ("adam_beta1", ["1", "-0.1", "nan"]),
    ("adam_epsilon", ["0", "nan"]),
    ("neftune_noise_alpha", ["-5", "nan"]),
    ("per_device_train_batch_size", ["0", "-1"]),
    ("per_device_eval_batch_size", ["0"]),
    ("gradient_accumulation_steps", ["0", "-4"]),
    ("global_batch_size", ["-1"]),
    ("logging_steps", ["-1", "nan", "0"]),
    ("save_steps", ["-1", "nan", "inf"]),
    ("save_total_limit", ["0", "-1"]),
    ("warmup_steps", ["-1", "nan", "2.5"]),
    ("seed", ["-1", str(2**32)]),
    ("max_length", ["0", "-5"]),
    ("dataset_fraction", ["0", "nan", "1.5"]),
    ("split_fractions", ["nan"]),
    ("pad_to_multiple_of", ["0", "some"]),
    ("dataloader_num_workers", ["-1", "10000"]),
    ("ddp_timeout", ["0"]),
    ("truncation_mode", ["keep_middle"]),
    ("loss_type", ["mse"]),
    ("train_sampling_strategy", ["group_by_length", "shuffled"]),
    ("dataloader_multiprocessing_context", ["thread"]),
    ("lr_scheduler_kwargs", ['{"cycles": 2}', "{1"]),
    ("accelerator_config", ['{"unknown": 1}', "nowhere.json"]),
    ("model_init_kwargs", ["three", "[1]", '{"num_hidden_layers": 0}', "{,"]),
    ("run_name", ["mine"]),
    ("gradient_checkpointing_kwargs", ['{"x": 1}']),
]
CASES = [(name, value) for name, values in OUT_OF_RANGE for value in values]


def parsed(fields, *extra):
    return parse_recipe([*arguments(fields), *extra], Launch.from_environment())


@pytest.mark.parametrize(("name", "value"), CASES, ids=map("=".join, CASES))
def test_a_value_without_meaning_is_one_sentence_that_names_its_field(fields, name, value):
    fields = {
        key: one
        for key, one in fields.items()
        if key not in ("max_steps", "warmup_steps", "output_dir")
    }
    with pytest.raises(ValueError) as caught:
        parsed(fields | {name: value}, "--output_dir=runs/none")
    said = str(caught.value)
    assert name in said or value in said
    assert "\n" not in said and len(said) < 600


def test_every_word_of_a_field_of_words_is_taken(fields):
    for name, words in WORDS.items():
        if name not in ("ddp_backend", "loss_type"):
            for word in words:
                parsed(fields, f"--{name}={word}")


def test_a_warmup_beyond_the_last_step_is_refused_or_said(fields, tmp_path):
    with pytest.raises(ValueError, match="the learning rate never reaches"):
        parsed(fields, "--max_steps=5", "--warmup_steps=6")
    path = tmp_path / "r.yaml"
    kept = {key: value for key, value in fields.items() if key != "max_steps"}
    path.write_text(
        "\n".join(f"{key}: {value}" for key, value in (kept | {"warmup_steps": 30}).items())
    )
    inherited = parse_recipe(["--config", str(path), "--max_steps=5"], Launch.from_environment())
    assert "warmup_steps is 30 and max_steps 5" in inherited.notes[0]


def test_trackers_are_a_list_in_a_recipe_and_on_the_command_line(fields):
    assert parsed(fields).training.report_to == ["tensorboard"]
    assert parsed(fields, "--report_to", "none").training.report_to == []
    for words in (["tensorboard", "wandb"], ["tensorboard,wandb"]):
        found = parsed(fields, "--report_to", *words).training
        assert found.report_to == ["tensorboard", "wandb"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("lora_r: many", "r.yaml: lora_r is 'many': expected a whole number"),
        ("lora_r: 8.5", "lora_r is 8.5: expected a whole number"),
        ("lora_r: [8, 16]", "lora_r is .8, 16.: expected one value, not a list"),
        ("lora_r: {a: 1}", "lora_r is .*: expected one value, not a mapping"),
        ("learning_rate: fast", "learning_rate is 'fast': expected a number"),
        ("packing: perhaps", "packing is 'perhaps': expected true or false"),
        ("lora_target_modules: [[q_proj]]", "lora_target_modules holds"),
        ("lora_target_modules: [[]]", "lora_target_modules holds"),
        ("lora_modules_to_save: [1]", "lora_modules_to_save holds 1: expected names of modules"),
        ('output_dir: "a\\0b"', "output_dir holds a zero byte"),
        ("lora_target_modules: []", "lora_target_modules is an empty list"),
        ("torch_dtype: bfloat16", "r.yaml: unknown field 'torch_dtype': that is dtype here"),
    ],
)
def test_a_recipe_s_value_of_the_wrong_type_names_file_and_field(fields, tmp_path, line, said):
    path = tmp_path / "r.yaml"
    path.write_text(line)
    with pytest.raises(ValueError, match=said):
        parse_recipe(["--config", str(path)], Launch.from_environment())


def test_a_field_of_the_recipe_is_unset_on_the_command_line(fields, tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("\n".join(f"{key}: {value}" for key, value in fields.items()))
    words = ["--config", str(path)]
    assert parse_recipe(words, Launch.from_environment()).training.max_steps > 0
    for null in (["--max_steps", "null"], ["--max-steps=none"], ["--max_steps", "None"]):
        recipe = parse_recipe([*words, *null], Launch.from_environment())
        assert recipe.training.max_steps == -1 and "max_steps" not in recipe.given
    unlimited = parse_recipe([*words, "--max_length", "null"], Launch.from_environment())
    assert unlimited.training.max_length is None
    with pytest.raises(ValueError, match="dataset_name is missing"):
        parse_recipe([*words, "--dataset_name=null"], Launch.from_environment())
