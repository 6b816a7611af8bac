"""A checkpoint counts when all of it is there, bit by bit.

What does not count is named, and nothing valid is lost.
"""

import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from sftlab.files import write_json
from sftlab.runs import progress, tensorboard_curves
from sftlab.runs.checkpoint_manifest import (
    FORMAT,
    MANIFEST,
    in_order,
    newest_valid,
    remove,
    rotate,
    seal,
    set_aside,
    verify,
)
from sftlab.runs.made_files import MadeFiles


def saved(run, step, sealed=True, needs=()):
    """A checkpoint of three files, one of them in a folder."""
    folder = run / f"checkpoint-{step}"
    (folder / "shards").mkdir(parents=True)
    for name in ("adapter.safetensors", "optimizer.pt", "shards/0.distcp"):
        (folder / name).write_bytes(bytes([step % 256]) * 5000)
    if sealed:
        seal(
            folder,
            {
                "step": step,
                "saved": 1.5,
                "train_seconds": 2.0,
                "must_match": {"recipe": {"learning_rate": 0.1}},
                "hardware": {},
            },
            needs,
        )
    else:
        MadeFiles(run).note([f"{folder.name}/"])
    return folder


def missing(path):
    path.unlink()


def truncated(path):
    path.write_bytes(path.read_bytes()[:-9])


def emptied(path):
    path.write_bytes(b"")


def zeroed(path):
    path.write_bytes(bytes(path.stat().st_size))


def flipped(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


FAULTS = [missing, truncated, emptied, zeroed, flipped]
FILES = ["adapter.safetensors", "optimizer.pt", "shards/0.distcp", MANIFEST]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", FILES)
def test_every_fault_of_every_file_is_seen_named_and_set_aside(tmp_path, name, fault):
    good, bad = saved(tmp_path, 3), saved(tmp_path, 6)
    fault(bad / name)
    found = newest_valid(tmp_path)
    assert found.folder == good
    assert found.manifest["step"] == 3
    (said,) = set_aside(tmp_path, found.invalid)
    if (name, fault) == (MANIFEST, missing):
        assert said.startswith("checkpoint-6 has no manifest.json: its saving was cut short")
        assert (tmp_path / "unfinished-checkpoint-6").is_dir()
    else:
        assert said.startswith(f"checkpoint-6/{name} ")
        assert (tmp_path / "broken-checkpoint-6").is_dir()
    assert not bad.exists()
    assert newest_valid(tmp_path).invalid == []


def test_a_flipped_bit_anywhere_in_the_manifest_is_seen_or_changes_nothing(tmp_path):
    folder = saved(tmp_path, 3)
    path, whole = folder / MANIFEST, verify(folder)
    content = path.read_bytes()
    seen = 0
    for place in range(0, len(content), 3):
        path.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        try:
            assert verify(folder) == whole, place
        except ValueError:
            seen += 1
    assert seen > len(content) / 6


def test_one_without_the_best_model_that_it_needs_does_not_count(tmp_path):
    best, oldest = saved(tmp_path, 6), saved(tmp_path, 3)
    saved(tmp_path, 9, needs=["checkpoint-6"])
    assert newest_valid(tmp_path).folder.name == "checkpoint-9"
    flipped(best / "optimizer.pt")
    found = newest_valid(tmp_path)
    assert found.folder == oldest
    assert (
        "checkpoint-9 needs checkpoint-6, the best model so far, but checkpoint-6/optimizer.pt"
        in found.invalid[0][1]
    )


def test_every_one_that_was_cut_short_is_kept_under_a_name_of_its_own(tmp_path):
    for _ in range(3):
        saved(tmp_path, 6, sealed=False)
        found = newest_valid(tmp_path)
        assert found.folder is None
        set_aside(tmp_path, found.invalid)
    names = sorted(path.name for path in tmp_path.iterdir() if path.is_dir())
    assert names == [f"unfinished-checkpoint-6{number}" for number in ("", "-2", "-3")]


@pytest.mark.parametrize(
    ("keep", "best", "left"),
    [
        (2, None, [9, 12]),
        (1, None, [12]),
        (None, None, [3, 6, 9, 12]),
        (0, None, [3, 6, 9, 12]),
        (1, 3, [3, 12]),
        (2, 3, [3, 12]),
        (3, 3, [3, 9, 12]),
        (2, 12, [9, 12]),
    ],
)
def test_rotation_keeps_the_newest_and_the_best(tmp_path, keep, best, left):
    for step in (3, 6, 9, 12):
        saved(tmp_path, step)
    rotate(tmp_path, keep, best and f"checkpoint-{best}")
    assert [int(folder.name[11:]) for folder in in_order(tmp_path)] == left


def test_a_deletion_that_was_cut_short_leaves_nothing_that_counts(tmp_path, monkeypatch):
    folder = saved(tmp_path, 3)
    unlink, left = Path.unlink, [1]

    def killed(path, *args, **kwargs):
        if not left:
            raise KeyboardInterrupt
        left.pop()
        unlink(path, *args, **kwargs)

    monkeypatch.setattr(Path, "unlink", killed)
    with pytest.raises(KeyboardInterrupt):
        remove(folder)
    with pytest.raises(ValueError, match="cut short"):
        verify(folder)


def test_a_manifest_of_another_format_is_not_read(tmp_path, monkeypatch):
    folder = saved(tmp_path, 3)
    monkeypatch.setattr("sftlab.runs.checkpoint_manifest.FORMAT", FORMAT + 1)
    with pytest.raises(ValueError, match=f"has format {FORMAT}, this version reads {FORMAT + 1}"):
        verify(folder)


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})
    with pytest.raises(ValueError, match="Circular"):
        circle = {}
        circle["itself"] = circle
        write_json(path, circle)
    assert json.loads(path.read_text()) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


@pytest.fixture
def logged(tmp_path):
    """A folder of curves of nine steps, and the history of a checkpoint at the fifth."""
    with SummaryWriter(str(tmp_path)) as writer:
        for step in range(1, 9):
            writer.add_scalar("train/loss", step / 10, step, walltime=100.0 + step)
        writer.add_scalar("train/train_loss", 1.0, 5, walltime=110.0)
        writer.add_text("args", "as they were")
        writer.add_scalar("train/loss", 0.9, 9, walltime=111.0)
    return tmp_path, [{"loss": step / 10, "step": step, "epoch_is": "text"} for step in range(1, 6)]


def read_curves(folder):
    events = EventAccumulator(str(folder)).Reload()
    return {
        tag: [(e.step, round(e.value, 6)) for e in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def test_curves_are_cut_at_the_checkpoint(logged):
    folder, history = logged
    (path,) = folder.iterdir()
    path.write_bytes(path.read_bytes()[:-7])  # the last record was cut off by the kill
    assert tensorboard_curves.restore(folder, history, step=5, saved=105.5) == 0
    assert read_curves(folder) == {"train/loss": [(s, s / 10) for s in range(1, 6)]}
    events = EventAccumulator(str(folder)).Reload()
    assert "args/text_summary" in events.Tags()["tensors"]
    assert [e.wall_time for e in events.Scalars("train/loss")] == [
        101.0,
        102.0,
        103.0,
        104.0,
        105.0,
    ]


@pytest.mark.parametrize("fault", FAULTS)
def test_curves_that_were_lost_are_written_anew(logged, fault):
    folder, history = logged
    (path,) = folder.iterdir()
    path.write_bytes(path.read_bytes()[:200])
    fault(path)
    assert tensorboard_curves.restore(folder, history, step=5, saved=105.5) > 0
    assert read_curves(folder) == {"train/loss": [(s, s / 10) for s in range(1, 6)]}
    assert tensorboard_curves.restore(folder, history, step=5, saved=105.5) == 0


def test_progress_outlives_its_writer_and_says_what_was_lost(tmp_path):
    assert progress.read(tmp_path) is None
    notes = progress.Notes(tmp_path)
    notes.write(123456, 12.5)
    notes.write(7, 3.25)
    found = progress.read(tmp_path)
    assert (found.step, found.seconds) == (7, 3.25)
    assert (tmp_path / progress.NAME).read_text().count("\n") == 1
    cost = progress.cost(found, 5, 2.0, found.noted + 60)
    assert cost == {"steps_done_again": 2, "seconds_done_again": 1.25, "stopped_seconds": 60.0}
    assert progress.cost(found, 7, 3.5, found.noted)["seconds_done_again"] == 0.0
    assert set(progress.cost(None, 5, 2.0, 0.0).values()) == {None}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (bytes(96), "it is empty"),
        (b'{"step": 3', "it is not JSON"),
        (b"[]", r"holds \[\], expected a JSON object"),
        (b'{"step": "3", "train_seconds": 1, "noted": 1}', "step is .*, expected an integer"),
        (b'{"step": 3, "train_seconds": -1, "noted": 1}', "train_seconds is -1, expected a number"),
        (b'{"step": 3, "train_seconds": 1}', "has no noted, expected a number"),
    ],
)
def test_a_damaged_progress_file_is_named_with_its_key(tmp_path, content, said):
    (tmp_path / progress.NAME).write_bytes(content)
    with pytest.raises(ValueError, match=f"progress.json.*{said}"):
        progress.read(tmp_path)
