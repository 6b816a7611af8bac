"""No folder but a run's own is written into, and nothing that a run did not make is removed."""

import os
import shutil

import pytest
from conftest import read
from run_folders import LAUNCH, RECIPE, checkpoint, finished_run, put, snapshot, started

from sftlab.runs import progress
from sftlab.runs.run_directory import Run, read_run
from sftlab.runs.run_lock import LOCK

FOREIGN_FOLDERS = {
    "checkpoints of trl": [f"checkpoint-{n}/model.safetensors" for n in (500, 1000, 1500)],
    "an adapter": ["adapter/adapter_model.safetensors", "README.md"],
    "a note": ["notes.txt"],
    "a hidden file": [".git/config"],
    "another program's manifest": ["checkpoint-3/manifest.json"],
    "other runs": ["first/run.json", "second/run.json"],
    "only a progress file": ["progress.json"],
}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("names", FOREIGN_FOLDERS.values(), ids=FOREIGN_FOLDERS)
def test_a_folder_that_is_no_run_s_is_refused_with_what_is_in_it(tmp_path, names, overwrite):
    put(tmp_path, *names)
    before = snapshot(tmp_path)
    with pytest.raises(
        ValueError, match=r"is not a run's folder: it has no run\.json, but"
    ) as said:
        started(tmp_path, overwrite=overwrite)
    assert names[0].split("/")[0] in str(said.value)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("names", [[], ["task.json"], ["task.json", "log"]])
def test_an_empty_folder_and_one_with_a_launcher_s_files_is_new(tmp_path, names):
    put(tmp_path, *names)
    started(tmp_path)
    assert read_run(tmp_path)["status"] == "running"
    assert set(snapshot(tmp_path)) > set(names)


def test_what_is_no_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("nowhere")
    for name, what in (("file", "no folder"), ("link", "a link to nothing")):
        with pytest.raises(ValueError, match=f"{name} is {what}"):
            started(tmp_path / name)
    assert (tmp_path / "file").read_text() == "mine"


MINE = (
    *("notes.txt", "README.md", "adapter/mine.txt", "eval/notes.md", "eval/quality.txt"),
    *("tensorboard/events.out.tfevents.9.elsewhere.1.0", "checkpoint-3/mine.txt", "adapter/a/b"),
    *("checkpoint-77/model.safetensors", "checkpoint-2/adapter_model.safetensors"),
    *("broken-checkpoint-9/weights", "unfinished-checkpoint/x", ".run.json.mine", ".adapter/x"),
    *("run.json.bak", "broken-run.json", "checkpoint-best/model.safetensors"),
)


def test_a_home_that_no_shell_replaced_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="~/runs/x begins with ~"):
        started(tmp_path.__class__("~/runs/x"))
    assert not snapshot(tmp_path)


def test_overwrite_removes_exactly_what_the_old_run_made(tmp_path):
    folder = tmp_path / "r"
    made = finished_run(folder)
    put(folder, *MINE)
    before = {name: content for name, content in snapshot(folder).items() if name not in made}
    assert set(before) == set(MINE)
    _, start = started(folder, overwrite=True)
    after = snapshot(folder)
    assert {name: after.get(name) for name in MINE} == before
    assert set(after) - set(MINE) == {"run.json", "made.txt", LOCK}
    assert any("checkpoint-77 was not made by this run" in one for one in start.warnings)
    assert start.checkpoint is None


def test_overwrite_removes_the_scores_of_pairs(tmp_path):
    folder = tmp_path / "r"
    finished_run(folder)
    scores = ("preferences.json", "preferences.jsonl", "start_rows.jsonl", "start_rows-a.jsonl")
    names = [f"eval/{name}" for name in (*scores, "preferences-a.json", "preferences-a.jsonl")]
    put(folder, *names)
    started(folder, overwrite=True)
    assert not set(names) & set(snapshot(folder))


def test_foreign_checkpoints_are_never_continued_moved_or_counted(tmp_path):
    folder = tmp_path / "r"
    started(folder)
    own = checkpoint(folder, 3)
    put(folder, "checkpoint-9/adapter_model.safetensors", "checkpoint-10/manifest.json")
    _, start = started(folder)
    assert start.checkpoint == own
    assert {"checkpoint-3", "checkpoint-9", "checkpoint-10"} <= {p.name for p in folder.iterdir()}


def test_links_to_other_places_lose_nothing_there(tmp_path):
    folder, elsewhere = tmp_path / "r", tmp_path / "elsewhere"
    finished_run(folder)
    for name in ("adapter", "eval"):
        shutil.move(folder / name, elsewhere / name)
        (folder / name).symlink_to(elsewhere / name)
    before = snapshot(elsewhere)
    started(folder, overwrite=True)
    assert snapshot(elsewhere) == before


def test_a_list_that_names_files_elsewhere_removes_none_there(tmp_path):
    folder = tmp_path / "r"
    finished_run(folder)
    put(tmp_path, "mine.txt")
    with (folder / "made.txt").open("a") as file:
        file.write(f"../mine.txt\n{tmp_path}/mine.txt\nadapter/../../mine.txt\n")
    started(folder, overwrite=True)
    assert (tmp_path / "mine.txt").is_file()


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe", b"everything\n*\n"])
def test_without_its_list_a_run_is_not_replaced(tmp_path, content):
    folder = tmp_path / "r"
    finished_run(folder)
    (folder / "made.txt").unlink()
    if content is not None:
        (folder / "made.txt").write_bytes(content)
    before = snapshot(folder)
    with pytest.raises(ValueError, match=r"made\.txt"):
        started(folder, overwrite=True)
    assert snapshot(folder) == before


def test_an_adapter_without_record_and_checkpoint_is_replaced_only_with_overwrite(tmp_path):
    folder = tmp_path / "r"
    finished_run(folder)
    shutil.rmtree(folder / "checkpoint-3")
    (folder / "run.json").unlink()
    before = snapshot(folder)
    with pytest.raises(ValueError, match=r"trained by a run without run\.json.*--overwrite"):
        started(folder)
    assert snapshot(folder) == before
    started(folder, overwrite=True)
    assert not (folder / "adapter").exists()


def test_nothing_is_written_before_the_run_begins(tmp_path):
    folder = tmp_path / "r"
    Run(folder, is_main=True).look(RECIPE, LAUNCH, overwrite=False)
    assert not folder.exists()
    finished_run(folder)
    before = snapshot(folder)
    run = Run(folder, is_main=True)
    start = run.look(RECIPE, LAUNCH, overwrite=True)
    assert start.at_stake
    run.fail("the data are not there", rank=0)
    assert snapshot(folder) == before


def test_a_run_that_began_meanwhile_is_not_written_over(tmp_path):
    folder = tmp_path / "r"
    run = Run(folder, is_main=True)
    start = run.look(RECIPE, LAUNCH, overwrite=False)
    started(folder)[0].release()
    before = snapshot(folder)
    with pytest.raises(ValueError, match="written by another process meanwhile"):
        run.begin(start, RECIPE, LAUNCH)
    assert snapshot(folder) == before


def test_progress_is_not_written_through_a_link(tmp_path):
    folder = tmp_path / "r"
    started(folder)[0].release()
    checkpoint(folder, 3)
    (tmp_path / "mine.json").write_text('{"step": 9, "train_seconds": 1.0, "noted": 1.0}')
    (folder / "progress.json").symlink_to(tmp_path / "mine.json")
    _, start = started(folder)
    assert "progress.json is no file of this run and was moved to" in start.warnings[0]
    progress.Notes(folder).write(4, 1.0)
    assert "9" in (tmp_path / "mine.json").read_text()


NO_FILES = {
    "a folder": lambda path: path.mkdir(),
    "a pipe": os.mkfifo,
    "a link": lambda path: path.symlink_to("elsewhere"),
    "a link to itself": lambda path: path.symlink_to(path.name),
}


@pytest.mark.parametrize("make", NO_FILES.values(), ids=NO_FILES)
@pytest.mark.parametrize("name", ["progress.json", LOCK, "made.txt", "checkpoint-9/manifest.json"])
def test_what_is_no_file_is_never_waited_for_or_written_through(tmp_path, name, make):
    folder = tmp_path / "r"
    started(folder)[0].release()
    checkpoint(folder, 3)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).unlink(missing_ok=True)
    make(folder / name)
    try:
        _, start = started(folder)
    except ValueError as error:
        assert name in f"{error}"
    else:
        assert start.checkpoint.endswith("checkpoint-3")
    assert not (folder / "elsewhere").exists()


@pytest.mark.parametrize("name", ["adapter", "tensorboard"])
def test_a_file_in_place_of_a_folder_is_named(tmp_path, name):
    started(tmp_path)
    put(tmp_path, name)
    with pytest.raises(ValueError, match=f"{name} is no folder, and the run needs one"):
        started(tmp_path)
    assert (tmp_path / name).read_text() == f"mine: {name}"


def test_what_a_kill_left_in_a_new_folder_is_no_obstacle(tmp_path):
    names = [f".{name}.host.9.part" for name in ("run.json", "made.txt")]
    put(tmp_path, *names)
    started(tmp_path)
    assert not set(names) & set(snapshot(tmp_path))


@pytest.mark.parametrize("name", ["x" * 300, "file/below"])
def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path, name):
    put(tmp_path, "file")
    with pytest.raises(ValueError, match="cannot be made: "):
        started(tmp_path / name)


def test_a_finished_run_outlives_every_launch_that_cannot_begin(finished, tmp_path, train_here):
    folder, fields, _ = finished
    shutil.copytree(folder, tmp_path / "run")
    put(tmp_path / "run", "notes.txt", "adapter/mine.txt", "checkpoint-77/mine.txt")
    own = {**fields, "output_dir": str(tmp_path / "run"), "overwrite": "true"}
    before = snapshot(tmp_path / "run")
    broken = {
        "dataset_name": str(tmp_path / "nowhere.jsonl"),
        "model_name_or_path": str(tmp_path / "no-model"),
        "lora_target_modules": "no_such_layer",
        "chat_template_path": str(tmp_path / "no.jinja"),
    }
    for field, value in broken.items():
        done = train_here({**own, field: value})
        assert done.returncode, field
        assert snapshot(tmp_path / "run") == before, field
    done = train_here(own)
    assert done.returncode == 0, done.stderr[-2000:]
    after = snapshot(tmp_path / "run")
    for name in ("notes.txt", "adapter/mine.txt", "checkpoint-77/mine.txt"):
        assert after[name] == before[name]
    assert {p.name for p in (tmp_path / "run").glob("checkpoint-*")} >= {
        "checkpoint-3",
        "checkpoint-6",
        "checkpoint-77",
    }
    assert read(tmp_path / "run")["status"] == "succeeded"
