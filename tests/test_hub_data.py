"""JSON and CSV of a data set on the hub are read as local files are: text stays as it stands."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT, answered, write_jsonl
from datasets.packaged_modules.csv.csv import CsvConfig
from datasets.packaged_modules.json.json import JsonConfig
from hub_server import SHA, serve_dataset
from huggingface_hub.errors import OfflineModeIsEnabled

from sftlab.config.recipe import DataArguments
from sftlab.data.splits import load_splits

WORDS = ["00199", "99.50", "True", "2024-01-02T10:00:00Z", "NA"]
NAME = "me/mine"
CODE = """
import json, sys
sys.path[:0] = ["tests"]
from test_hub_data import answers
print(json.dumps(answers(sys.argv[1] == "stream")))
"""


def answers(streaming=False, **fields):
    data = DataArguments(
        dataset_name=NAME, split_fractions=[1.0, 0.0, 0.0], dataset_streaming=streaming, **fields
    )
    return [row["completion"][0]["content"] for row in answered(load_splits(data).train)]


def write_rows(path):
    rows = [{"question": f"Odd {i}?", "answer": word} for i, word in enumerate(WORDS)]
    if path.suffix == ".csv":
        lines = [",".join(row.values()) for row in rows]
        path.write_text("\n".join(["question,answer", *lines]) + "\n")
    else:
        write_jsonl(path, rows)
    return path


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with one data set; `file` is what it has, `reached` whether it answers."""
    hub = SimpleNamespace(file=None, reached=True, config=JsonConfig)

    def builder(name, config):
        if not hub.reached:
            raise ConnectionError("no route")
        kind = "csv" if hub.config is CsvConfig else "json"
        found = hub.config()
        found.data_files = {"train": [f"hf://datasets/{NAME}@{SHA}/{hub.file.name}"]}
        if hub.separator:
            found.sep = hub.separator
        return SimpleNamespace(info=SimpleNamespace(builder_name=kind), config=found)

    hub.separator = None
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("sftlab.data.hub_files.load_dataset_builder", builder)
    monkeypatch.setattr("sftlab.data.hub_files.hf_hub_download", lambda *_, **__: str(hub.file))
    return hub


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_text_of_the_hub_stays_as_it_is_and_is_read_again_without_the_hub(hub, tmp_path, suffix):
    hub.file = write_rows(tmp_path / f"rows.{suffix}")
    hub.config = CsvConfig if suffix == "csv" else JsonConfig
    assert answers() == WORDS
    hub.reached = False
    assert answers() == WORDS


def test_a_split_that_is_not_there_is_named(hub, tmp_path):
    hub.file = write_rows(tmp_path / "rows.jsonl")
    with pytest.raises(ValueError, match=r"has no split 'validation': it has train"):
        answers(dataset_train_split="validation")


def test_files_that_need_another_reading_are_refused(hub, tmp_path):
    hub.file, hub.config, hub.separator = write_rows(tmp_path / "rows.csv"), CsvConfig, ";"
    with pytest.raises(ValueError, match=r"the card of me/mine has sep: ';'"):
        answers()


def test_without_the_hub_and_without_files_the_data_set_is_said_to_be_missing(hub, monkeypatch):
    hub.reached = False
    with pytest.raises(ValueError, match="is not in the cache, and the hub cannot be reached"):
        answers()
    # `datasets` may have kept rows whose columns it gave types
    typed = SimpleNamespace(
        info=SimpleNamespace(builder_name="json"), config=SimpleNamespace(data_files=None)
    )
    monkeypatch.setattr("sftlab.data.hub_files.load_dataset_builder", lambda *_: typed)
    with pytest.raises(ValueError, match="only rows with types are in the cache"):
        answers()


def test_a_file_that_was_not_downloaded_is_named(hub, tmp_path, monkeypatch):
    def download(*_, **__):
        raise OfflineModeIsEnabled("rows.jsonl is not in the cache")

    hub.file = write_rows(tmp_path / "rows.jsonl")
    monkeypatch.setattr("sftlab.data.hub_files.hf_hub_download", download)
    with pytest.raises(ValueError, match=r"me/mine is not in the cache.*rows\.jsonl"):
        answers()


@pytest.mark.long
def test_the_libraries_themselves_read_the_files_of_a_hub(tmp_path):
    (tmp_path / "files").mkdir()
    write_rows(tmp_path / "files" / "train.jsonl")
    server = serve_dataset(tmp_path / "files", NAME)
    told = {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "home"),
        "PYTHONPATH": str(ROOT),
    }

    def read(how, offline):
        environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        environment |= told | {"HF_HUB_OFFLINE": offline}
        command = [sys.executable, "-c", CODE, how]
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout.splitlines()[-1])

    assert read("stream", "0") == WORDS
    assert read("whole", "0") == WORDS
    server.shutdown()
    assert read("whole", "1") == WORDS
