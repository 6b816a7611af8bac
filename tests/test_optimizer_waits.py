"""bitsandbytes' optimizers wait only before their state is read, and compute what they computed."""

import copy
import warnings

import pytest
import torch
from bitsandbytes import optim
from bitsandbytes.optim import optimizer as upstream
from conftest import short_fields
from packed_training import build, train

from sftlab.training.optimizer_waits import wait_to_read

MADE = {
    "paged, 32 bits": lambda groups: optim.PagedAdamW32bit(groups, weight_decay=0.1),
    "paged, 8 bits": lambda groups: optim.PagedAdamW8bit(groups, weight_decay=0.1),
    "8 bits": lambda groups: optim.AdamW8bit(groups),
    "lion": lambda groups: optim.PagedLion32bit(groups),
    "one state": lambda groups: optim.RMSprop8bit(groups),
}


@pytest.fixture
def waits(monkeypatch):
    """What happened, in order: a shape for each tensor that was updated, "wait" for each wait."""
    found = []
    for module in ("bitsandbytes.optim.optimizer", "bitsandbytes.utils"):
        monkeypatch.setattr(f"{module}.sync_gpu", lambda tensor: found.append("wait"))
    for of in (upstream.Optimizer1State, upstream.Optimizer2State):

        def update(self, group, p, gindex, pindex, own=of.update_step):
            found.append(tuple(p.shape))
            own(self, group, p, gindex, pindex)

        monkeypatch.setattr(of, "update_step", update)
    return found


def parameters():
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape)) for shape in ((64, 80), (3, 5), (70, 70), (9,))]


def groups_of(four):
    return [{"params": four[:2], "lr": 1e-2}, {"params": four[2:], "lr": 3e-2}]


def step(optimizer, four, seed):
    generator = torch.Generator().manual_seed(seed)
    for place, one in enumerate(four):
        one.grad = None if place == 1 else torch.randn(one.shape, generator=generator)
    optimizer.step()


def tensors(state):
    """Every tensor and number of a state, in order."""
    if isinstance(state, dict):
        return [one for key in state for one in tensors(state[key])]
    if isinstance(state, list | tuple):
        return [one for part in state for one in tensors(part)]
    return [torch.as_tensor(state)] if isinstance(state, torch.Tensor | int | float) else []


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("free, asks", [(0.5, 0), (0.051, 0), (0.049, 3)])
def test_paged_states_are_asked_for_where_memory_is_short(monkeypatch, free, asks):
    asked = []
    monkeypatch.setattr(upstream.Optimizer8bit, "prefetch_state", lambda self, p: asked.append(p))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (int(free * 10**9), 10**9))
    monkeypatch.setattr("bitsandbytes.utils.sync_gpu", lambda tensor: None)
    four = parameters()
    optimizer = MADE["paged, 32 bits"](groups_of(four))
    assert wait_to_read(optimizer)
    step(optimizer, four, 0)
    assert len(asked) == asks


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("make", MADE.values(), ids=list(MADE))
def test_a_step_waits_for_nothing_and_computes_the_same(make, waits):
    found = []
    for mended in (False, True):
        four = parameters()
        optimizer = make(groups_of(four))
        assert not mended or wait_to_read(optimizer)
        waits.clear()
        for seed in range(3):
            step(optimizer, four, seed)
        happened = list(waits)
        found.append((four, optimizer.state_dict(), happened))
        assert waits == happened + ["wait"] * mended, "a state was read without waiting"
    (plain, state, upstreams), (mine, own_state, own) = found
    assert all(torch.equal(*pair) for pair in zip(plain, mine, strict=True))
    assert state.keys() == own_state.keys()
    pairs = list(zip(tensors(state), tensors(own_state), strict=True))
    assert len(pairs) > 10 and all(torch.equal(*pair) for pair in pairs)
    updates = [(64, 80), (70, 70), (9,)]
    assert own == updates * 3
    assert [one for one in upstreams if one != "wait"] == updates * 3
    assert upstreams.count("wait") >= 9, "bitsandbytes waits less itself: delete the mend"


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_paged_states_are_waited_for_where_no_host_may_touch_them(monkeypatch, waits):
    monkeypatch.setattr("sys.platform", "win32")
    four = parameters()
    for name, count in (("paged, 32 bits", 1), ("8 bits", 0)):
        optimizer = MADE[name](groups_of(four))
        assert wait_to_read(optimizer)
        waits.clear()
        step(optimizer, four, 0)
        assert waits.count("wait") == count


def test_hooks_schedules_closures_and_saved_states_are_as_before(waits):
    four = parameters()
    optimizer = optim.AdamW8bit(groups_of(four))
    assert wait_to_read(optimizer) and not wait_to_read(torch.optim.AdamW(four))
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # one says that a schedule did not see the step
        step(optimizer, four, 0)
        schedule.step()
    assert seen == ["before", "after"]
    assert optimizer.param_groups[0]["lr"] == 5e-3
    assert optimizer.step(lambda: 7.0) == 7.0
    assert type(optimizer).__name__ == "AdamW8bit" and isinstance(optimizer, optim.AdamW8bit)
    again = [torch.nn.Parameter(one.detach().clone()) for one in four]
    resumed = optim.AdamW8bit(groups_of(again))
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one, its in ((optimizer, four), (resumed, again)):
        step(one, its, 5)
    assert all(torch.equal(*pair) for pair in zip(four, again, strict=True))


def test_an_optimizer_with_a_step_of_its_own_is_left_alone():
    class Own(optim.AdamW8bit):
        def step(self, closure=None):
            return 3

    optimizer = Own(parameters())
    assert not wait_to_read(optimizer)
    assert optimizer.step() == 3


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_a_training_waits_for_its_checkpoints_alone(base, rows, tmp_path, waits):
    fields = short_fields(base, rows, tmp_path / "run")
    trainer = build(fields, optim="paged_adamw_32bit", loraplus_lr_ratio="4")
    train(trainer)
    trained = sum(one.requires_grad for one in trainer.model.parameters())
    steps, saved = trainer.state.global_step, len(list((tmp_path / "run").glob("checkpoint-*")))
    assert waits[0] == "wait"  # accelerate reads the empty state once
    assert waits[1:].count("wait") == saved < steps
    assert len(waits[1:]) == steps * trained + saved
