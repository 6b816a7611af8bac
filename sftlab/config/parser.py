"""One way in for configuration: the recipe (flat YAML, `--config`) and the command line, which beats it.

Field names are those of trl's ModelConfig and SFTConfig; `DataArguments` adds the few that they lack.
"""

import dataclasses
import difflib
import json
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from trl import ModelConfig, SFTConfig, TrlParser

from sftlab.config.launch import Launch
from sftlab.config.validation import settle
from sftlab.yaml_files import read_yaml

SHAPE_NAMES = ["openorca", "dolly", "alpaca", "gsm8k", "sharegpt", "messages", "prompt_completion"]

# Fields that trl accepts and this project decides elsewhere: setting one would be ignored, so it is refused.
_REFUSED = {
    "resume_from_checkpoint": "an interrupted run continues by itself when the same command is started again",
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
    "packing_strategy": "packing lays whole rows end to end and keeps the rows of a step",
    "padding_free": "packing decides",
    "eval_packing": "packing decides",
    "use_liger_kernel": "compile_layers and fused_loss do its work",
    "save_only_model": "a checkpoint without the optimizer cannot be continued from",
    "full_determinism": "deterministic does it at less cost, and for the fast path's kernels too",
    "ignore_data_skip": "a continued run trains on the rows that are left",
    "restore_callback_states_from_checkpoint": "a continued run goes on exactly without",
    "enable_jit_checkpoint": "TERM, USR1 and Ctrl-C end in a checkpoint anyway",
    "auto_find_batch_size": "a batch size found by trial makes runs that cannot be compared",
}

_SECRET_FIELDS = ("hub_token", "local_rank", "parallelism_config")


@dataclass
class DataArguments:
    """The data set, how much of it, its splits, and the run's own switches."""

    dataset_name: str | None = field(default=None, metadata={"help": "Hub data set or local file."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub data set."})
    dataset_train_split: str = field(
        default="train", metadata={"help": "The hub split that rows are taken from; the project splits it itself."}
    )
    dataset_streaming: bool = field(default=False, metadata={"help": "Read rows as they come; needs max_steps."})
    dataset_shape: str | None = field(
        default=None,
        metadata={"help": "Shape of the rows; recognised by the columns if unset.", "choices": SHAPE_NAMES},
    )
    dataset_fraction: float = field(
        default=1.0, metadata={"help": "Share of the rows to use, from the first on (0.01: the first one per cent)."}
    )
    split_fractions: list[float] = field(
        default_factory=lambda: [0.8, 0.1, 0.1], metadata={"help": "Shares of train, validation and test."}
    )
    streaming_eval_rows: int = field(
        default=1000, metadata={"help": "Rows of validation and of test that are kept when streaming."}
    )
    global_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Rows per optimizer step over all processes; accumulation follows from it. 0 or unset: "
            "per_device_train_batch_size x accumulation x processes."
        },
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace a finished run in output_dir."})
    resume_anyway: bool = field(
        default=False,
        metadata={"help": "Continue an unfinished run with other settings, data or versions; run.json says which."},
    )


@dataclass
class ModelArguments(ModelConfig):
    """trl's ModelConfig; `dtype` unset follows the launch config's precision."""

    dtype: str | None = field(
        default=None,
        metadata={
            "help": "dtype of the frozen weights; unset: float32 under fp32, float16 under fp16, else bfloat16.",
            "choices": ["bfloat16", "float16", "float32"],
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        targets = self.lora_target_modules
        if isinstance(targets, str) and targets.isidentifier():  # trl took it out of its list; to peft it is a pattern
            self.lora_target_modules = [targets]


@dataclass
class TrainingArguments(SFTConfig):
    """trl's SFTConfig, with the launch config deciding the precision and NaN losses shown as they are."""

    bf16: bool | None = field(default=None, metadata={"help": "Unset: the launch config decides."})
    fp16: bool | None = field(default=None, metadata={"help": "Unset: the launch config decides."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Hide NaN losses from the logs."})
    report_to: str | None = field(default="tensorboard", metadata={"help": "Where the curves go."})
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "LoRA uses every parameter it trains; looking for unused ones costs time."}
    )
    ddp_broadcast_buffers: bool | None = field(
        default=False, metadata={"help": "A language model's buffers are constants; sending them costs time."}
    )
    packing: bool | None = field(
        default=None,
        metadata={
            "help": "Lay the rows of a micro-batch end to end instead of padding them; a step has the same rows either "
            "way. Unset: wherever attention can keep the rows apart."
        },
    )
    accelerator_config: dict | str | None = field(
        default_factory=lambda: {"dispatch_batches": False, "non_blocking": torch.cuda.is_available()},
        metadata={"help": "How accelerate loads data: every process reads for itself, copies wait for nothing."},
    )
    compile_layers: bool | None = field(
        default=None, metadata={"help": "Compile each decoder layer. Unset: on a GPU, unless torch_compile is set."}
    )
    measure_memory: bool | None = field(
        default=None,
        metadata={
            "help": "Measure one step's memory by part (parameters, gradients, optimizer state, activations). Unset: "
            "on a GPU; on a CPU it takes some seconds."
        },
    )
    deterministic: bool = field(
        default=False,
        metadata={"help": "Take every sum in one order: equal starts on a GPU are equal to the last bit, and slower."},
    )
    save_adapter: bool = field(
        default=True, metadata={"help": "Keep what was trained. False: only measure (random weights, say)."}
    )
    fused_loss: bool | None = field(
        default=None,
        metadata={
            "help": "Compute the loss over a frozen head chunk by chunk, its gradient with it. Unset: wherever the "
            "head allows."
        },
    )

    def __post_init__(self) -> None:
        asked = "bf16" if self.bf16 else "fp16" if self.fp16 else None
        launch = Launch.from_environment()
        launched = launch.precision
        self.use_cpu = launch.hides_gpus
        if asked and launched and asked != launched:
            raise ValueError(
                f"the recipe asks for {asked} and the launch config for {launched}: leave bf16 and fp16 out of the "
                f"recipe and let the launch config (or --mixed_precision) decide"
            )
        # The launch config's precision reaches transformers through the environment, and only where both are off.
        self.bf16, self.fp16 = (False, False) if launched else (bool(self.bf16), bool(self.fp16))
        super().__post_init__()


class Recipe(NamedTuple):
    """A parsed recipe; `given` holds what YAML and command line set."""

    data: DataArguments
    training: TrainingArguments
    model: ModelArguments
    given: dict[str, Any]

    def facts(self) -> dict[str, Any]:
        """Every field with its resolved value, for run.json."""
        training = {k: v for k, v in self.training.to_dict().items() if k not in _SECRET_FIELDS}
        return {**training, **dataclasses.asdict(self.model), **dataclasses.asdict(self.data)}


class _Parser(TrlParser):
    """argparse exits on an error after 300 lines of usage; a ValueError says it in one."""

    def error(self, message: str) -> None:
        raise ValueError(f"{message} (see recipes/ for examples)")


def parse_recipe(argv: list[str], launch: Launch) -> Recipe:
    """Parse `--config RECIPE.yaml` and command line fields, check what can be checked without data or model.

    Raises ValueError with one sentence for an unknown field, a wrong type or value, a field that would be ignored,
    or a recipe that contradicts the launch config.
    """
    argv = list(argv)
    path = _take_config(argv)
    settings = read_yaml(path) if path else {}
    parser = _Parser((DataArguments, TrainingArguments, ModelArguments), allow_abbrev=False)
    known = {action.dest for action in parser._actions}
    named = [a[2:].split("=")[0].replace("-", "_") for a in argv if a.startswith("--")]
    _refuse_unknown([*settings, *named], known)
    _refuse_unused([*(key for key, value in settings.items() if value), *named])
    unlimited = settings.get("max_length", 0) is None and "max_length" not in named
    settings = {key: value for key, value in settings.items() if value is not None}
    arguments = [item for key, value in settings.items() for item in _as_arguments(key, value)]
    data, training, model, rest = parser.parse_args_and_config(arguments + argv, return_remaining_strings=True)
    if rest:
        raise ValueError(f"cannot read {' '.join(rest)!r}: every option is --field value")
    if unlimited:  # null of any other field is as if it were left out
        training.max_length = None
    given = {name: _value(name, (data, training, model)) for name in [*settings, *named]}
    recipe = Recipe(data, training, model, given)
    settle(recipe, launch)
    return recipe


def _take_config(argv: list[str]) -> str | None:
    for index, argument in enumerate(argv):
        if argument == "--config":
            if index + 1 == len(argv):
                raise ValueError("--config needs the path of a recipe")
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
        if name in _REFUSED:
            raise ValueError(f"{name} is not used here: {_REFUSED[name]}")


def _as_arguments(key: str, value: Any) -> list[str]:
    if isinstance(value, dict):
        return [f"--{key}", json.dumps(value)]
    if isinstance(value, list):
        return [f"--{key}", *map(str, value)]
    return [f"--{key}={value}"]


def _value(name: str, groups: tuple) -> Any:
    return next(getattr(group, name) for group in groups if hasattr(group, name))
