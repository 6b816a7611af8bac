"""Studies that the tests start."""

import json

from conftest import load_script

SCRIPT = load_script("recipes/study.py")


TWO = {"r4": {"lora_r": 4, "lora_alpha": 8}, "r2": {"lora_r": 2, "lora_alpha": 4}}


def ended(folder, status, reason=None, **measured):
    folder.mkdir(parents=True, exist_ok=True)
    record = {"status": status, "reason": reason, "measured": measured, "launch": {}}
    record |= {"recipe": {"model_name_or_path": "base"}, "template": {"hash": "0"}}
    (folder / "run.json").write_text(json.dumps(record), encoding="utf-8")
