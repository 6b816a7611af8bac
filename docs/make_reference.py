"""Write docs/reference.md: every field of a recipe, from the code that reads it.

python docs/make_reference.py

The fields, defaults and meanings are those of sftlab/config/recipe.py and of the trl and
transformers classes it extends, in the versions of requirements.txt.
"""

import dataclasses
import enum
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainingArguments as TransformersArguments
from trl import ModelConfig, SFTConfig

from sftlab.config.field_effects import REFUSED
from sftlab.config.own_fields import OwnFields
from sftlab.config.preference_fields import REFUSED_OF_PAIRS, PreferenceArguments
from sftlab.config.recipe import DataArguments, ModelArguments, TrainingArguments

PAGE = Path(__file__).parent / "reference.md"
# Set by the launcher or by the parser, never by a recipe.
INTERNAL = {"local_rank", "deepspeed_plugin", "parallelism_config", "hub_token"}
# Defaults that depend on the machine.
BY_MACHINE = {"accelerator_config": "every process reads for itself; copies do not wait (on a GPU)"}
HEAD = """\
# Every field of a recipe

```
python recipes/sft.py --config_file accelerate_configs/cpu.yaml \\
    --config recipes/demo/attn_r16.yaml --learning_rate 1e-3 --lora_r 8
```

Every field is a line of a recipe (`field: value`) or an option (`--field value`). The command line
beats the recipe, and `--field null` unsets a field of the recipe. An unknown field is an error: it
names the field that was meant, for names of axolotl, LLaMA-Factory and Unsloth too.

`python docs/make_reference.py` writes this page from the code, and a test compares the two.
[training.md](training.md) says which fields matter first.
"""
WORDS = 45


def main() -> None:
    """Write the page."""
    PAGE.write_text(page(), encoding="utf-8")
    print(f"{PAGE.name}: {page().count(chr(10))} lines")


def page() -> str:
    """Returns the whole page as Markdown."""
    parts = [HEAD]
    for title, intro, fields in sections():
        parts.append(f"## {title}\n\n{intro}\n\n{table(fields)}")
    parts.append(
        "## Refused fields\n\n"
        "trl and transformers know these fields. Here they would have no effect, so setting one is "
        f"an error.\n\n{refused(REFUSED)}\n"
    )
    parts.append(
        "## Refused in preference tuning\n\n"
        "With `method: dpo`, setting one of these fields is an error too.\n\n"
        f"{refused(REFUSED_OF_PAIRS)}\n"
    )
    return "\n".join(parts)


def refused(fields: Mapping[str, str]) -> str:
    """Returns a table of fields that may not be set."""
    rows = [f"| `{name}` | {cell(why)} |" for name, why in fields.items()]
    return "\n".join(["| field | instead |", "| --- | --- |", *rows])


def sections() -> Iterator[tuple[str, str, list[dataclasses.Field]]]:
    """Yields title, introduction and fields of each section, every field once."""
    ours, model = own(TrainingArguments) | own(OwnFields), own(ModelArguments)
    sft, trainer = own(SFTConfig), {f.name for f in dataclasses.fields(TransformersArguments)}
    training = [f for f in fields_of(TrainingArguments) if f.name not in ours]
    yield "Data", "This project's own fields.", fields_of(DataArguments)
    yield (
        "The run",
        "This project's own fields, and those whose default it changes.",
        [
            *(f for f in fields_of(TrainingArguments) if f.name in ours),
            *(f for f in fields_of(ModelArguments) if f.name in model),
        ],
    )
    yield (
        "Model and LoRA",
        "Fields of trl's `ModelConfig`.",
        [f for f in fields_of(ModelConfig) if f.name not in model],
    )
    first = [f for f in training if f.name in sft or f.name not in trainer]
    yield "Training: trl", "Fields of trl's `SFTConfig`.", first
    yield (
        "Training: transformers",
        "Fields of transformers' `TrainingArguments`.",
        [f for f in training if f not in first],
    )
    sft_fields = {f.name for f in dataclasses.fields(TrainingArguments)}
    other = [f for f in fields_of(PreferenceArguments) if differs(f, sft_fields)]
    yield (
        "Preference tuning",
        "Fields that a recipe with `method: dpo` has besides, or with another default: those of "
        "trl's `DPOConfig`.",
        [f for f in other if f.name not in REFUSED_OF_PAIRS and f.name != "method"],
    )


def differs(field: dataclasses.Field, known: set[str]) -> bool:
    """Returns whether preference tuning alone has a field, or has it with another default."""
    if field.name not in known:
        return True
    sft = TrainingArguments.__dataclass_fields__[field.name]
    return default(sft) != default(field)


def own(cls: type) -> set[str]:
    """Returns the fields that the class itself declares."""
    return set(vars(cls).get("__annotations__", {}))


def fields_of(cls: type) -> list[dataclasses.Field]:
    """Returns the fields of a class that a recipe may set."""
    kept = (f for f in dataclasses.fields(cls) if f.init and not f.name.startswith("_"))
    return [f for f in kept if f.name not in REFUSED and f.name not in INTERNAL]


def table(fields: list[dataclasses.Field]) -> str:
    """Returns a row a field: name, default, meaning."""
    rows = [f"| `{f.name}` | {default(f)} | {cell(meaning(f))} |" for f in fields]
    return "\n".join(["| field | default | meaning |", "| --- | --- | --- |", *rows]) + "\n"


def default(field: dataclasses.Field) -> str:
    """Returns the default as a recipe would write it."""
    if field.name in BY_MACHINE:
        return BY_MACHINE[field.name]
    value: Any = field.default
    if value is dataclasses.MISSING:
        value = field.default_factory() if callable(field.default_factory) else None
    if value is None:
        return "unset"
    if isinstance(value, enum.Enum):
        value = value.value
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value if value != '' else repr(value)}`"


def meaning(field: dataclasses.Field) -> str:
    """Returns the first sentences of the help, and the choices where there are some."""
    text = " ".join(str(field.metadata.get("help") or "").replace("%%", "%").split())
    kept: list[str] = []
    for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z`])", text):
        if kept and len(" ".join([*kept, sentence]).split()) > WORDS:
            break
        kept.append(sentence)
    choices = field.metadata.get("choices")
    listed = [f"One of {', '.join(f'`{choice}`' for choice in choices)}."] if choices else []
    return " ".join([*kept, *listed]) or "Not documented by its library."


def cell(text: str) -> str:
    """Returns the text as it may stand in a table."""
    return text.replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    main()
