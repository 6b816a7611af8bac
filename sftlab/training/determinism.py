"""Deterministic training: equal runs on a GPU are equal to the last bit.

transformers' `full_determinism` does not suffice. It waits for every kernel, leaves cuDNN's
attention on, which differs from call to call, and lets Inductor choose kernels by timing them. The
kernels of the fast path use no atomics.
"""

import os

import torch


def compute_deterministically() -> None:
    """Make torch take every sum in one order; call it before the first matrix product on a GPU.

    An operation without a deterministic form raises RuntimeError when it is used.
    """
    # torch reads it when it creates its first cuBLAS handle
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # it fills all new memory with NaN, which finds reads of unset values but costs time
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.backends.cudnn.benchmark = False
    torch.backends.cuda.enable_cudnn_sdp(False)
    import torch._inductor.config as inductor

    inductor.deterministic = True
