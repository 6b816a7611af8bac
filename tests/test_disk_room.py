"""A disk that fills up costs at most the checkpoint that does not fit."""

import errno
from types import SimpleNamespace

import pytest
from packed_training import build, train
from transformers import TrainerCallback

from sftlab.runs.checkpoint_manifest import in_order, seal, verify
from sftlab.training.disk_room import NoRoom, is_full


class Room:
    """A disk with so many bytes left."""

    def __init__(self, monkeypatch, left):
        self.left = left
        monkeypatch.setattr(
            "sftlab.training.disk_room.shutil.disk_usage",
            lambda path: SimpleNamespace(free=self.left),
        )


def test_a_disk_too_small_for_one_checkpoint_is_refused_before_the_first_step(fields, monkeypatch):
    trainer = build(fields)
    Room(monkeypatch, 1000)
    with pytest.raises(
        NoRoom, match=r"a checkpoint needs 1\.\d MB and .* has 0\.0 MB left"
    ) as caught:
        trainer.checkpointer.check_room()
    assert is_full(caught.value)


def test_without_room_a_checkpoint_is_skipped_and_the_training_goes_on(fields, monkeypatch, caplog):
    whole = train(build({**fields, "output_dir": fields["output_dir"] + "-whole"}, max_steps=9))
    trainer = build(fields, max_steps=9)
    room = Room(monkeypatch, 1 << 30)

    class Fill(TrainerCallback):
        def on_save(self, *args, **kwargs):
            room.left = 0

    trainer.add_callback(Fill())
    assert [e["loss"] for e in train(trainer)] == [e["loss"] for e in whole]
    assert [folder.name for folder in in_order(trainer.checkpointer.folder)] == ["checkpoint-3"]
    assert [skip.split(":")[0] for skip in trainer.checkpointer.skipped] == ["step 6", "step 9"]
    assert "no checkpoint at step 6: a checkpoint needs 0." in caplog.text
    assert "the last checkpoint is checkpoint-3" in caplog.text


def test_older_checkpoints_give_way_where_the_recipe_lets_them(fields, monkeypatch):
    trainer = build(fields, max_steps=9, save_total_limit=2)
    trainer.checkpointer.room.checkpoint_bytes = lambda: 1 << 20
    left = 5 << 19  # two and a half
    monkeypatch.setattr(
        "sftlab.training.disk_room.shutil.disk_usage",
        lambda path: SimpleNamespace(
            free=left - (len(in_order(trainer.checkpointer.folder)) << 20)
        ),
    )
    train(trainer)
    assert trainer.checkpointer.skipped == []
    assert [folder.name for folder in in_order(trainer.checkpointer.folder)] == [
        "checkpoint-6",
        "checkpoint-9",
    ]


def test_a_disk_that_runs_full_in_the_middle_of_saving_leaves_the_last_checkpoint(
    fields, monkeypatch
):
    trainer = build(fields, max_steps=9)
    state = trainer.meter.state

    def full():
        if trainer.state.global_step == 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        return state()

    trainer.meter.state = full
    train(trainer)
    assert [folder.name for folder in in_order(trainer.checkpointer.folder)] == [
        "checkpoint-3",
        "checkpoint-9",
    ]
    assert [skip.split(":")[0] for skip in trainer.checkpointer.skipped] == ["step 6"]
    verify(trainer.checkpointer.folder / "checkpoint-9")


def test_the_last_valid_checkpoint_outlives_a_kill_at_any_point_of_saving_the_next(
    fields, monkeypatch
):
    trainer = build(fields, max_steps=6, save_total_limit=1)

    def sealing(*args):
        if trainer.state.global_step == 6:
            raise KeyboardInterrupt
        return seal(*args)

    monkeypatch.setattr("sftlab.training.checkpointing.seal", sealing)
    with pytest.raises(KeyboardInterrupt):
        train(trainer)
    verify(trainer.checkpointer.folder / "checkpoint-3")
