"""Every field of a recipe, with its default and its meaning."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from trl import ModelConfig, SFTConfig

from sftlab.config.launch import Launch

SHAPE_NAMES = ["openorca", "dolly", "alpaca", "gsm8k", "sharegpt", "messages", "prompt_completion"]

_SECRET_FIELDS = ("hub_token", "local_rank", "parallelism_config")


@dataclass
class DataArguments:
    """The data set, how much of it, its splits, and the run's own switches."""

    dataset_name: str | None = field(default=None, metadata={"help": "Hub data set or local file."})
    dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration of a hub data set."}
    )
    dataset_train_split: str = field(
        default="train",
        metadata={"help": "The hub split that rows are taken from; the project splits it itself."},
    )
    dataset_streaming: bool = field(
        default=False, metadata={"help": "Read rows as they come; needs max_steps."}
    )
    dataset_shape: str | None = field(
        default=None,
        metadata={
            "help": "Shape of the rows; recognised by the columns if unset.",
            "choices": SHAPE_NAMES,
        },
    )
    dataset_fraction: float = field(
        default=1.0,
        metadata={
            "help": "Share of the rows to use, from the first on (0.01: the first one per cent)."
        },
    )
    split_fractions: list[float] = field(
        default_factory=lambda: [0.8, 0.1, 0.1],
        metadata={"help": "Shares of train, validation and test."},
    )
    streaming_eval_rows: int = field(
        default=1000,
        metadata={"help": "Rows of validation and of test that are kept when streaming."},
    )
    global_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Rows per optimizer step over all processes; accumulation follows from it. 0 or unset: "
            "per_device_train_batch_size x accumulation x processes."
        },
    )
    overwrite: bool = field(
        default=False, metadata={"help": "Replace a finished run in output_dir."}
    )
    resume_anyway: bool = field(
        default=False,
        metadata={
            "help": "Continue an unfinished run with other settings, data or versions; run.json says which."
        },
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
        if (
            isinstance(targets, str) and targets.isidentifier()
        ):  # trl took it out of its list; to peft it is a pattern
            self.lora_target_modules = [targets]


@dataclass
class TrainingArguments(SFTConfig):
    """trl's SFTConfig, with the launch config deciding the precision and NaN losses shown as they
    are.
    """

    bf16: bool | None = field(default=None, metadata={"help": "Unset: the launch config decides."})
    fp16: bool | None = field(default=None, metadata={"help": "Unset: the launch config decides."})
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Hide NaN losses from the logs."}
    )
    report_to: str | None = field(default="tensorboard", metadata={"help": "Where the curves go."})
    ddp_find_unused_parameters: bool | None = field(
        default=False,
        metadata={
            "help": "LoRA uses every parameter it trains; looking for unused ones costs time."
        },
    )
    ddp_broadcast_buffers: bool | None = field(
        default=False,
        metadata={"help": "A language model's buffers are constants; sending them costs time."},
    )
    packing: bool | None = field(
        default=None,
        metadata={
            "help": "Lay the rows of a micro-batch end to end instead of padding them; a step has the same rows either "
            "way. Unset: wherever attention can keep the rows apart."
        },
    )
    accelerator_config: dict | str | None = field(
        default_factory=lambda: {
            "dispatch_batches": False,
            "non_blocking": torch.cuda.is_available(),
        },
        metadata={
            "help": "How accelerate loads data: every process reads for itself, copies wait for nothing."
        },
    )
    compile_layers: bool | None = field(
        default=None,
        metadata={
            "help": "Compile each decoder layer. Unset: on a GPU, unless torch_compile is set."
        },
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
        metadata={
            "help": "Take every sum in one order: equal starts on a GPU are equal to the last bit, and slower."
        },
    )
    save_adapter: bool = field(
        default=True,
        metadata={"help": "Keep what was trained. False: only measure (random weights, say)."},
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
                f"the recipe asks for {asked} and the launch config for {launched}: leave bf16 and "
                "fp16 out of the "
                f"recipe and let the launch config (or --mixed_precision) decide"
            )
        # The launch config's precision reaches transformers through the environment, and only where
        # both are off.
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
