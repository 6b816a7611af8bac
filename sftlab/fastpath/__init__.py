"""The fast path: kernels for packed rows, compiled layers, fused loss, float8, FSDP2 for LoRA."""
