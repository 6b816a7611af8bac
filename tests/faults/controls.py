"""Sabotaged continuations, which a campaign must catch."""

import transformers
from test_checkpoint import FAULTS

import sftlab.runs.checkpoint_manifest


def no_random_states() -> None:
    """The random states are not restored."""
    transformers.Trainer._load_rng_state = lambda self, checkpoint: None


def no_verification() -> None:
    """A checkpoint is taken for whole without a look at its files."""
    manifest = sftlab.runs.checkpoint_manifest
    manifest.verify = manifest._read_manifest


def no_sums() -> None:
    """What has added up since the last log is not restored."""
    from sftlab.training.log_sums import TokenSums, TrainerSums

    TokenSums.restore = TrainerSums.restore = lambda self, state: None


CONTROLS = {
    "random states are not restored": (no_random_states,),
    "sums since the last log are not restored": (no_sums,),
    "a flipped bit, hashes not looked at": (no_verification, FAULTS[-1]),
}
