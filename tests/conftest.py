"""Fixtures of every test: a tiny base model, rows for it, and trainings as a user starts them."""

import own_cores  # noqa: F401, I001  (before torch counts the cores)

import fcntl
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import fork_server
import pytest
from file_order import pytest_collection_modifyitems, pytest_xdist_make_scheduler  # noqa: F401
from tiny_base import (  # noqa: F401
    answered,
    byte_tokenizer,
    writes_letters,
    instruction_rows,
    pair_rows,
    write_base,
    write_jsonl,
)
from transformers import PreTrainedTokenizerFast

from sftlab.config.launch import exported
from sftlab.files import write_json
from sftlab.training import stop_on_signal

pytest_plugins = ("report_runs", "running_apps", "browser_pages", "preference_runs")
ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared" / "data"
needs_shared = pytest.mark.skipif(
    not SHARED.is_dir(), reason="the shared data sets are not beside this checkout"
)


@pytest.fixture(autouse=True, scope="session")
def _offline():
    os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(autouse=True, scope="session")
def run_folder(tmp_path_factory) -> Path:
    """The folder that all workers of this test run share."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    fork_server.FOLDER = folder / "fork_server"
    return folder


@pytest.fixture(scope="session")
def build_once(run_folder) -> Callable[[str, Callable[[Path], object]], Path]:
    """Returns a function that gives the folder NAME of this test run.

    The first worker that asks builds it; the others wait.
    """

    def build_once(name: str, build: Callable[[Path], object]) -> Path:
        folder, mark = run_folder / name, run_folder / f"{name}.built"
        with (run_folder / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not mark.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                build(folder)
                mark.touch()
        return folder

    return build_once


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture(scope="session")
def base(build_once) -> Path:
    """Folder of a random two-layer Llama of hidden size 32 (float32)."""
    return build_once("base", write_base)


@pytest.fixture(scope="session")
def rows(build_once) -> Path:
    """200 rows in Dolly's shape."""
    folder = build_once("rows", lambda it: write_jsonl(it / "rows.jsonl", instruction_rows(200)))
    return folder / "rows.jsonl"


def short_fields(base: Path, rows: Path, folder: Path) -> dict[str, str]:
    """Overrides that turn recipes/demo/attn_r16.yaml into a run of seconds."""
    return {
        "model_name_or_path": str(base),
        "dataset_name": str(rows),
        "output_dir": str(folder),
        "max_steps": "6",
        "global_batch_size": "8",
        "per_device_train_batch_size": "8",
        "max_length": "128",
        "logging_steps": "1",
        "warmup_steps": "1",
        "save_steps": "3",
        "learning_rate": "0.01",
    }


@pytest.fixture
def fields(base, rows, tmp_path) -> dict[str, str]:
    return short_fields(base, rows, tmp_path / "run")


def arguments(
    fields: dict[str, str | list[str]], recipe: str = "recipes/demo/attn_r16.yaml"
) -> list[str]:
    several = [word for k, v in fields.items() if isinstance(v, list) for word in (f"--{k}", *v)]
    one = [f"--{k}={v}" for k, v in fields.items() if not isinstance(v, list)]
    return ["--config", str(ROOT / recipe), *one, *several]


def launch_command(
    config: str, fields: dict[str, str], flags: tuple[str, ...] = (), cold: bool = False
) -> list[str]:
    """`accelerate launch --config_file accelerate_configs/CONFIG.yaml FLAGS recipes/sft.py --config
    ...`

    It starts from the fork server; a cold launch is the console script that a user types.
    """
    accelerate = [str(Path(sys.executable).parent / "accelerate")]
    if not cold:
        accelerate = [fork_server.python(), "-m", "accelerate.commands.accelerate_cli"]
    return [
        *accelerate,
        "launch",
        *("--config_file", str(ROOT / "accelerate_configs" / f"{config}.yaml"), *flags),
        *(str(ROOT / "recipes" / "sft.py"), *arguments(fields)),
    ]


def launch(
    config: str, fields: dict[str, str], flags: tuple[str, ...] = (), cold: bool = False
) -> subprocess.CompletedProcess:
    command = launch_command(config, fields, flags, cold)
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)


def launched(
    config: str, fields: dict[str, str], flags: tuple[str, ...] = (), cold: bool = False
) -> subprocess.CompletedProcess:
    """A launch that succeeds."""
    done = launch(config, fields, flags, cold)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def read(folder: str | Path) -> dict:
    return json.loads((Path(folder) / "run.json").read_text())


def load_script(path: str):
    """A script of the project as a module."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def sft():
    """recipes/sft.py in this process, for input that it must refuse before it loads anything."""
    return load_script("recipes/sft.py")


@pytest.fixture
def handlers():
    """What a training in this process does with signals ends with the test."""
    before = {number: signal.getsignal(number) for number in stop_on_signal.SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def train_here(sft, monkeypatch, handlers, capfd):
    """A run under cpu.yaml in this process:

    what a launch does, less the imports, which are most of so short a one.
    """

    def train(fields: dict[str, str]) -> subprocess.CompletedProcess:
        for name, value in exported(ROOT / "accelerate_configs" / "cpu.yaml").items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "")
        capfd.readouterr()
        code: object = 0
        try:
            sft.main(arguments(fields))
        except SystemExit as ended:
            code = ended.code
        except Exception:  # as python itself ends
            code = traceback.format_exc()
        said = capfd.readouterr()
        errors = said.err + (code if isinstance(code, str) else "")
        return subprocess.CompletedProcess([], int(bool(code)), said.out, errors)

    return train


@pytest.fixture
def trained_here(train_here):
    """A run in this process that succeeds."""

    def train(fields: dict[str, str]) -> subprocess.CompletedProcess:
        done = train_here(fields)
        assert done.returncode == 0, done.stderr[-3000:]
        return done

    return train


@pytest.fixture(scope="session")
def finished(base, rows, build_once) -> tuple[Path, dict[str, str], subprocess.CompletedProcess]:
    """Folder, fields and output of one undisturbed run under cpu.yaml: six steps, evaluated."""

    def train(folder: Path) -> None:
        fields = {**short_fields(base, rows, folder / "run"), "lora_dropout": "0.1"}
        done = launched("cpu", fields, cold=True)
        output = {"stdout": done.stdout, "stderr": done.stderr}
        write_json(folder / "launch.json", {"fields": fields, **output})

    folder = build_once("finished", train)
    kept = json.loads((folder / "launch.json").read_text())
    done = subprocess.CompletedProcess([], 0, kept["stdout"], kept["stderr"])
    return folder / "run", kept["fields"], done


def copy_of(run: Path, folder: Path) -> Path:
    """A run directory without what evaluations found."""
    shutil.copytree(run / "adapter", folder / "adapter")
    shutil.copy(run / "run.json", folder / "run.json")
    return folder


def records(folder: Path) -> list[dict]:
    """The lines of quality.jsonl."""
    return [
        json.loads(line) for line in (folder / "eval" / "quality.jsonl").read_text().splitlines()
    ]


@pytest.fixture(scope="session")
def untrained(base, build_once) -> Path:
    """The directory of a succeeded run whose adapter is random."""
    from judging import untrained_run  # it takes what it needs from here

    return build_once("judged", lambda folder: untrained_run(base, folder / "run")) / "run"


@pytest.fixture
def run(untrained, tmp_path) -> Path:
    """The untrained run for one test alone, with no evaluation beside it."""
    (tmp_path / "run").mkdir()
    for name in ("adapter", "run.json"):
        (tmp_path / "run" / name).symlink_to(untrained / name)
    return tmp_path / "run"
