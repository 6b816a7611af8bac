"""A record that cannot be read is no licence to write or remove."""

import json
import os

import pytest
from run_folders import checkpoint, finished_run, snapshot, started

from sftlab.runs.run_directory import read_run


def without(*keys):
    def change(path):
        record = json.loads(path.read_text())
        for key in keys:
            del record[key]
        path.write_text(json.dumps(record))

    return change


def with_(**values):
    return lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | values))


def as_bytes(content):
    return lambda path: path.write_bytes(content)


DAMAGED = {
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:200]), "is not JSON"),
    "empty": (as_bytes(b""), "it is empty"),
    "blank": (as_bytes(b" \n\n"), "it is empty"),
    "zeros": (as_bytes(bytes(300)), "it is empty"),
    "binary": (as_bytes(b"\x89PNG\r\n\xff\xfe"), "it is not text"),
    "a list": (as_bytes(b"[]"), r"holds \[\], expected a JSON object"),
    "null": (as_bytes(b"null"), "holds null, expected a JSON object"),
    "nested": (as_bytes(b"[" * 100_000), "is not JSON"),
    "no keys": (as_bytes(b"{}"), "has no status, expected one of running"),
    "no recipe": (without("recipe"), "has no recipe, expected an object"),
    "no launch": (without("launch"), "has no launch, expected an object"),
    "an unknown status": (with_(status="done"), 'status is "done", expected one of running'),
    "a status that is no text": (with_(status=["succeeded"]), "status is .*, expected one of"),
    "a null recipe": (with_(recipe=None), "recipe is null, expected an object"),
    "interruptions that are none": (with_(interruptions=5), "interruptions is 5, expected a list"),
    "a finish that is no time": (with_(finished=5), "finished is 5, expected a text or null"),
    "a host alone": (with_(host_pid=["here"]), "host_pid is .*, expected a host and a process id"),
    "losses": (with_(losses=[[1, "low"]]), "losses is .*, expected a list, each a step and a loss"),
    "a key twice": (
        lambda path: path.write_text('{"status": "failed", "status": "succeeded"}'),
        "the key 'status' stands there twice",
    ),
    "a speed that is none": (
        with_(measured={"tokens_per_s": float("nan")}),
        "measured.tokens_per_s is NaN, expected a finite number",
    ),
    "memory of a rank": (
        with_(measured={"peak_memory": [{"resident_gb": "much"}]}),
        "measured.peak_memory is .*, expected a list of objects, each with resident_gb",
    ),
    "memory of a step": (
        with_(measured={"peak_memory": [{"resident_gb": 1, "step": {"peak_gb": []}}]}),
        "measured.peak_memory is ",
    ),
    "collectives": (
        with_(measured={"collectives": {"all_reduce": 5}}),
        "measured.collectives is .*, expected an object of calls and mb",
    ),
    "hardware": (with_(hardware={"gpu": [1]}), "hardware is .*, expected an object of texts"),
    "versions": (with_(versions={"torch": {}}), "versions is .*, expected an object of texts"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "cannot be read: it is a folder"),
    "a pipe": (lambda path: (path.unlink(), os.mkfifo(path)), "cannot be read: it is a pipe"),
    "a link to nothing": (lambda path: (path.unlink(), path.symlink_to("x")), "No such file"),
}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(("damage", "said"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_record_is_no_licence_to_write(tmp_path, damage, said, overwrite):
    folder = tmp_path / "r"
    finished_run(folder)
    damage(folder / "run.json")
    before = snapshot(folder)
    with pytest.raises(ValueError, match=rf"run\.json.*{said}.*Nothing in .* was changed"):
        started(folder, overwrite=overwrite)
    with pytest.raises(ValueError, match=said):
        read_run(folder)
    assert snapshot(folder) == before


def test_once_a_damaged_record_is_moved_away_the_run_continues_and_loses_nothing(tmp_path):
    folder = tmp_path / "r"
    started(folder)
    good = checkpoint(folder, 3)
    (folder / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"move run\.json out of it, and .* from checkpoint-3"):
        started(folder)
    (folder / "run.json").rename(folder / "mine.json")
    assert started(folder)[1].checkpoint == good
    assert (folder / "mine.json").read_text() == "{"
