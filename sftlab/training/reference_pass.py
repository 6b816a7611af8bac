"""The reference's log-probabilities of all pairs, computed once for every epoch."""

import numpy as np
import torch
from datasets import Dataset
from trl import DPOTrainer

from sftlab.data.collator import for_the_model
from sftlab.data.encoded_pairs import IDS
from sftlab.data.pair_collator import REFERENCE_OF_TRL
from sftlab.data.samplers import row_lengths


def with_reference(
    trainer: DPOTrainer, pairs: Dataset, at_once: int, evaluates: bool = False
) -> Dataset:
    """Returns the pairs with the log-probabilities of both sides under the reference, in nats.

    The model runs as in a step, or as where it `evaluates`: weights in 4 bits are multiplied in
    float8 in steps alone.

    The batches of `at_once` pairs are the same in every start and under any number of processes,
    from the longest pairs to the shortest. So a run that is continued trains on the same figures.
    """
    order = np.argsort(-sum(row_lengths(pairs, side) for side in IDS), kind="stable")
    batches = [order[start : start + at_once] for start in range(0, len(pairs), at_once)]
    found = torch.zeros(len(pairs), len(REFERENCE_OF_TRL), device=trainer.accelerator.device)
    process, processes = trainer.accelerator.process_index, trainer.accelerator.num_processes
    model = trainer.model.train(not evaluates)  # dropout is off
    for batch in batches[process::processes]:
        inputs = for_the_model(trainer.data_collator([pairs[int(number)] for number in batch]))
        sides = trainer.compute_ref_log_probs(model, trainer._prepare_inputs(inputs))
        found[torch.from_numpy(batch).to(found.device)] = torch.stack(sides, dim=1).float()
    # each pair is of one process, and zero in the others
    found = trainer.accelerator.reduce(found, "sum").cpu()
    for column, name in enumerate(REFERENCE_OF_TRL):
        pairs = pairs.add_column(name, found[:, column].tolist())
    return pairs
