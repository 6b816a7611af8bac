"""Training walks over all modules where that changes something, and leaves the model as it was."""

import copy
import pickle

import torch
from packed_training import build
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from sftlab.training.short_walks import short_walks


class Counted(nn.Module):
    """Counts who tells it whether it trains."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.told = nn.Linear(2, 2), 0

    def train(self, mode: bool = True) -> nn.Module:
        self.told += 1
        return super().train(mode)


def test_only_a_module_that_does_not_train_is_a_reason_to_walk():
    model = Counted()
    with short_walks(model, []):
        assert model.train() is model
        assert model.told == 0
        model.inner.eval()
        assert model.train().inner.training
        assert model.told == 1
        model.eval()
        assert not model.inner.training
        assert model.train().inner.training
    model.train()
    assert model.told == 4, "eval is one, and the last is outside"


def test_gradients_of_what_trains_are_gone_and_the_model_is_as_before():
    model = Counted()
    before = dict(vars(model))
    groups = [{"params": list(model.parameters())}]
    with short_walks(model, groups):
        for set_to_none in (True, False):
            model.inner(torch.ones(1, 2)).sum().backward()
            model.zero_grad(set_to_none=set_to_none)
            left = [one.grad for one in model.parameters()]
            assert all(one is None if set_to_none else not one.any() for one in left)
    assert vars(model) == before | {"told": 0}
    model.zero_grad()
    assert model.inner.weight.grad is None


def test_copies_of_a_model_that_trains_are_models_of_their_own():
    model = Counted()
    with short_walks(model, [{"params": list(model.parameters())}]):
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            for one in (model, copied):
                one.inner(torch.ones(1, 2)).sum().backward()
            copied.eval()
            copied.zero_grad()
            assert model.inner.training
            assert not copied.inner.training
            assert all(one.grad is not None for one in model.parameters())
            assert all(one.grad is None for one in copied.parameters())
            assert copied.train().inner.training


def test_a_parameter_that_comes_later_loses_its_gradient_too():
    model = Counted()
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    with short_walks(model, optimizer.param_groups):
        model.later = nn.Linear(2, 2)
        optimizer.add_param_group({"params": list(model.later.parameters())})
        model.later(torch.ones(1, 2)).sum().backward()
        model.zero_grad()
    assert model.later.weight.grad is None


def test_what_a_model_was_given_before_is_given_back_and_what_came_since_stays():
    model = Counted()
    model.train = before = lambda mode=True: model
    with short_walks(model, []):
        model.zero_grad = since = lambda set_to_none=True: None
    assert vars(model)["train"] is before
    assert vars(model)["zero_grad"] is since


def test_steps_of_a_training_do_not_walk(fields, tmp_path, monkeypatch):
    """An evaluation makes the next step walk once: dropout is back after it."""
    told, seen = [], []
    norm, plain = LlamaRMSNorm, nn.Module.train
    monkeypatch.setattr(
        norm, "train", lambda self, mode=True: (told.append(mode), plain(self, mode))[1]
    )
    split = {"split_fractions": ["0.8", "0.1", "0.1"]}
    trainer = build(fields | split, max_steps=6, eval_strategy="steps", eval_steps=3)
    norms = sum(isinstance(one, norm) for one in trainer.model.modules())
    plain_step = trainer.forward_and_backward

    def step(*given):
        seen.append((len(told) // norms, trainer.model.training))
        told.clear()
        loss = plain_step(*given)
        assert all(one.training for one in trainer.model.modules())
        return loss

    monkeypatch.setattr(trainer, "forward_and_backward", step)
    for _ in range(2):
        seen.clear()
        trainer.train()
        walks = [count for count, _ in seen]
        assert walks[2:] == [0, 1, 1, 0], "to evaluate, and to train again"
    assert not {"train", "zero_grad"} & set(vars(trainer.model))
