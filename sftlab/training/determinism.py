"""Training whose every sum is taken in one order, so that equal starts on a GPU are equal to the
last bit.

transformers' `full_determinism` waits for every kernel and leaves cuDNN's attention on, which gives
other values from call to call, and lets Inductor choose kernels by timing them. The kernels of the
fast path use no atomics.
"""

import os

import torch


def compute_deterministically() -> None:
    """Before the first matrix product on a GPU.

    An operation that has no such form raises RuntimeError at its use.
    """
    # read by torch when it makes its first cuBLAS handle
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # it would write NaN into all memory that is allocated, to find reads of what nobody wrote
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.backends.cudnn.benchmark = False
    torch.backends.cuda.enable_cudnn_sdp(False)
    import torch._inductor.config as inductor

    inductor.deterministic = True
