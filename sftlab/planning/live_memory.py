"""What autograd saves, by layer, and how many bytes of tensors are alive at once."""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakIdKeyDictionary


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of tensors that operations make, `now` and at the `peak`.

    `operations` is how many made a tensor.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.operations = 0
        self._known = WeakIdKeyDictionary()

    def __torch_dispatch__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Run an operation and count what it makes. A view, or what is changed in place, is not."""
        for storage in map(_storage, _tensors((args, kwargs))):
            self._known[storage] = True
        made = func(*args, **kwargs or {})
        new = [one for one in map(_storage, _tensors(made)) if one not in self._known]
        for storage in new:
            self._count(storage)
        self.operations += bool(new)
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known[storage] = True
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.now -= size


class SavedTensors:
    """The bytes that autograd saves within each of a model's layers, and outside of them.

    `pack` is for torch's hooks of saved tensors. Weights and views of them do not count, and each
    storage counts once. Arguments of a layer beside its hidden states are outside of it, for all
    layers share them.
    """

    def __init__(self, weights: Iterable[torch.Tensor]) -> None:
        self.bytes: Counter[int] = Counter()  # of each layer; -1 is outside of all
        self._counted = WeakIdKeyDictionary()
        self._shared = WeakIdKeyDictionary()
        for one in weights:
            self._counted[_storage(one)] = True
        self._layer = -1

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        """Note a tensor that autograd saves; returns what it is to hold."""
        storage = _storage(tensor)
        if storage not in self._counted:
            self._counted[storage] = True
            self.bytes[-1 if storage in self._shared else self._layer] += storage.nbytes()
        return tensor.detach()

    def watch(self, layers: Sequence[nn.Module], alike: Sequence[int]) -> Callable[[], None]:
        """Run the first of layers that are alike only; returns what ends that."""
        outputs: dict[int, Any] = {}
        own = [layer.forward for layer in layers]

        def forward(index: int, *args: Any, **kwargs: Any) -> Any:
            hidden, args, kwargs = _hidden(args, kwargs)
            if alike[index] != index:
                return tree_map_only(
                    torch.Tensor, _replacing(outputs[alike[index]], hidden), outputs[alike[index]]
                )
            for one in _tensors((args, kwargs)):
                self._shared[_storage(one)] = True
            if index == 0:  # frozen embeddings give no gradient, and all other layers have one
                hidden = hidden.detach().requires_grad_()
            self._layer = index
            outputs[index] = own[index](hidden, *args, **kwargs)
            self._layer = -1
            return outputs[index]

        for index, layer in enumerate(layers):
            layer.forward = _bound(forward, index)
        return lambda: [setattr(one, "forward", f) for one, f in zip(layers, own, strict=True)]


def _bound(forward: Callable, index: int) -> Callable:
    return lambda *args, **kwargs: forward(index, *args, **kwargs)


def _hidden(args: tuple, kwargs: dict) -> tuple[torch.Tensor, tuple, dict]:
    """Returns a layer's hidden states and its other arguments."""
    if args:
        return args[0], args[1:], kwargs
    kwargs = dict(kwargs)
    return kwargs.pop("hidden_states"), args, kwargs


def _replacing(output: Any, hidden: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """Returns what puts `hidden` in the place of an output's hidden states, its first tensor."""
    first = tree_leaves(output)[0]
    return lambda one: hidden if one is first else one


def _tensors(tree: object) -> list[torch.Tensor]:
    return [one for one in tree_leaves(tree) if isinstance(one, torch.Tensor)]


def _storage(tensor: torch.Tensor) -> torch.UntypedStorage:
    return tensor.untyped_storage()
