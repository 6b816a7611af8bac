"""What the tests of eval/quality.py share."""

import json

from safetensors.torch import load_file, save_file

SHORT = ("--max_new_tokens", "16")


def report(run, name="quality"):
    return json.loads((run / "eval" / f"{name}.json").read_text())


def change_adapter(run, change):
    path = run / "adapter" / "adapter_model.safetensors"
    save_file({name: change(name, tensor) for name, tensor in load_file(path).items()}, path)
