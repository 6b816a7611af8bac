"""Says why the first step of a start takes long: it compiles the layers and checks what runs."""

from contextlib import ExitStack

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sftlab.startup.waiting import says_if_long


class FirstStepWait(TrainerCallback):
    """Prints one line where the first step takes more than a few seconds, and its seconds."""

    def __init__(self, compiles: bool) -> None:
        compiled = ", and compiling the layers" if compiles else ""
        self._what = f"checking and running the first step{compiled}"
        self._wait = ExitStack()
        self._began = False

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        """Start to wait, once."""
        if not self._began:
            self._began = True
            self._wait.enter_context(says_if_long(self._what))

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        """Say how long the first step took, if it was announced."""
        self._wait.close()
