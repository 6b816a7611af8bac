"""Tune a model on preferences with LoRA on trl's DPOTrainer; writes a run directory.

python recipes/dpo.py --config_file accelerate_configs/cpu.yaml \
    --config recipes/demo-dpo/attn_r16.yaml
python recipes/dpo.py --config_file accelerate_configs/ddp.yaml --num_processes 4 \
    --config RECIPE.yaml --adapter_name_or_path runs/SFT_RUN [--any_field value]

It is recipes/sft.py with `--method dpo`, which takes the place of this process: run directory,
continuation, signals and summary are those of every training. The fields are those of trl's
ModelConfig and DPOConfig.
"""

import os
import sys
from pathlib import Path


def main(argv: list[str]) -> None:
    """Become recipes/sft.py with the method dpo."""
    script = Path(__file__).with_name("sft.py")
    os.execv(sys.executable, [sys.executable, str(script), "--method", "dpo", *argv])


if __name__ == "__main__":
    main(sys.argv[1:])
