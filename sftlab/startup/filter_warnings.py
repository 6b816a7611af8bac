"""Silences library messages that mean nothing to the user, one by one, when it is imported.

Import it before torch, transformers and trl, which print some of them during their import.
"""

import logging
import os
import warnings

# they report CUDA extensions that a CPU build cannot load, and optional kernels that go unused
for _name in ("torchao", "bitsandbytes", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)
# the CPU profiler reports its start and stop
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
# the recipe keeps this field's older name, which both supported transformers releases know
warnings.filterwarnings(
    "ignore", message=".*gradient_checkpointing.*is deprecated", category=FutureWarning
)
# transformers passes DDP the older name of an option that this project sets
warnings.filterwarnings(
    "ignore", message=".*broadcast_buffers.*is deprecated", category=FutureWarning
)
warnings.filterwarnings(
    "ignore", message=".*pin_memory.*no accelerator is found", category=UserWarning
)
# peft takes the biases of lora_bias for shards of matrices
warnings.filterwarnings("ignore", message=r".*LoRA tensor.* invalid shape: \S*lora_B\.bias")
