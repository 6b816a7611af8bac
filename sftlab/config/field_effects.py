"""Which fields of trl and transformers have an effect here, and why do the others have none?

Every field of `SFTConfig` and `ModelConfig` is in exactly one of the three classes below, and a
test compares them with the installed releases. So a new release's field cannot be ignored in
silence.
"""

_LAUNCH = "the launch config decides"
_HUB = "nothing is pushed while training: upload the finished adapter, hf upload NAME RUN/adapter"
_METRICS = "evaluation computes the loss alone: eval/ has the scripts for other scores"

# Fields whose value is decided elsewhere in this project.
DECIDED = {
    "resume_from_checkpoint": "start the same command again, and an interrupted run continues",
    "do_train": "sft.py always trains",
    "do_eval": "use eval_strategy",
    "do_predict": "use the scripts in eval/",
    "fsdp": f"{_LAUNCH}: accelerate_configs/fsdp.yaml",
    "fsdp_config": f"{_LAUNCH}: accelerate_configs/fsdp.yaml",
    "deepspeed": "DeepSpeed is not supported: accelerate_configs/fsdp.yaml shards with FSDP2",
    "use_cpu": f"{_LAUNCH}: accelerate_configs/cpu.yaml",
    "bf16_full_eval": f"{_LAUNCH} the precision",
    "fp16_full_eval": f"{_LAUNCH} the precision",
    "local_rank": "the launcher sets it",
    "parallelism_config": _LAUNCH,
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
    "assistant_only_loss": "loss_on says which of the assistant's turns are in the loss",
    "dataset_kwargs": "rows are always tokenized with the chat template",
    "dataset_text_field": "rows are conversations: dataset_shape says how their columns are read",
    "remove_unused_columns": "the collator takes the columns that the model needs",
    "dataloader_drop_last": "training takes whole global batches, and evaluation takes every row",
    "lora_task_type": "the project trains causal language models",
    "use_cache": "training never reads a cache of keys and values",
}
# Fields that belong to a feature which this project does not have.
MEANINGLESS = {
    "push_to_hub": "upload the finished adapter instead: hf upload NAME RUN/adapter",
    "hub_token": "log in with hf auth login",
    "hub_private_repo": _HUB,
    "hub_model_id": _HUB,
    "hub_strategy": _HUB,
    "hub_always_push": _HUB,
    "hub_revision": _HUB,
    "liger_kernel_config": "Liger kernels are not used",
    "length_column_name": "rows are not grouped by length: packed rows need no padding",
    "prediction_loss_only": _METRICS,
    "include_for_metrics": _METRICS,
    "batch_eval_metrics": _METRICS,
    "label_names": _METRICS,
    "eval_do_concat_batches": _METRICS,
    "eval_use_gather_object": _METRICS,
    "eval_accumulation_steps": _METRICS,
}
REFUSED = DECIDED | MEANINGLESS
# Fields that do here what their libraries say.
_EFFECTIVE = """
per_device_train_batch_size gradient_accumulation_steps num_train_epochs max_steps
learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps optim optim_args
optim_target_modules weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm
average_tokens_across_devices label_smoothing_factor neftune_noise_alpha loss_type seed
data_seed train_sampling_strategy shuffle_dataset router_aux_loss_coef

max_length truncation_mode packing pad_to_multiple_of completion_only_loss
chat_template_path eos_token pad_token dataset_num_proc

bf16 fp16 tf32 gradient_checkpointing gradient_checkpointing_kwargs activation_checkpointing
activation_checkpointing_kwargs activation_offloading torch_compile torch_compile_backend
torch_compile_mode torch_empty_cache_steps accelerator_config dataloader_num_workers
dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor
dataloader_multiprocessing_context dataloader_in_order
ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph
ddp_backend ddp_timeout

output_dir logging_strategy logging_steps logging_first_step logging_nan_inf_filter
log_on_each_node log_level log_level_replica disable_tqdm include_num_input_tokens_seen
report_to run_name project trackio_space_id trackio_bucket_id trackio_static_space_id
eval_strategy eval_steps eval_delay eval_on_start per_device_eval_batch_size save_strategy
save_steps save_total_limit save_on_each_node load_best_model_at_end metric_for_best_model
greater_is_better skip_memory_metrics debug

model_name_or_path model_revision model_init_kwargs trust_remote_code dtype
attn_implementation use_peft lora_r lora_alpha lora_dropout lora_target_modules
lora_target_parameters lora_modules_to_save use_rslora use_dora load_in_4bit load_in_8bit
bnb_4bit_quant_type bnb_4bit_quant_storage use_bnb_nested_quant
"""
HAS_EFFECT = frozenset(_EFFECTIVE.split())
