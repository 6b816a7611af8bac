"""Run directories that begin, with checkpoints and files in them."""

import os

from sftlab.runs.checkpoint_manifest import seal
from sftlab.runs.environment import environment
from sftlab.runs.made_files import MadeFiles
from sftlab.runs.run_directory import Run, must_match

RECIPE = {
    "model_name_or_path": "base",
    "learning_rate": 0.1,
    "overwrite": False,
    "output_dir": "here",
}


LAUNCH = {"world_size": 1}


DATA = {"data": {"train": {"rows": 10, "fingerprint": "abc"}}, "template": {"hash": "xyz"}}


def started(folder, recipe=None, overwrite=False, world_size=1, anyway=False, extend=False):
    run, recipe, launch = Run(folder, is_main=True), recipe or RECIPE, {"world_size": world_size}
    start = run.look(recipe, launch, overwrite, anyway, extend)
    start.warnings += run.begin(start, recipe, launch, **DATA)
    return run, start


def checkpoint(folder, step, sealed=True, recipe=None):
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "optimizer.pt").write_text("state")
    if sealed:
        now = environment()
        must = must_match(recipe or RECIPE, {"world_size": 1}, now) | DATA
        facts = {
            "step": step,
            "saved": 0.0,
            "train_seconds": 2.0,
            "must_match": must,
            "hardware": now["hardware"],
        }
        seal(path, facts)
    else:
        MadeFiles(folder).note([f"{path.name}/"])
    return str(path)


def snapshot(folder):
    """Every file below a folder and its bytes."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def put(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"mine: {name}")


def finished_run(folder):
    """A finished run with an adapter, a checkpoint, curves and an evaluation."""
    run, _ = started(folder)
    put(folder, "adapter/adapter_model.safetensors", "adapter/README.md", "progress.json")
    run.made.note_files(
        [folder / "adapter" / n for n in ("adapter_model.safetensors", "README.md")]
    )
    curve = f"tensorboard/events.out.tfevents.1.{os.uname().nodename}.{os.getpid()}.0"
    put(folder, curve, "eval/quality.json", "eval/quality.jsonl", "eval/answers-0123456789ab.jsonl")
    put(folder, "eval/alpaca-judgements-0123abcd.jsonl", "eval/harness/mmlu-chat-0shot.jsonl")
    checkpoint(folder, 3)
    run.finish("succeeded")
    return set(snapshot(folder))
