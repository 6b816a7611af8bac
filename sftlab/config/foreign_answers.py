"""Names of other programs that have no field here, and what to do instead.

They are fields of axolotl, LLaMA-Factory, Unsloth, Lightning and earlier releases of transformers.
"""

_LAUNCH = "the launch config decides"
_LOSS = "the loss is on the response alone; completion_only_loss: false changes it"
_COLUMNS = "dataset_shape and columns say how the columns become a conversation"
_MODEL = "the base model's own config and tokenizer decide"
_SAMPLING = "nothing is generated while training: eval/quality.py has options for answers"
_TRACKER = "give report_to, and the tracker's own variables in the environment"
_FASTER = "compile_layers and fused_loss are this project's fast path"
_OTHER_METHODS = "LoRA, rank-stabilised LoRA and DoRA are the adapters here"
_EXPORT = "recipes/export.py writes merged weights or an adapter, after the training"
_QUANTISED = "use load_in_4bit or load_in_8bit, with bnb_4bit_quant_type"
_LIMITS = "dataset_fraction is the share of the rows to use, max_steps the length of the training"
_HUB = "nothing is pushed while training: upload the finished adapter, hf upload NAME RUN/adapter"
_LORA = "use_peft: true trains a LoRA adapter, load_in_4bit: true makes it QLoRA"
_ATTENTION = "give attn_implementation, or leave it out"
_TOKENS = "the vocabulary stays as it is; eos_token and pad_token name tokens of it"
_TOKENIZED = "slurm/tokenize_dataset.py tokenizes beforehand, and dataset_name takes its folder"
_PARTS = "give lora_target_modules as a pattern: .*layers.[01].q_proj"
_GROUPS = {
    _LAUNCH: """strategy devices nnodes nproc_per_node accelerator data_parallel precision
        tensor_parallel_size context_parallel_size sequence_parallel_degree dp_shard_size
        half_precision_backend fp16_opt_level sharded_ddp use_mps_device upcast_layernorm
        upcast_lmhead_output float16 bfloat16 max_memory offload_folder""",
    _LOSS: """train_on_eos train_on_eot train_on_completions instruction_part response_part
        ignore_pad_token_for_loss mask_prompt instruction_template""",
    _COLUMNS: """field_messages message_field_role message_field_content message_property_mappings
        prompt_template prompt_style system_prompt default_system tool_format field_instruction
        field_output field_input prompt_column response_column history_column""",
    _MODEL: """base_model_config model_type tokenizer_type tokenizer_config tokenizer
        use_fast_tokenizer tokenizer_path is_mistral_derived_model is_llama_derived_model
        rope_scaling overrides_of_model_config mixture_of_depths train_from_scratch enable_thinking
        low_cpu_mem_usage cache_dir split_special_tokens""",
    "give init_lora_weights": "lora_weight_layer_init lora_init",
    "give init_lora_weights: loftq and load_in_4bit: true": "loftq",
    _SAMPLING: """temperature top_p top_k do_sample max_new_tokens eval_max_new_tokens
        eval_table_size eval_num_beams predict_with_generate infer_backend infer_dtype use_kv_cache
        fast_inference gpu_memory_utilization num_beams""",
    _TRACKER: """wandb wandb_watch wandb_run_id wandb_log_model wandb_mode use_wandb tags
        mlflow_tracking_uri mlflow_experiment_name comet_ml swanlab_project use_swanlab ray_run_name
        experiment_name logger plot_loss""",
    _FASTER: """plugins liger_rope liger_rms_norm liger_glu_activation liger_layer_norm
        liger_cross_entropy liger_fused_linear_cross_entropy enable_liger_kernel unsloth_lora_mlp
        lora_mlp_kernel lora_qkv_kernel lora_o_kernel use_unsloth_gc unsloth_force_compile
        unsloth_cross_entropy_loss compile torchdynamo""",
    _OTHER_METHODS: """relora_steps relora badam_mode use_badam use_apollo use_oft
        freeze_trainable_layers freeze_extra_modules llamapro""",
    _EXPORT: "export_dir export_size export_device save_method merge_lora merge_adapter",
    _QUANTISED: """quantization_method quantization_type quantization_device_map
        double_quantization gptq bits quantize quant nf4 use_4bit bnb_4bit_compute_dtype
        double_quant bnb_config_kwargs bnb_4bit_use_double_quant quantization""",
    _LIMITS: """total_num_tokens limit_train_batches max_eval_samples max_tokens
        limit_val_batches num_samples train_subset""",
    _HUB: """push_dataset_to_hub push_to_hub_model_id push_to_hub_organization hf_hub_token
        ms_hub_token hf_token""",
    _LORA: "use_lora use_qlora lora qlora full_finetuning peft_config tuner tuner_type train_type",
    _ATTENTION: """xformers_attention sdp_attention s2_attention eager_attention shift_attn
        flash_attention_2 attention attn flash_attn_rms_norm flash_attn_cross_entropy""",
    _TOKENS: """add_tokens tokens add_special_tokens new_special_tokens resize_vocab
        resize_token_embeddings_to_32x shrink_embeddings""",
    _TOKENIZED: """dataset_prepared_path tokenized_path overwrite_cache dataset_batch_size
        preprocessing_batch_size data_shared_file_system streaming_multipack_buffer_size""",
    _PARTS: """peft_layers_to_transform peft_layers_pattern lora_layers num_layers target_layers
        layers_pattern num_layers_to_tune""",
    "rows are packed whole, and none sees another: packing: true": """neat_packing
        eval_sample_packing sample_pack_fraction sample_packing_group_size multipack_real_batches
        chars_per_token num_of_sequences""",
    "checkpointing is off with gradient_checkpointing: false": "disable_gradient_checkpointing",
    "give gradient_checkpointing_kwargs: {use_reentrant: false}": "use_reentrant_gc use_reentrant",
    "give split_fractions, validation_file or dataset_validation_split": """test_datasets
        eval_dataset validation_split test_split valid_data val_data eval_on_each_dataset
        train_split test_size eval_data""",
    "give datasets with a weight each, and datasets_stopping_strategy": """mix_strategy
        interleave_probs shuffle_merged_datasets dataset_mixer""",
    "give shuffle_dataset and seed": "disable_shuffling shuffle curriculum_sampling",
    "give lr_scheduler_type: cosine_with_min_lr, with lr_scheduler_kwargs": """min_lr
        cosine_min_lr_ratio lr_min min_learning_rate""",
    "embeddings have learning_rate, B matrices loraplus_lr_ratio times it": """loraplus_lr_lambda
        loraplus_lr_embedding embedding_learning_rate""",
    "give optim: galore_adamw, with optim_target_modules": "galore_target galore_rank galore_scale",
    "give lora_alpha: the scale is lora_alpha over lora_r": "lora_scaling lora_scale",
    "real tokens/s are always measured": """include_tokens_per_second
        include_effective_tokens_per_second""",
    "eval/quality.py scores the finished run": "compute_accuracy compute_metrics",
    "text models alone are trained": """image_max_pixels image_dir video_fps image_min_pixels
        freeze_vision_tower freeze_multi_modal_projector""",
}
ANSWERS = {name: answer for answer, names in _GROUPS.items() for name in names.split()}
