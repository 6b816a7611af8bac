"""The fields of preference tuning: trl's DPOConfig, less those that have no effect here."""

import dataclasses
from dataclasses import dataclass, field
from typing import ClassVar

from trl import DPOConfig, SFTConfig

from sftlab.config.own_fields import OwnFields

LOSSES = (
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot"),
    *("aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
)
# Losses that depend on which pairs share a micro-batch.
MICRO_BATCH_LOSSES = ("aot", "aot_unpaired", "sft")
# Fields that only preference tuning has, and that do what trl says.
ALONE = (
    *("beta", "loss_weights", "ld_alpha", "f_divergence_type", "f_alpha_divergence_coef"),
    *("label_smoothing", "use_weighting", "discopop_tau", "precompute_ref_log_probs"),
)
_REFERENCE = "the reference is the model as it was before this training, and stays so"
# Fields that have an effect in supervised fine-tuning, or in trl, and none in preference tuning.
REFUSED_OF_PAIRS = {
    "sync_ref_model": _REFERENCE,
    "ref_model_mixup_alpha": _REFERENCE,
    "ref_model_sync_steps": _REFERENCE,
    "precompute_ref_batch_size": "the reference is computed over micro-batches of the training",
    "disable_dropout": "dropout is always off: model and reference must differ by training alone",
    "truncation_mode": "answers lose their end, so that both sides keep the prompt",
    "label_smoothing_factor": "give label_smoothing, which some values of loss_type use",
    "average_tokens_across_devices": "the loss is a mean over pairs, not over tokens",
    "loss_on": "each side has one answer, and it is in the loss",
    "dataset_streaming": "pairs are counted and encoded before the training",
    "completion_only_loss": "the log-probabilities are those of the answers",
    "answers_during_training": "eval/quality.py generates the answers after the training",
    "shuffle_dataset": "the sampler shuffles the rows",
    "captured_step": "only steps of supervised fine-tuning are captured",
    "neftune_noise_alpha": "noise would make the model differ from its reference before it trains",
}


@dataclass
class PreferenceArguments(OwnFields, DPOConfig):
    """trl's DPOConfig with the fields of this project."""

    # what the code that both methods share reads
    completion_only_loss: ClassVar[bool] = True
    answers_during_training: ClassVar[int | None] = None
    captured_step: ClassVar[bool | None] = None

    method: str = field(default="dpo", metadata=OwnFields.__dataclass_fields__["method"].metadata)
    packing: bool | None = field(
        default=None,
        metadata={
            "help": "Concatenate the sides of a micro-batch instead of padding them. Unset: "
            "wherever attention can keep them apart."
        },
    )
    fused_loss: bool | None = field(
        default=None,
        metadata={
            "help": "Compute the log-probabilities and their gradient over a frozen head in chunks "
            "of answers' tokens. Unset: wherever the head allows it. False: trl's own head."
        },
    )
    precompute_ref_log_probs: bool | None = field(
        default=None,
        metadata={
            "help": "Compute the reference's log-probabilities once, before the first step, "
            "instead of in every step. Unset: where pairs are trained on more than once."
        },
    )
    chat_template_path: str | None = field(
        default=None, metadata={"help": "A .jinja file with the chat template."}
    )
    eos_token: str | None = field(
        default=None, metadata={"help": "Token that ends an answer. Unset: the tokenizer's."}
    )

    def reference_once(self, pairs: int | None, pairs_a_step: int) -> bool:
        """Returns whether the reference of all pairs is computed before the first step.

        Unset, it is where each of the `pairs` training pairs is trained on more than once, as far
        as their number is known: else it saves nothing.
        """
        if self.precompute_ref_log_probs is not None:
            return self.precompute_ref_log_probs
        if self.ld_alpha is not None:
            return False
        if self.max_steps > 0:
            return pairs is not None and pairs_a_step * self.max_steps > pairs
        return self.num_train_epochs > 1


def of_the_other_method(name: str, method: str) -> str | None:
    """Returns why a recipe of `method` cannot set a field; None where the other has none such."""
    names = {one.name for one in dataclasses.fields(SFTConfig)} | {"fused_loss"}
    if method == "dpo" and name in names and name not in PreferenceArguments.__dataclass_fields__:
        return f"{name} is a field of supervised fine-tuning, and method is dpo: leave it out"
    if method == "sft" and name in ALONE:
        return f"{name} is a field of preference tuning: add method: dpo, or leave {name} out"
    return None
