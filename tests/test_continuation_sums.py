"""What adds up between two logs goes on after a stop, and sums over processes keep their order."""

import json
import time

import pytest
from conftest import arguments
from packed_training import build

from sftlab.config.launch import Launch
from sftlab.config.parser import parse_recipe


def without_times(history):
    return [
        {k: v for k, v in entry.items() if not k.endswith(("runtime", "_per_second"))}
        for entry in history
    ]


def test_what_adds_up_between_logs_goes_on(fields):
    more = {
        "logging_steps": 4,
        "save_steps": 6,
        "max_steps": 18,
        "lora_dropout": 0.1,
        "save_total_limit": 5,
    }
    whole = build(fields, **more)
    expected = whole.train()
    again = build(fields, **more, overwrite="true")
    found = again.train(resume_from_checkpoint=f"{fields['output_dir']}/checkpoint-6")
    assert found.training_loss == expected.training_loss
    assert without_times(again.state.log_history) == without_times(whole.state.log_history)
    saved = json.loads((again.checkpointer.folder / "checkpoint-6/resume_state-0.json").read_text())
    before, this_start = saved["clock"]["train_seconds"], time.perf_counter() - again.clock._started
    assert again.clock.seconds == pytest.approx(before + this_start, abs=0.01)
    assert before > 0.02
    timed = again.meter.facts(again.flops)["timed_steps"]
    assert timed == 2 + 9, "both starts, each without its warm-up"
    assert again.meter.first_step_s == whole.meter.first_step_s


@pytest.mark.parametrize(
    ("processes", "on_a_cpu", "more", "looked_for"),
    [
        (2, True, {}, False),
        (3, True, {}, True),
        (3, False, {}, False),
        (3, False, {"deterministic": "true"}, True),
    ],
)
def test_sums_over_three_processes_keep_their_order(fields, processes, on_a_cpu, more, looked_for):
    launch = Launch("fp32", "ddp", processes, processes, on_a_cpu, {})
    recipe = parse_recipe(arguments({**fields, "global_batch_size": "12", **more}), launch)
    assert recipe.training.ddp_find_unused_parameters is looked_for
