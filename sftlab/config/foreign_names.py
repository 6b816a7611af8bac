"""What is a field of trl, transformers, peft, axolotl, LLaMA-Factory or Unsloth called here?

A name that another program uses is answered with its name here, never with one that only looks
like it.
"""

from collections.abc import Collection

from sftlab.config.field_effects import REFUSED
from sftlab.config.foreign_answers import ANSWERS as MORE_ANSWERS
from sftlab.field_words import near_name

# Names whose field here means the same.
SAME = {
    # earlier releases of trl, transformers and peft
    "torch_dtype": "dtype",
    "max_seq_length": "max_length",
    "max_seq_len": "max_length",
    "evaluation_strategy": "eval_strategy",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "r": "lora_r",
    "lora_rank": "lora_r",
    "rank": "lora_r",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "target_modules": "lora_target_modules",
    "target_parameters": "lora_target_parameters",
    "modules_to_save": "lora_modules_to_save",
    "additional_target": "lora_modules_to_save",
    "train_on_responses_only": "completion_only_loss",
    "num_proc": "dataset_num_proc",
    "revision": "model_revision",
    # axolotl
    "base_model": "model_name_or_path",
    "sequence_len": "max_length",
    "micro_batch_size": "per_device_train_batch_size",
    "eval_batch_size": "per_device_eval_batch_size",
    "num_epochs": "num_train_epochs",
    "optimizer": "optim",
    "lr_scheduler": "lr_scheduler_type",
    "sample_packing": "packing",
    "peft_use_rslora": "use_rslora",
    "peft_use_dora": "use_dora",
    "gradient_clipping": "max_grad_norm",
    "dataset_processes": "dataset_num_proc",
    "chat_template_jinja": "chat_template_path",
    "lora_model_dir": "adapter_name_or_path",
    # LLaMA-Factory
    "model_name": "model_name_or_path",
    "dataset": "dataset_name",
    "dataset_dir": "dataset_name",
    "data_path": "dataset_name",
    "data_files": "dataset_name",
    "train_file": "dataset_name",
    "eval_file": "validation_file",
    "stopping_strategy": "datasets_stopping_strategy",
    "column_mapping": "columns",
    "cutoff_len": "max_length",
    "lora_target": "lora_target_modules",
    "preprocessing_num_workers": "dataset_num_proc",
    "overwrite_output_dir": "overwrite",
    "streaming": "dataset_streaming",
    # Unsloth
    "use_gradient_checkpointing": "gradient_checkpointing",
    "random_state": "seed",
    # plain words
    "batch_size": "per_device_train_batch_size",
    "train_batch_size": "global_batch_size",
    "effective_batch_size": "global_batch_size",
    "total_batch_size": "global_batch_size",
    "epochs": "num_train_epochs",
    "lr": "learning_rate",
    "steps": "max_steps",
    "model": "model_name_or_path",
    "grad_accum": "gradient_accumulation_steps",
    "gradient_accumulation": "gradient_accumulation_steps",
    "warmup": "warmup_steps",
    "max_len": "max_length",
    "max_input_length": "max_length",
    "context_length": "max_length",
    "block_size": "max_length",
    "max_packed_sequence_len": "max_length",
    "max_epochs": "num_train_epochs",
    "max_iters": "max_steps",
    "iters": "max_steps",
    "grad_clip": "max_grad_norm",
    "clip_grad": "max_grad_norm",
    "gradient_clip_val": "max_grad_norm",
    "accumulate_grad_batches": "gradient_accumulation_steps",
    "grad_checkpoint": "gradient_checkpointing",
    "num_workers": "dataloader_num_workers",
    "dataloader_workers": "dataloader_num_workers",
    "batchsize": "per_device_train_batch_size",
    "bsz": "per_device_train_batch_size",
    "micro_bs": "per_device_train_batch_size",
    "train_bs": "per_device_train_batch_size",
    "global_bs": "global_batch_size",
    "lora_dim": "lora_r",
    "max_lora_rank": "lora_r",
    "noisy_embedding_alpha": "neftune_noise_alpha",
    "moe_aux_loss_coef": "router_aux_loss_coef",
    "adapter_path": "adapter_name_or_path",
    "adapter_file": "adapter_name_or_path",
    "train_dataset": "dataset_name",
    "train_data": "dataset_name",
    "train_path": "dataset_name",
    "data": "dataset_name",
    "split": "dataset_train_split",
    "dataset_split": "dataset_train_split",
    "output": "output_dir",
    "out_dir": "output_dir",
    "save_path": "output_dir",
    "eval_every": "eval_steps",
    "val_check_interval": "eval_steps",
    "save_every": "save_steps",
    "steps_per_save": "save_steps",
    "log_every": "logging_steps",
    "use_compile": "torch_compile",
}
# Names without a field here, and what to do instead.
ANSWERS = {
    "warmup_ratio": "give the share as warmup_steps, for example warmup_steps: 0.05",
    "early_stopping_patience": (
        "a run trains to its last step; load_best_model_at_end keeps the best checkpoint"
    ),
    "early_stopping_threshold": (
        "a run trains to its last step; load_best_model_at_end keeps the best checkpoint"
    ),
    "init_lora_weights": (
        "A is random and B is zero, so that the untrained adapter changes nothing"
    ),
    "group_by_length": "packing leaves no padding to save; the order of the rows stays random",
    "logging_dir": "the curves go to output_dir/tensorboard",
    "pure_bf16": "launch with accelerate_configs/single.yaml",
    "special_tokens": "eos_token and pad_token name tokens of the vocabulary",
    "evals_per_epoch": "give eval_strategy: steps, with eval_steps as a share such as 0.1",
    "saves_per_epoch": "give save_strategy: steps, with save_steps as a share such as 0.1",
    "val_set_size": "give the share in split_fractions, for example [0.9, 0.05, 0.05]",
    "val_size": "give the share in split_fractions, for example [0.9, 0.05, 0.05]",
    "use_flash_attention_2": "give attn_implementation: flash_attention_2, or leave it out",
    "use_flash_attn": "give attn_implementation: flash_attention_2, or leave it out",
    "flash_attention": "give attn_implementation: flash_attention_2, or leave it out",
    "flash_attn": "give attn_implementation: flash_attention_2, or leave it out",
    "bias": "LoRA trains no biases here",
    "lora_bias": "LoRA trains no biases here",
    "loraplus_lr_ratio": "LoRA+ is not supported: both matrices have learning_rate",
    "use_galore": "give optim: galore_adamw, with optim_target_modules",
    "exclude_modules": "give lora_target_modules as a pattern that leaves them out",
    "rank_pattern": "every target has the rank lora_r",
    "alpha_pattern": "every target has lora_alpha",
    "layers_to_transform": "give lora_target_modules as a pattern: .*layers.[01].q_proj",
    "lora_target_linear": "give lora_target_modules: all-linear",
    "adapter": "use_peft: true trains an adapter, load_in_4bit: true makes it QLoRA",
    "finetuning_type": "use_peft: true is LoRA, use_peft: false trains every weight",
    "quantization_bit": "use load_in_4bit or load_in_8bit",
    "quantization_config": "use load_in_4bit or load_in_8bit",
    "strict": "every field is always checked",
    "template": "chat_template_path names a .jinja file; unset is the tokenizer's own",
    "chat_template": "chat_template_path names a .jinja file; unset is the tokenizer's own",
    "train_on_inputs": "the loss is on the response alone; completion_only_loss: false changes it",
    "train_on_prompt": "the loss is on the response alone; completion_only_loss: false changes it",
    "mask_history": "give loss_on: last, which leaves earlier answers out of the loss",
    "roles_to_train": "the loss is on the assistant's turns; loss_on says on which",
    "stage": "sft.py does supervised fine-tuning alone",
    "pad_to_sequence_len": "rows are packed; packing: false pads to the longest of a batch",
    "response_template": "the chat template says where the response begins",
    "formatting_func": "dataset_shape says how the columns become a conversation",
    "max_samples": "dataset_fraction is the share of the rows to use",
    "max_train_samples": "dataset_fraction is the share of the rows to use",
    "dataset_num_samples": "dataset_fraction is the share of the rows to use",
    "no_cuda": "the launch config decides: accelerate_configs/cpu.yaml",
    "tokenizer_name": "the tokenizer is the base model's",
    "tokenizer_name_or_path": "the tokenizer is the base model's",
    "device_map": "the launch config decides where the model is",
    "wandb_project": "give report_to: wandb, and WANDB_PROJECT in the environment",
    "wandb_entity": "give report_to: wandb, and WANDB_ENTITY in the environment",
    "wandb_name": "give report_to: wandb, and run_name",
    "num_processes": "the launch config decides: pass --num_processes beside --config_file",
    "mixed_precision": "the launch config decides: pass --mixed_precision beside --config_file",
    "use_unsloth": "compile_layers and fused_loss are this project's fast path",
    "resume": "start the same command again, and an interrupted run continues",
    "auto_resume_from_checkpoints": "start the same command again",
    "save_safetensors": "safetensors is the only format",
} | MORE_ANSWERS


def unknown_field(name: str, known: Collection[str]) -> str:
    """Returns a sentence about a name that is no field: what it is called here, or what to do."""
    lower = name.lower()
    if lower in SAME:
        return f"unknown field {name!r}: that is {SAME[lower]} here"
    if lower in ANSWERS:
        return f"unknown field {name!r}: {ANSWERS[lower]}"
    if near := near_name(lower, [one for one in known if one not in REFUSED]):
        return f"unknown field {name!r}; did you mean {near!r}?"
    return f"unknown field {name!r}: docs/reference.md lists every field"
