"""Decoding on a GPU by a step that is captured once and then replayed as a CUDA graph.

A step of a small model is hundreds of short kernels, and Python needs longer to start them than the
GPU to run them. A captured step starts them all at once. It needs tensors that stay where they are:
a key-value cache of fixed length, and the tokens, positions and mask beside it.
"""

import copy
import inspect
from collections.abc import Callable

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel, StaticCache

from sftlab.models.inner_model import inner_model
from sftlab.models.rotary import GROWING, rotary_kinds

# a warm-up before the capture takes as many columns beyond the last
_WARM_STEPS = 2
# lengths are rounded up to this, so that batches of about as long prompts take the same tensors
_LENGTHS = 128

Choice = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class NotCaptured(RuntimeError):
    """A step could not be captured on this GPU."""


def can_capture(model: PeftModel | PreTrainedModel) -> bool:
    """Returns whether the steps of a model are known to be the same when they are captured.

    They are where every layer has full attention by sdpa, and nothing of a step depends on a
    value that the host must read: no quantised weights, no experts, no angles that grow with the
    text.
    """
    inner = inner_model(model)
    config = inner.config.get_text_config()
    return (
        model.device.type == "cuda"
        and only_full_attention(inner)
        and inner._can_compile_fullgraph
        and config._attn_implementation == "sdpa"
        and getattr(inner, "hf_quantizer", None) is None
        and not any("experts" in name and isinstance(n, int) for name, n in vars(config).items())
        and not rotary_kinds(config) & GROWING
    )


def only_full_attention(model: PreTrainedModel) -> bool:
    """Returns whether every layer has full attention, whose cache loses rows rightly."""
    config = model.config.get_text_config()
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    return layers == {"full_attention"} and not model._is_stateful


def answering_weights(model: PeftModel | PreTrainedModel) -> int:
    """Returns a hash of where the weights lie that a model computes with, and which adapters."""
    tuned = [
        (module.disable_adapters, tuple(module.active_adapters))
        for module in model.modules()
        if isinstance(module, BaseTunerLayer)
    ]
    return hash((tuple(weight.data_ptr() for weight in model.parameters()), *tuned))


class CapturedSteps:
    """Continues `rows` rows of up to `length` tokens each, prompt included, in place.

    `choose` returns the next token of each row [rows] from the ids so far [rows, length] and the
    logits [rows, vocabulary], on the device. A step of fewer rows is captured when it is first
    needed.
    """

    def __init__(
        self, model: PeftModel | PreTrainedModel, rows: int, length: int, choose: Choice
    ) -> None:
        self.model, self.rows, self.choose = model, rows, choose
        self.length, self.weights = _rounded(length), answering_weights(model)
        self.size = rows
        config = inner_model(model).config.get_text_config()
        self._caches = {rows: StaticCache(config=config, max_cache_len=self.length)}
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        new = lambda *shape, dtype=torch.long: torch.zeros(  # noqa: E731
            *shape, dtype=dtype, device=model.device
        )
        self.ids, self._positions = new(rows, self.length), new(rows)
        self._place = new(1)  # the column of the last token
        self._mask = new(rows, 1, 1, self.length, dtype=torch.bool)
        self.nan = new(rows, dtype=torch.bool)
        takes = inspect.signature(inner_model(model).forward).parameters
        self._last = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}

    def fits(self, rows: int, length: int) -> bool:
        """Returns whether it has just the shape of such a batch, and the weights that now answer.

        Larger tensors would do, but kernels may round otherwise on them. So the batches before a
        batch do not count: an evaluation that goes on after a kill gives the same answers.
        """
        shape = rows, _rounded(length), answering_weights(self.model)
        return shape == (self.rows, self.length, self.weights)

    def start(self, ids: torch.Tensor, mask: torch.Tensor) -> None:
        """Read the prompts [rows, width], padded on the left, and choose the first tokens."""
        self.size, width = self.rows, ids.shape[1]
        cache = self._caches[self.rows]
        cache.reset()
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        self.nan.zero_()
        self.ids.zero_()
        self.ids[:, :width] = ids
        self._mask.zero_()
        self._mask[:, 0, 0, :width] = mask.bool()
        self._place.fill_(width - 1)
        self._positions.copy_(positions[:, -1])
        logits = self.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache,
            use_cache=True, **self._last,
        ).logits[:, -1]  # fmt: skip
        self._append(logits, self.size)

    def advance(self, steps: int) -> None:
        """Choose `steps` more tokens of every row. Raises NotCaptured."""
        step = self._captured() if self.model.device.type == "cuda" else self._step
        for _ in range(steps):
            step()

    def keep(self, rows: list[int]) -> None:
        """Go on with these rows alone, which become the first ones.

        The step has as many rows as before, or half of them, a quarter and so on.
        """
        size = self.size
        while size // 2 >= len(rows):
            size //= 2
        chosen = torch.tensor([*rows, *[rows[-1]] * (size - len(rows))], device=self.ids.device)
        layers = self._caches[self.rows].layers
        held = [one for layer in layers for one in (layer.keys, layer.values)]
        for one in (self.ids, self._positions, self._mask, self.nan, *held):
            one[:size] = one[chosen]
        self.size = size

    def _step(self) -> None:
        size = self.size
        at = self._place.expand(size)[:, None]
        self._mask.index_fill_(3, self._place, True)
        logits = self.model(
            input_ids=self.ids[:size].gather(1, at),
            attention_mask=self._mask[:size],
            position_ids=self._positions[:size, None],
            past_key_values=self._cache(size),
            use_cache=True,
        ).logits[:, -1]
        self._append(logits, size)

    def _append(self, logits: torch.Tensor, size: int) -> None:
        """Choose tokens, and write them into the next column."""
        logits = logits.float()
        self.nan[:size] |= logits.isnan().any(dim=-1)
        chosen = self.choose(self.ids[:size], logits)
        self._place += 1
        self._positions += 1
        self.ids[:size].index_copy_(1, self._place, chosen[:, None])

    def _cache(self, size: int) -> StaticCache:
        """Returns the cache of the first `size` rows, which shares its memory with the whole."""
        if size not in self._caches:
            whole = self._caches[self.rows]
            part = copy.copy(whole)
            part.layers = [copy.copy(layer) for layer in whole.layers]
            for layer in part.layers:
                layer.keys, layer.values = layer.keys[:size], layer.values[:size]
            self._caches[size] = part
        return self._caches[size]

    def _captured(self) -> Callable[[], None]:
        """Returns the replay of a step of this size. Raises NotCaptured where it has none."""
        if self.size not in self._graphs:
            try:
                self._graphs[self.size] = self._capture()
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                raise NotCaptured(str(error).partition("\n")[0]) from error
        return self._graphs[self.size].replay

    def _capture(self) -> torch.cuda.CUDAGraph:
        lengths = [layer.cumulative_length for layer in self._caches[self.rows].layers]
        state = [self.ids, self._positions, self._place, self._mask, self.nan, *lengths]
        before, drawn = [one.clone() for one in state], torch.cuda.get_rng_state()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_STEPS):
                self._step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step()
        for one, was in zip(state, before, strict=True):
            one.copy_(was)
        torch.cuda.set_rng_state(drawn)
        return graph


def _rounded(length: int) -> int:
    return -(-(length + _WARM_STEPS) // _LENGTHS) * _LENGTHS
