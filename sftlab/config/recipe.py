"""Which fields can a recipe set, what do they mean and what are their defaults?"""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from trl import ModelConfig, SFTConfig

from sftlab.config.data_words import columns_of_words, joined_names, parts_of_words
from sftlab.config.own_fields import OwnFields

if TYPE_CHECKING:
    from sftlab.config.preference_fields import PreferenceArguments

DATA_FORMAT_NAMES = [
    "openorca",
    "dolly",
    "alpaca",
    "gsm8k",
    "sharegpt",
    "messages",
    "prompt_completion",
    "xlam",
    "text",
    "preference",
]

_NAME = re.compile(r"\w+(\.\w+)*")
_SECRET_FIELDS = ("hub_token", "local_rank", "parallelism_config")


@dataclass
class DataArguments:
    """Fields for the data set, its splits, the global batch, and replacing or resuming a run."""

    dataset_name: list[str] | None = field(
        default=None,
        metadata={
            "help": "Hub data set, folder, or local files: one, several, or a pattern such as "
            "'data/*.jsonl'."
        },
    )
    datasets: list[str] | None = field(
        default=None,
        metadata={
            "help": "A mixture instead of dataset_name: NAME=WEIGHT for each data set, or a list "
            "of mappings with the keys name, weight, shape, columns, config and split."
        },
    )
    datasets_stopping_strategy: str = field(
        default="first_exhausted",
        metadata={
            "help": "An epoch of a mixture with weights ends with the first data set that has no "
            "row left, or with the last one; then rows of the others are repeated.",
            "choices": ["first_exhausted", "all_exhausted"],
        },
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration of a hub data set."}
    )
    dataset_train_split: str = field(
        default="train",
        metadata={"help": "Hub split to take rows from; split_fractions divides it further."},
    )
    dataset_streaming: bool = field(
        default=False,
        metadata={"help": "Stream rows instead of downloading them; needs max_steps."},
    )
    dataset_shape: str | None = field(
        default=None,
        metadata={
            "help": "Shape of the rows. Unset: recognised by the columns.",
            "choices": DATA_FORMAT_NAMES,
        },
    )
    columns: list[str] | None = field(
        default=None,
        metadata={
            "help": "Which column is which: FORMAT'S=FILE'S, for example question=input "
            "answer=output. Unset: recognised by the names."
        },
    )
    dataset_text_from_numbers: bool = field(
        default=False,
        metadata={"help": "Read a number in a column of text as the text that stands in the file."},
    )
    validation_file: list[str] | None = field(
        default=None,
        metadata={
            "help": "Local files with the validation rows; split_fractions divides the rest."
        },
    )
    test_file: list[str] | None = field(
        default=None,
        metadata={"help": "Local files with the test rows; split_fractions divides the rest."},
    )
    dataset_validation_split: str | None = field(
        default=None,
        metadata={"help": "Split of a hub data set or a folder that has the validation rows."},
    )
    dataset_test_split: str | None = field(
        default=None,
        metadata={"help": "Split of a hub data set or a folder that has the test rows."},
    )
    dataset_fraction: float = field(
        default=1.0,
        metadata={
            "help": "Share of the rows to use, counted from the first (0.01: the first 1 per cent)."
        },
    )
    split_fractions: list[float] = field(
        default_factory=lambda: [0.8, 0.1, 0.1],
        metadata={"help": "Shares of train, validation and test."},
    )
    loss_on: str = field(
        default="all",
        metadata={
            "help": "Answers of a conversation that are in the loss: all of them, in one sequence; "
            "the last one; or each in a row of its own (completion).",
            "choices": ["all", "last", "completion"],
        },
    )
    streaming_eval_rows: int = field(
        default=1000,
        metadata={"help": "Rows of validation and of test that are kept when streaming."},
    )
    global_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Rows per optimizer step over all processes; accumulation follows from it. "
            "0 or unset: per_device_train_batch_size x accumulation x processes."
        },
    )
    overwrite: bool = field(
        default=False, metadata={"help": "Replace a finished run in output_dir."}
    )
    resume_anyway: bool = field(
        default=False,
        metadata={
            "help": "Continue an unfinished run with other settings, data or versions. run.json "
            "says which changed."
        },
    )

    extend: bool = field(
        default=False,
        metadata={
            "help": "Continue a finished run to a larger max_steps or num_train_epochs than it had."
        },
    )

    def __post_init__(self) -> None:
        self.columns = columns_of_words(self.columns)
        self.datasets = parts_of_words(self.datasets)
        # names are one text from here on: so they stand in run.json
        for name in ("dataset_name", "validation_file", "test_file"):
            setattr(self, name, joined_names(getattr(self, name)))
        if self.datasets:
            self.dataset_name = joined_names([part["name"] for part in self.datasets])


@dataclass
class ModelArguments(ModelConfig):
    """trl's ModelConfig; `dtype` unset follows the launch config's precision."""

    dtype: str | None = field(
        default=None,
        metadata={
            "help": "dtype of the frozen weights. Unset: float32 under fp32, float16 under fp16, "
            "else bfloat16.",
            "choices": ["bfloat16", "float16", "float32"],
        },
    )
    adapter_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Adapter to go on from: a run's directory or an adapter's folder. Unset: a new "
            "one."
        },
    )
    init_lora_weights: str = field(
        default="true",
        metadata={
            "help": "How the LoRA matrices begin: true (A random, B zero), gaussian, orthogonal, "
            "pissa, pissa_niter_16, olora, eva or loftq. PiSSA and OLoRA take the largest parts of "
            "the weights, EVA reads rows, LoftQ corrects load_in_4bit."
        },
    )
    lora_bias: bool = field(
        default=False,
        metadata={"help": "Train a bias beside each B. Such an adapter cannot be merged."},
    )
    exclude_modules: list[str] | None = field(
        default=None,
        metadata={
            "help": "Names, or one pattern, of modules that get no adapter though "
            "lora_target_modules names them."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.init_lora_weights = self.init_lora_weights.lower()
        targets, excluded = self.lora_target_modules, self.exclude_modules
        # trl takes a single name out of its list, and peft reads a string as a pattern
        if isinstance(targets, str) and _NAME.fullmatch(targets):
            self.lora_target_modules = [targets]
        if excluded and len(excluded) == 1 and not _NAME.fullmatch(excluded[0]):
            self.exclude_modules = excluded[0]


@dataclass
class TrainingArguments(OwnFields, SFTConfig):
    """trl's SFTConfig with the fields of this project."""

    packing: bool | None = field(
        default=None,
        metadata={
            "help": "Concatenate the rows of a micro-batch instead of padding them. A step has the "
            "same rows either way. Unset: wherever attention can keep the rows apart."
        },
    )
    answers_during_training: int | None = field(
        default=None,
        metadata={
            "help": "Generate answers to so many validation rows at each evaluation, and log BLEU, "
            "ROUGE, exact match, length, and the shares of empty and cut ones."
        },
    )
    fused_loss: bool | None = field(
        default=None,
        metadata={
            "help": "Compute the loss and its gradient over a frozen head in chunks. Unset: "
            "wherever the head allows it."
        },
    )
    captured_step: bool | None = field(
        default=None,
        metadata={
            "help": "Capture forward and backward of a micro-batch once for each of a few sizes, "
            "and replay them as CUDA graphs. Unset: on a GPU with compiled layers, where micro-"
            "batches are so small that the GPU would wait for the host."
        },
    )


class Recipe(NamedTuple):
    """A parsed recipe; `given` has the fields that YAML and command line set.

    `notes` are lines for the user about what was made of them.
    """

    data: DataArguments
    training: "TrainingArguments | PreferenceArguments"
    model: ModelArguments
    given: dict[str, Any]
    notes: Sequence[str] = ()

    def facts(self) -> dict[str, Any]:
        """Returns every field with its resolved value, for run.json."""
        training = {k: v for k, v in self.training.to_dict().items() if k not in _SECRET_FIELDS}
        return {**training, **dataclasses.asdict(self.model), **dataclasses.asdict(self.data)}
