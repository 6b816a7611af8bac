"""What was this run asked to do? Read the recipe and the command line.

The recipe is flat YAML (`--config`), and the command line overrides it. Field names are those of
trl's ModelConfig and SFTConfig; `DataArguments` adds those that they lack.
"""

import difflib
import json
from typing import Any

from trl import TrlParser

from sftlab.config.launch import Launch
from sftlab.config.model_overrides import check_overrides
from sftlab.config.own_data import without_replaced_data
from sftlab.config.recipe import DataArguments, ModelArguments, Recipe, TrainingArguments
from sftlab.config.validation import resolve
from sftlab.yaml_files import read_yaml

# Fields that trl accepts and this project decides elsewhere. Setting one would have no effect, so
# it is refused.
REFUSED = {
    "resume_from_checkpoint": "start the same command again, and an interrupted run continues",
    "do_train": "sft.py always trains",
    "do_eval": "use eval_strategy",
    "do_predict": "use the scripts in eval/",
    "fsdp": "the launch config decides: accelerate_configs/fsdp.yaml",
    "fsdp_config": "the launch config decides: accelerate_configs/fsdp.yaml",
    "deepspeed": "the launch config decides",
    "use_cpu": "the launch config decides: accelerate_configs/cpu.yaml",
    "bf16_full_eval": "the launch config decides the precision",
    "fp16_full_eval": "the launch config decides the precision",
    "push_to_hub": "upload the finished adapter instead: hf upload NAME RUN/adapter",
    "packing_strategy": "packing concatenates the whole rows of a micro-batch",
    "padding_free": "packing decides",
    "eval_packing": "packing decides",
    "use_liger_kernel": "compile_layers and fused_loss do its work",
    "save_only_model": "a checkpoint without the optimizer cannot be continued from",
    "full_determinism": "deterministic does it faster, and covers the fast path's kernels",
    "ignore_data_skip": "a continued run trains on the rows that are left",
    "restore_callback_states_from_checkpoint": "a continued run is exact without it",
    "enable_jit_checkpoint": "TERM, USR1 and Ctrl-C already end in a checkpoint",
    "auto_find_batch_size": "runs whose batch size was found by trial cannot be compared",
}


class _Parser(TrlParser):
    """trl's parser, but a mistake is a ValueError of one sentence, not 300 lines of usage."""

    def error(self, message: str) -> None:
        raise ValueError(f"{message} (see recipes/ for examples)")


def parse_recipe(argv: list[str], launch: Launch) -> Recipe:
    """Returns the recipe of `--config RECIPE.yaml` and command line fields, checked and resolved.

    Data and model are not looked at. Raises ValueError for an unknown field, a wrong type or value,
    a field that would have no effect, or a contradiction with the launch config.
    """
    argv = list(argv)
    path = _take_config(argv)
    settings = read_yaml(path) if path else {}
    if settings.get("trust_remote_code"):
        raise ValueError(
            f"{path} says trust_remote_code: a recipe is data, so pass --trust_remote_code on the "
            "command line if you trust the model's code"
        )
    parser = _Parser((DataArguments, TrainingArguments, ModelArguments), allow_abbrev=False)
    known = {action.dest for action in parser._actions}
    named = [a[2:].split("=")[0].replace("-", "_") for a in argv if a.startswith("--")]
    _refuse_unknown([*settings, *named], known)
    _refuse_unused([*(key for key, value in settings.items() if value), *named])
    settings, note = without_replaced_data(settings, argv, named)
    unlimited = settings.get("max_length", 0) is None and "max_length" not in named
    settings = {key: value for key, value in settings.items() if value is not None}
    arguments = [item for key, value in settings.items() for item in _as_arguments(key, value)]
    data, training, model, rest = parser.parse_args_and_config(
        arguments + argv, return_remaining_strings=True
    )
    if rest:
        raise ValueError(f"cannot read {' '.join(rest)!r}: every option is --field value")
    check_overrides(training.model_init_kwargs)
    if unlimited:  # null in any other field is the same as leaving it out
        training.max_length = None
    given = {name: _value(name, (data, training, model)) for name in [*settings, *named]}
    recipe = Recipe(data, training, model, given, [note] if note else [])
    resolve(recipe, launch)
    return recipe


def _take_config(argv: list[str]) -> str | None:
    for index, argument in enumerate(argv):
        if argument == "--config":
            if index + 1 == len(argv):
                raise ValueError(
                    "--config needs the path of a recipe, for example recipes/demo/attn_r16.yaml"
                )
            path = argv[index + 1]
            del argv[index : index + 2]
            return path
        if argument.startswith("--config="):
            return argv.pop(index).split("=", 1)[1]
    return None


def _refuse_unknown(names: list[str], known: set[str]) -> None:
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"unknown field {name!r}{hint}")


def _refuse_unused(names: list[str]) -> None:
    for name in names:
        if name in REFUSED:
            raise ValueError(f"{name} is not used here: {REFUSED[name]}")


def _as_arguments(key: str, value: Any) -> list[str]:
    if isinstance(value, dict):
        return [f"--{key}", json.dumps(value)]
    if isinstance(value, list):
        return [f"--{key}", *map(str, value)]
    return [f"--{key}={value}"]


def _value(name: str, groups: tuple) -> Any:
    return next(getattr(group, name) for group in groups if hasattr(group, name))
