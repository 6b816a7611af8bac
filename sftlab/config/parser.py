"""What was this run asked to do? Read the recipe and the command line.

The recipe is flat YAML (`--config`), and the command line overrides it. Field names are those of
trl's ModelConfig and SFTConfig; `DataArguments` adds those that they lack.
"""

import argparse
import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

from transformers.trainer_pt_utils import AcceleratorConfig
from trl import TrlParser

from sftlab.config.field_effects import REFUSED
from sftlab.config.foreign_names import unknown_field
from sftlab.config.launch import Launch
from sftlab.config.model_overrides import check_overrides
from sftlab.config.own_data import without_replaced_data
from sftlab.config.preference_fields import (
    REFUSED_OF_PAIRS,
    PreferenceArguments,
    of_the_other_method,
)
from sftlab.config.recipe import DataArguments, ModelArguments, Recipe, TrainingArguments
from sftlab.config.schedule import late_warmup
from sftlab.config.validation import resolve
from sftlab.field_words import field_name, field_words
from sftlab.yaml_files import read_yaml

# Words that unset a field of the recipe on the command line. `report_to none` is a value.
_UNSET = ("null", "none", "~")
# Fields that hold a mapping.
_MAPPINGS = (
    "model_init_kwargs",
    "lr_scheduler_kwargs",
    "accelerator_config",
    "gradient_checkpointing_kwargs",
    "activation_checkpointing_kwargs",
    "liger_kernel_config",
    "dataset_kwargs",
    "fsdp_config",
    "deepspeed",
)
# Fields that hold a mapping, or a list of mappings, as words.
_PAIRS, _PARTS = "columns", "datasets"
# Fields of module names, where 1 would name the second layer.
_NAMES = ("lora_target_modules", "lora_modules_to_save", "lora_target_parameters")
_KINDS = {"int": "a whole number", "float": "a number", "string_to_bool": "true or false"}


class _Parser(TrlParser):
    """trl's parser, but a mistake is a ValueError of one sentence, not 300 lines of usage."""

    def error(self, message: str) -> None:
        raise ValueError(f"{message} (see recipes/ for examples)")


def parse_recipe(argv: list[str], launch: Launch) -> Recipe:
    """Returns the recipe of `--config RECIPE.yaml` and command line fields, checked and resolved.

    `--field null` unsets a field of the recipe. Data and model are not looked at. Raises ValueError
    for an unknown field, a wrong type or value, a field that would have no effect, or a
    contradiction with the launch config.
    """
    argv = list(argv)
    path = _take_config(argv)
    settings = read_yaml(path) if path else {}
    if settings.get("trust_remote_code"):
        raise ValueError(
            f"{path} says trust_remote_code: a recipe is data, so pass --trust_remote_code on the "
            "command line if you trust the model's code"
        )
    words = field_words(argv)
    method = _method(settings, words)
    fields = PreferenceArguments if method == "dpo" else TrainingArguments
    parser = _Parser((DataArguments, fields, ModelArguments), allow_abbrev=False)
    known = {action.dest: action for action in parser._actions}
    _refuse_unknown(settings, known, f"{path}: ", method)
    _refuse_unknown(words, known, "", method)
    unset = [name for name, values in words.items() if _unsets(name, values)]
    argv, settings = _without(unset, argv), settings | dict.fromkeys(unset)
    named = [name for name in words if name not in unset]
    _refuse_unused([*(key for key, value in settings.items() if value), *named], method)
    for name in named:
        _check_words(name, words[name], known[name])
    settings, note = without_replaced_data(settings, argv, named)
    unlimited = settings.get("max_length", 0) is None and "max_length" not in named
    settings = {key: value for key, value in settings.items() if value is not None}
    for key, value in settings.items():
        _check_type(f"{path}: {key}", value, known[key])
    arguments = [item for key, value in settings.items() for item in _as_arguments(key, value)]
    data, training, model = _read(parser, arguments + argv)
    check_overrides(training.model_init_kwargs)
    if unlimited:  # null in any other field is the same as leaving it out
        training.max_length = None
    given = {name: _value(name, (data, training, model)) for name in [*settings, *named]}
    recipe = Recipe(data, training, model, given, [note] if note else [])
    late = late_warmup(training)
    if late and ("warmup_steps" in named) == ("max_steps" in named):
        raise ValueError(late)
    resolve(recipe, launch)
    return recipe._replace(notes=[*recipe.notes, late]) if late else recipe


def _unsets(name: str, values: list[str]) -> bool:
    one = values[0].lower() if len(values) == 1 else ""
    return one in _UNSET and (name, one) != ("report_to", "none")


def _without(names: list[str], argv: list[str]) -> list[str]:
    """Returns the words of a command line without those of some fields."""
    kept, dropping = [], False
    for word in argv:
        if named := field_name(word):
            dropping = named in names
        if not dropping:
            kept.append(word)
    return kept


def _read(
    parser: _Parser, words: list[str]
) -> tuple[DataArguments, TrainingArguments | PreferenceArguments, Any]:
    """Returns the three groups of fields. Raises ValueError of one sentence."""
    try:
        data, training, model, rest = parser.parse_args_and_config(
            words, return_remaining_strings=True
        )
    except (ValueError, TypeError, KeyError, OSError, OverflowError) as error:
        raise ValueError(" ".join(str(error).split())) from error
    if rest:
        raise ValueError(f"cannot read {' '.join(rest)!r}: every option is --field value")
    return data, training, model


def _check_type(place: str, value: Any, action: argparse.Action) -> None:
    """Raise ValueError for a value of the recipe that its field cannot hold."""
    if isinstance(value, list):
        if action.nargs not in ("+", "*"):
            raise ValueError(f"{place} is {value!r}: expected one value, not a list")
        wrong = list if action.dest == _PARTS else list | dict
        if nested := [one for one in value if isinstance(one, wrong)]:
            raise ValueError(f"{place} holds {nested[0]!r}: expected a list of words or numbers")
        if not value:
            raise ValueError(f"{place} is an empty list: leave it out, or name what it holds")
    elif action.dest in _MAPPINGS and not isinstance(value, dict):
        raise ValueError(f"{place} is {value!r}: expected a mapping such as {{key: 1}}")
    elif isinstance(value, dict):
        if action.dest not in (*_MAPPINGS, _PAIRS):
            raise ValueError(f"{place} is {value!r}: expected one value, not a mapping")
        if action.dest == "accelerator_config":
            _check_accelerator_config(place, value)
        return
    for one in value if isinstance(value, list) else [value]:
        if action.dest in _NAMES and not isinstance(one, str):
            raise ValueError(f"{place} holds {one!r}: expected names of modules")
        if isinstance(one, str) and "\0" in one:
            raise ValueError(f"{place} holds a zero byte: expected text")
        if callable(action.type):
            try:
                action.type(str(one))
            except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
                kind = _KINDS.get(getattr(action.type, "__name__", ""), "another value")
                raise ValueError(f"{place} is {one!r}: expected {kind}") from error
        if isinstance(one, float):
            _check_finite(place, one)


def _check_words(name: str, words: list[str], action: argparse.Action) -> None:
    """Raise ValueError for words of the command line that name no finite number or no mapping."""
    for word in words:
        if action.dest in _MAPPINGS:
            _check_mapping(name, word)
        elif "float" in (kind := getattr(action.type, "__name__", "")) or kind == "int":
            _check_finite(name, word)


def _check_finite(place: str, word: object) -> None:
    try:
        finite = math.isfinite(float(str(word)))
    except ValueError:  # argparse says what was expected
        return
    if not finite:
        raise ValueError(f"{place} is {word}: expected a finite number")


def _check_mapping(name: str, word: str) -> None:
    try:
        found = json.loads(word)
    except (ValueError, RecursionError) as error:
        raise ValueError(f'{name} is {word!r}: expected JSON such as {{"key": 1}}') from error
    if not isinstance(found, dict):
        raise ValueError(f'{name} is {word!r}: expected a mapping such as {{"key": 1}}')
    if name == "accelerator_config":
        _check_accelerator_config(name, found)


def _check_accelerator_config(place: str, found: Mapping[str, object]) -> None:
    known = [one.name for one in dataclasses.fields(AcceleratorConfig)]
    if unknown := [key for key in found if key not in known]:
        raise ValueError(f"{place} holds {unknown[0]!r}: expected some of {', '.join(known)}")


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


def check_names(names: Iterable[str], place: str = "") -> None:
    """Raise ValueError for a name that is no field, or a field without effect."""
    _refuse_unknown(names, fields_of_recipes(), place)
    _refuse_unused(list(names))


def fields_of_recipes() -> dict[str, dataclasses.Field]:
    """Returns every field that a recipe of either method may set."""
    groups = (DataArguments, TrainingArguments, PreferenceArguments, ModelArguments)
    return {one.name: one for group in groups for one in dataclasses.fields(group)}


def _method(settings: Mapping[str, object], words: Mapping[str, list[str]]) -> object:
    """Returns the training's method: the command line's, the recipe's, or sft."""
    return words["method"][-1] if words.get("method") else settings.get("method") or "sft"


def _refuse_unknown(
    names: Iterable[str], known: Mapping[str, object], place: str, method: object = None
) -> None:
    refused = REFUSED | (REFUSED_OF_PAIRS if method == "dpo" else {})
    for name in names:
        if name in known or name in refused:
            continue
        if why := of_the_other_method(name, str(method)):
            raise ValueError(place + why)
        raise ValueError(place + unknown_field(name, known))


def _refuse_unused(names: list[str], method: object = None) -> None:
    refused = REFUSED | (REFUSED_OF_PAIRS if method == "dpo" else {})
    for name in names:
        if name in refused:
            raise ValueError(f"{name} is not used here: {refused[name]}")


def _as_arguments(key: str, value: Any) -> list[str]:
    if isinstance(value, dict) and key == _PAIRS:
        return [f"--{key}", *(f"{ours}={theirs}" for ours, theirs in value.items())]
    if isinstance(value, dict):
        return [f"--{key}", json.dumps(value)]
    if isinstance(value, list):
        words = (json.dumps(one) if isinstance(one, dict) else str(one) for one in value)
        return [f"--{key}", *words]
    return [f"--{key}={value}"]


def _value(name: str, groups: tuple) -> Any:
    return next(getattr(group, name) for group in groups if hasattr(group, name))
