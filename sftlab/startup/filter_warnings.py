"""Silences, when imported, what libraries say that means nothing to the person at the terminal.

Named one by one.

Import it before torch, transformers or trl: some of it is said while they are imported.
"""

import logging
import os
import warnings

# CUDA extensions that a CPU build cannot load, and optional kernels that nothing here uses
for _name in ("torchao", "bitsandbytes", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)
# the profiler of a CPU says when it starts and stops
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
# the field's older name is kept because both supported transformers releases know it
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
