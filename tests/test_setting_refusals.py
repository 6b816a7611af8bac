"""Settings that no training can use are refused in one sentence before any model is loaded."""

import pytest
from conftest import arguments

from sftlab.training.trainer import LabTrainer

# what is on the command line, and what the message says
REFUSED = [
    ({"report_to": "wandb"}, "report_to wandb cannot be used here"),
    ({"report_to": "trackio"}, "report_to trackio cannot be used here"),
    ({"report_to": "paper"}, "report_to paper cannot be used here"),
    ({"attn_implementation": "flash_attention_2"}, "needs the package flash_attn"),
    ({"optim": "galore_adamw", "optim_target_modules": "all-linear"}, "galore_torch"),
    ({"optim": "apollo_adamw", "optim_target_modules": "all-linear"}, "apollo_torch"),
    ({"optim": "schedule_free_adamw"}, "optim schedule_free_adamw cannot be used here"),
    ({"optim": "lomo"}, "lomo_optim"),
    ({"optim_args": "beta"}, "optim_args beta:"),
    ({"accelerator_config": """{"nosuch": 1}"""}, "accelerator_config holds 'nosuch'"),
    (
        {"lr_scheduler_type": "cosine_with_restarts", "lr_scheduler_kwargs": '{"cycles": 2}'},
        "cycles",
    ),
    ({"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": '{"lr_end": 9}'}, "polynomial"),
    ({"lr_scheduler_type": "warmup_stable_decay"}, "warmup_stable_decay"),
    ({"learning_rate": "-1"}, "learning_rate is -1.0: it must be a finite number above 0"),
    ({"learning_rate": "nan"}, "learning_rate is nan"),
    ({"per_device_train_batch_size": "0"}, "per_device_train_batch_size is 0"),
    ({"per_device_eval_batch_size": "0"}, "per_device_eval_batch_size is 0"),
    ({"gradient_accumulation_steps": "0"}, "gradient_accumulation_steps is 0"),
    ({"global_batch_size": "-8"}, "global_batch_size is -8"),
    ({"adam_beta2": "1.5"}, "adam_beta2 is 1.5: it must be at least 0 and below 1"),
    ({"lora_dropout": "2"}, "lora_dropout is 2.0"),
    ({"max_steps": "-1", "num_train_epochs": "0"}, "num_train_epochs is 0.0"),
    ({"save_steps": "-3"}, "save_steps is -3"),
    ({"save_total_limit": "0"}, "save_total_limit is 0"),
    ({"seed": "-1"}, "seed is -1"),
    ({"dataloader_num_workers": "-1"}, "dataloader_num_workers is -1"),
    ({"eval_strategy": "steps", "metric_for_best_model": "accuracy"}, "gives eval_loss alone"),
    (
        {"early_stopping_patience": "2", "eval_strategy": "no"},
        "counts evaluations, and eval_strategy is no",
    ),
    ({"init_lora_weights": "corda"}, "init_lora_weights corda is not possible here: eva reads"),
    ({"init_lora_weights": "loftq"}, "loftq begins with what rounding to 4 bits takes away: add"),
    (
        {"init_lora_weights": "eva", "dataset_streaming": "true"},
        "eva reads training rows before the first step, in a random order: leave out",
    ),
    (
        {"init_lora_weights": "loftq", "load_in_4bit": "true", "use_dora": "true"},
        "init_lora_weights loftq does not go with use_dora",
    ),
    ({"init_lora_weights": "eva", "adapter_name_or_path": "x"}, "go with adapter_name_or_path"),
    ({"init_lora_weights": "pisa"}, "expected true, gaussian, orthogonal, pissa"),
    ({"init_lora_weights": "pissa", "load_in_4bit": "true"}, "does not go with load_in_4bit"),
    ({"init_lora_weights": "olora", "use_dora": "true"}, "does not go with use_dora"),
    ({"init_lora_weights": "orthogonal", "lora_r": "3"}, "needs an even rank"),
    ({"lora_bias": "true", "use_dora": "true"}, "lora_bias does not go with use_dora"),
    (
        {"answers_during_training": "4", "eval_strategy": "no"},
        "answers_during_training belongs to evaluations",
    ),
    ({"answers_during_training": "0", "eval_strategy": "epoch"}, "must be at least 1"),
    ({"early_stopping_threshold": "0.1"}, "has no effect without early_stopping_patience"),
    ({"early_stopping_patience": "0", "eval_strategy": "epoch"}, "must be at least 1"),
    ({"fsdp_layers_per_unit": "2"}, "fsdp_layers_per_unit belongs to FSDP2: launch with fsdp.yaml"),
    ({"fsdp_layers_per_unit": "0"}, "fsdp_layers_per_unit is 0: it must be at least 1"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_a_setting_that_no_training_can_use_is_one_sentence(
    sft, fields, monkeypatch, tmp_path, change, message
):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "")
    monkeypatch.setattr(sft, "prepare", None)  # what reads data and model is not reached
    with pytest.raises(SystemExit) as ended:
        sft.main(arguments(fields | change))
    assert message in str(ended.value)
    assert "\n" not in str(ended.value)
    assert not (tmp_path / "run").exists()


def test_what_fails_in_the_training_ends_in_a_sentence(fields, tmp_path, monkeypatch, train_here):
    def broken(*args, **kwargs):
        raise KeyError("no such layer")

    short = fields | {"max_steps": "1"}
    with monkeypatch.context() as patch:
        patch.setattr(LabTrainer, "compute_loss", broken)
        done = train_here(short)
    assert done.returncode and "Traceback" not in done.stderr
    *_, last = done.stderr.strip().splitlines()
    kept = tmp_path / "run" / "traceback-0.txt"
    assert last.startswith("internal error: KeyError: 'no such layer'") and str(kept) in last
    assert "in broken" in kept.read_text()
    assert train_here(short | {"overwrite": "true"}).returncode == 0
    assert not kept.exists()
