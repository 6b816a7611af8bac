r"""Runs recipes/sft.py with packed rows and recorded steps on CPU processes, without any kernels.

accelerate launch --config_file accelerate_configs/cpu_ddp.yaml tests/captured_on_cpu.py \
    --config recipes/demo/attn_r16.yaml --captured_step true

FAILS="1 2" in the environment lets process 1 fail at its third recording. FAILS="1 2 wrong" lets
the replays of that one and of later ones have another loss. DIES="1 16" kills process 1 in front of
its replay of that number. CHOOSES=1 lets process 1 alone find that steps are worth recording.
"""

import sftlab.startup.filter_warnings  # noqa: I001  (before the libraries that it quiets)
import sftlab.startup.single_process  # before they see the devices
import sftlab.startup.preload  # noqa: F401

import os
import signal
import sys

import pytest
from conftest import load_script
from packed_training import pack_on_a_cpu, reference_attention
from step_tape import Tape

from sftlab.fastpath import captured_step
from sftlab.training import step_capture


class Fails(Tape):
    """The tape of a process that may fail."""

    def record(self, work):
        which, *how = asked("FAILS")
        failed = self.recorded >= int(which)
        if failed and not how:
            raise RuntimeError("out of memory")
        again, result = super().record(work)

        def replay():
            if self.replayed >= int(asked("DIES")[0]):
                os.kill(os.getpid(), signal.SIGKILL)
            again()
            if failed:
                result[:1].mul_(1.01)

        return replay, result


def asked(name: str) -> list[str]:
    """What an environment variable asks of this process; a large number where it asks nothing."""
    process, *words = os.environ.get(name, "").split() or [None]
    return words if process == os.environ.get("RANK") else ["999"]


if __name__ == "__main__":
    patch = pytest.MonkeyPatch()
    pack_on_a_cpu(patch, reference_attention)
    patch.setattr(step_capture, "CudaGraphs", Fails)
    patch.setattr(captured_step, "RECORDED_WHEN_MET", 1)
    sft = load_script("recipes/sft.py")
    if chooses := os.environ.get("CHOOSES"):
        patch.setattr(sft, "captures_by_itself", lambda *_: os.environ["RANK"] == chooses)
    sft.main(sys.argv[1:])
