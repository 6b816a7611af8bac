"""Runs a decoder over packed rows, for callers that hold padded ones."""

import types

import torch
from transformers import PreTrainedModel

from sftlab.models.layers import decoder_of


def pack_decoder(model: PreTrainedModel) -> None:
    """Let the model's decoder take `packed_ids` beside padded `input_ids` [rows, tokens].

    It then runs over `packed_ids` [1, n] with `position_ids` [1, n] and `tiles`, and its last
    hidden states are padded again, [rows, tokens, size]: that of packed token i stands at the flat
    place `packed_places[i]`, and the place rows x tokens drops it. Padding has zeros.
    """
    decoder = decoder_of(model)
    original = decoder.forward

    def forward(
        self: PreTrainedModel,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        packed_ids: torch.Tensor | None = None,
        packed_places: torch.Tensor | None = None,
        **kwargs: object,
    ) -> object:
        if packed_ids is None:
            return original(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        outputs = original(input_ids=packed_ids, **kwargs)
        packed = outputs.last_hidden_state[0]
        padded = packed.new_zeros(input_ids.numel() + 1, packed.shape[1])
        padded = padded.index_copy(0, packed_places, packed)[:-1]
        outputs.last_hidden_state = padded.view(*input_ids.shape, -1)
        return outputs

    decoder.forward = types.MethodType(forward, decoder)
