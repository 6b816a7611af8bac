"""Fields of a training that trl's configs lack, and those whose defaults differ here."""

from dataclasses import dataclass, field

import torch

from sftlab.config.launch import Launch


@dataclass
class OwnFields:
    """Fields beside those of a trl config; this class stands before it.

    The launch config decides the precision, and NaN losses are logged.
    """

    method: str = field(
        default="sft",
        metadata={
            "help": "sft: supervised fine-tuning on answers. dpo: preference tuning on pairs of a "
            "chosen and a rejected answer.",
            "choices": ["sft", "dpo"],
        },
    )

    bf16: bool | None = field(default=None, metadata={"help": "Unset: the launch config decides."})
    fp16: bool | None = field(default=None, metadata={"help": "Unset: the launch config decides."})
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Hide NaN losses from the logs."}
    )
    report_to: list[str] | None = field(
        default_factory=lambda: ["tensorboard"],
        metadata={"help": "Where the curves go: one tracker, several, or none."},
    )
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
    accelerator_config: dict | str | None = field(
        default_factory=lambda: {
            "dispatch_batches": False,
            "non_blocking": torch.cuda.is_available(),
        },
        metadata={
            "help": "How accelerate loads data: each process reads its own rows, and copies to the "
            "GPU do not block."
        },
    )
    compile_layers: bool | None = field(
        default=None,
        metadata={
            "help": "Compile each decoder layer. Unset: on a GPU, unless torch_compile is set."
        },
    )
    fused_lora: bool | None = field(
        default=None,
        metadata={
            "help": "Compute a frozen linear and its LoRA update, and linears that share their "
            "input, in one product. Unset: on a GPU with compiled layers, where LoRA without "
            "dropout is on every linear of an MLP in 16 or 4 bits or float8."
        },
    )
    fsdp_layers_per_unit: int | None = field(
        default=None,
        metadata={
            "help": "Decoder layers that FSDP2 gathers at once. Unset: as many as have 0.5 GB, in "
            "two units or more."
        },
    )
    loraplus_lr_ratio: float | None = field(
        default=None,
        metadata={
            "help": "LoRA+: the learning rate of the B matrices is learning_rate times this. "
            "Unset: all that trains has learning_rate."
        },
    )
    measure_memory: bool | None = field(
        default=None,
        metadata={
            "help": "Measure one step's memory by part (parameters, gradients, optimizer state, "
            "activations). Unset: on a GPU. On a CPU it takes some seconds."
        },
    )
    deterministic: bool = field(
        default=False,
        metadata={
            "help": "Sum in a fixed order, so that equal runs on a GPU are equal to the last bit. "
            "Slower."
        },
    )
    save_adapter: bool = field(
        default=True,
        metadata={"help": "Save the adapter. False: only measure, for example random weights."},
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={
            "help": "Stop once eval_loss has not improved in so many evaluations in a row. Unset: "
            "train to the last step."
        },
    )
    early_stopping_threshold: float = field(
        default=0.0,
        metadata={"help": "An eval_loss that is lower by no more than this is no improvement."},
    )

    def __post_init__(self) -> None:
        names = self.report_to or ["none"]
        self.report_to = [name for one in names for name in one.split(",") if name]
        asked = "bf16" if self.bf16 else "fp16" if self.fp16 else None
        launch = Launch.from_environment()
        launched = launch.precision
        self.use_cpu = launch.hides_gpus
        if asked and launched and asked != launched:
            raise ValueError(
                f"the recipe asks for {asked} and the launch config for {launched}: leave bf16 and "
                "fp16 out of the recipe; the launch config (or --mixed_precision) decides"
            )
        # transformers takes the launch config's precision from the environment only where both
        # are off
        self.bf16, self.fp16 = (False, False) if launched else (bool(self.bf16), bool(self.fp16))
        try:
            super().__post_init__()
        except TypeError as error:  # of the classes that transformers makes from a field's JSON
            raise ValueError(f"a field holds a wrong name or type: {error}") from error
