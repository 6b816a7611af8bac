"""A streamed data set continues where it was, and its last short step is left out."""

import pytest
from conftest import read
from packed_training import build, train


def test_a_stream_that_has_begun_again_goes_on_where_it_was(fields):
    more = {
        "dataset_streaming": "true",
        "streaming_eval_rows": 10,
        "max_steps": 30,
        "save_steps": 25,
    }
    whole = build(fields, **more)
    losses = [e["loss"] for e in train(whole)]
    assert whole.state.epoch > 1, "the stream has begun again"
    again = build(fields, **more, overwrite="true")
    found = train(again, resume_from_checkpoint=f"{fields['output_dir']}/checkpoint-25")
    assert [e["loss"] for e in found] == losses


def test_a_stream_whose_pass_ends_within_a_step_leaves_those_rows(fields):
    streamed = {
        "dataset_streaming": "true",
        "streaming_eval_rows": 10,
        "max_steps": 30,
        "lora_dropout": 0,
    }
    losses = []
    for micro in (8, 2):
        trainer = build(
            {**fields, "global_batch_size": "8", "per_device_train_batch_size": str(micro)},
            **streamed,
        )
        losses.append([entry["loss"] for entry in train(trainer)])
        assert trainer.state.epoch > 1, "the stream has begun again"
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_stream_of_fewer_rows_than_a_step_takes_fails(fields, tmp_path, train_here):
    own = {"dataset_streaming": "true", "streaming_eval_rows": "10", "global_batch_size": "2000"}
    done = train_here({**fields, **own, "per_device_train_batch_size": "2000"})
    assert (
        "the training ended at step 0 of 6: a pass over the stream has no 2000 rows" in done.stderr
    )
    assert read(tmp_path / "run")["status"] == "failed"
