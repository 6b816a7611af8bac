"""GPUs are known by CUDA's names, and hosts by their measured speed."""

import re
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, load_script
from planned_steps import SAID

from sftlab.planning import gpu_specs, machine_checks
from sftlab.planning.gpu_specs import GPUS, find_gpu
from sftlab.planning.machine_checks import FINE


@pytest.fixture(scope="module")
def plan():
    return load_script("recipes/plan.py")


def test_the_page_names_every_gpu():
    text = (ROOT / "docs" / "planning.md").read_text()
    named = text.partition("Known GPUs: ")[2].partition(".\n")[0]
    assert re.split(r",\s+|\s+and\s+", named) == list(GPUS)


@pytest.fixture
def printed(plan, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)

    def run(*argv):
        plan.main(list(argv))
        return capsys.readouterr().out

    return run


def test_gpus_are_known_by_what_cuda_calls_them(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_specs, "measure_host", lambda: 2.5)

    def shows(seen, memory_gb):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: seen)
        facts = SimpleNamespace(total_memory=memory_gb * 2**30)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: facts)

    for seen, memory_gb, name in (
        ("NVIDIA H200", 139.8, "h200"),
        ("NVIDIA H100 80GB HBM3", 79.1, "h100-80"),
        ("NVIDIA H100 PCIe", 79.2, "h100-pcie"),
        ("NVIDIA A100-SXM4-40GB", 39.5, "a100-40"),
        ("NVIDIA A100 80GB PCIe", 79.3, "a100-80"),
        ("NVIDIA L40S", 44.5, "l40s"),
        ("Tesla T4", 14.6, "t4"),
    ):
        shows(seen, memory_gb)
        here = find_gpu("here")
        assert (here.name, here.memory_gb, here.host_us) == (name, memory_gb, 2.5)
    for seen, memory_gb in (
        ("NVIDIA GTX 1080", 8.0),
        ("NVIDIA L40", 44.5),
        ("NVIDIA A100-SXM-64GB", 63.4),
        ("NVIDIA GH200 480GB", 94.5),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", 9.8),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 15.7),
        ("NVIDIA T400 4GB", 3.7),
    ):
        shows(seen, memory_gb)
        with pytest.raises(ValueError, match=f"no figures for {seen}, {memory_gb} GB"):
            find_gpu("here")
    assert all(gpu.memory_gb > 10 and gpu.half >= gpu.fp32 for gpu in GPUS.values())


def test_short_steps_go_by_the_host_s_speed_and_the_plan_says_how_it_is_known(printed):
    short = ["--per_device_train_batch_size", "2", "--global_batch_size", "2"]
    said = {
        host: printed(*SAID, *more, *short)
        for host, more in ((None, []), (7.4, ["--host_us", "7.4"]))
    }
    assert f"host: {gpu_specs.HOST_US:g} us a small operation (assumed)" in said[None]
    assert "host: 7.4 us a small operation (as given)" in said[7.4]
    step = {
        host: float(re.search(r"a step, s +([\d.]+) \(the host", text)[1])
        for host, text in said.items()
    }
    assert step[7.4] / step[None] == pytest.approx(7.4 / gpu_specs.HOST_US, rel=0.01)
    long = [
        printed(*SAID, "--per_device_train_batch_size", "64", "--host_us", str(us))
        for us in (1.0, 2.0)
    ]
    assert re.search("a step, s.*", long[0])[0] == re.search("a step, s.*", long[1])[0]


def test_a_host_is_as_fast_as_where_nothing_disturbs_it(monkeypatch):
    times = iter([0, 0, 0, 0.005, 0.1, 0.1, 0.102, 0.2, 0.2, 0.204, 2])
    monkeypatch.setattr(gpu_specs.time, "perf_counter", lambda: next(times))
    assert gpu_specs.measure_host() == 2.0
    monkeypatch.undo()
    assert machine_checks.check_host().level == FINE
    assert re.match(r"\d+(\.\d+)? us a small operation", machine_checks.check_host().seen)


def test_a_command_s_cells_have_one_host_whatever_disturbed_it():
    script = load_script("benchmarks/plan_accuracy.py")
    lines = [{"cell": "a", "host_us": us} for us in ("5.2", "12.6", "", "4.1")]
    assert [line["host_us"] for line in script.on_one_host(lines)] == [5.2] * 4
    assert script.on_one_host([{"cell": "a"}]) == [{"cell": "a"}]


def test_published_peaks_are_within_a_tenth():
    for line in load_script("benchmarks/plan_accuracy.py").published():
        assert abs(line["memory_error"]) < 0.1, line
