"""A training that is made longer, or that stops early, continues as if it had run at once."""

import pytest
from conftest import read
from packed_training import build, train
from training_curves import scalars

from sftlab.runs.run_directory import adapter_hash
from sftlab.training.early_stopping import stopped_early


@pytest.mark.long
def test_an_extended_run_is_the_longer_run(fields, tmp_path, trained_here):
    own = fields | {"lr_scheduler_type": "constant_with_warmup", "lora_dropout": "0.1"}
    trained_here(own | {"max_steps": "9", "output_dir": str(tmp_path / "whole")})
    trained_here(own | {"max_steps": "6"})
    done = trained_here(own | {"max_steps": "9", "extend": "true"})
    assert "6 steps done" in done.stdout and "it may differ" not in done.stderr
    assert adapter_hash(fields["output_dir"]) == adapter_hash(tmp_path / "whole")
    record, whole = read(fields["output_dir"]), read(tmp_path / "whole")
    assert record["losses"] == whole["losses"]
    assert record["measured"]["train_loss"] == whole["measured"]["train_loss"]
    assert scalars(tmp_path / "run") == scalars(tmp_path / "whole")


EARLY = {
    "max_steps": "30",
    "eval_strategy": "steps",
    "eval_steps": "2",
    "save_steps": "1",
    "save_total_limit": "40",
    "learning_rate": "0.5",
    "early_stopping_patience": "3",
}


@pytest.mark.long
def test_early_stopping_continues_exactly_and_ends_once(fields):
    whole = build({**fields, **EARLY})
    losses = [entry["loss"] for entry in train(whole)]
    ended = whole.state.global_step
    assert 6 <= ended < 30
    assert stopped_early(whole).startswith(f"stopped early at step {ended} of 30: eval_loss has")
    for step in (ended - 1, ended):
        again = build({**fields, **EARLY}, overwrite="true")
        found = train(again, resume_from_checkpoint=f"{fields['output_dir']}/checkpoint-{step}")
        assert again.state.global_step == ended
        assert [entry["loss"] for entry in found] == losses
        assert stopped_early(again) == stopped_early(whole)


@pytest.mark.long
def test_a_run_that_stops_early_succeeds_and_says_so(fields, trained_here):
    patience = EARLY | {"early_stopping_patience": "1", "early_stopping_threshold": "100"}
    done = trained_here(fields | patience | {"save_steps": "100"})
    record = read(fields["output_dir"])
    assert record["measured"]["global_step"] == 4
    assert record["measured"]["stopped_early"] in done.stdout
    assert record["recipe"]["metric_for_best_model"] == "loss"
