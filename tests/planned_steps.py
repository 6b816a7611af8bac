"""Recipes and forecasts for the tests of planning."""

from transformers import LlamaConfig

from sftlab.config.launch import exported, launched
from sftlab.config.parser import parse_recipe
from sftlab.models.random_models import MODEL_SHAPES
from sftlab.planning.gpu_specs import GPUS
from sftlab.planning.plan import make_plan
from sftlab.planning.row_lengths import RowLengths

RECIPE = ["--config", "recipes/llama3.2-1b/attn_r16.yaml"]
SAID = [*RECIPE, "--random", "llama3.2-1b", "--rows", "38105", "--row_tokens", "315"]
ATTENTION = ["q_proj", "v_proj", "o_proj"]
ALL = [*ATTENTION, "k_proj", "gate_proj", "up_proj", "down_proj"]


def forecast(launch="single", gpu="h200", rows=None, shape="llama3.2-1b", flags=None, **fields):
    targets = fields.pop("targets", None)
    argv = [*RECIPE, *(f"--{k}={v}" for k, v in fields.items())]
    argv += ["--lora_target_modules", *targets] if targets else []
    with launched(exported(f"accelerate_configs/{launch}.yaml", flags)) as asked:
        recipe = parse_recipe(argv, asked)
        rows = rows or RowLengths(38_000, 315, 140, 512, "said")
        return make_plan(recipe, LlamaConfig(**MODEL_SHAPES[shape]), asked, GPUS[gpu], rows)
