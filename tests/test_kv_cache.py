"""The cache is really off where the table says so; answers and the cache's size are right."""

import pytest
import torch
from conftest import load_script
from transformers import AutoModelForCausalLM, DynamicCache

from sftlab.tables import read_csv

kv_cache = load_script("benchmarks/kv_cache.py")


@pytest.fixture(scope="module")
def model(base):
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()


def test_without_the_cache_every_step_sees_the_whole_text(model):
    seen, ids = [], torch.randint(0, 200, (2, 7))
    hook = model.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    answers = {}
    try:
        for name, cache in kv_cache.CACHES.items():
            answers[name] = kv_cache.generate(model, ids, 5, cache)
    finally:
        hook.remove()
    assert seen == [7, 1, 1, 1, 1, 7, 8, 9, 10, 11]
    assert answers["with"].shape == (2, 5)
    assert torch.equal(answers["with"], answers["without"])


def test_the_cache_s_size(model):
    ids, cache = torch.randint(0, 200, (3, 11)), DynamicCache(config=model.config)
    model(ids, past_key_values=cache, use_cache=True)
    held = sum(
        t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values)
    )
    assert kv_cache.cache_bytes(model, 3, 11) == held


def measure(base, out, *more):
    """The table of two batches of short prompts."""
    argv = ["--model", str(base), "--batches", "1", "2", "--prompts", "16", "--outputs", "3"]
    kv_cache.main([*argv, "--repeats", "1", "--out", str(out), *more])
    return read_csv(out / "kv_cache.csv")


def test_the_table(base, tmp_path, monkeypatch):
    monkeypatch.setitem(kv_cache.PUBLISHED, ("with", 1, 16, 4), 4.5)
    rows = measure(base, tmp_path / "kv", "--prompts", "16", "96", "--outputs", "4")
    assert [(r["cache"], r["batch"], r["prompt"]) for r in rows[:3]] == [
        ("with", "1", "16"),
        ("without", "1", "16"),
        ("with", "2", "16"),
    ]
    assert {r["same_answers"] for r in rows} == {"1 of 1", "2 of 2"}
    peaks = {(r["cache"], r["batch"], r["prompt"]): float(r["peak_mb"]) for r in rows}
    assert peaks["with", "2", "96"] > peaks["with", "1", "96"] > peaks["with", "1", "16"]
    assert {r["published_seconds"] for r in rows} == {""}
    assert (tmp_path / "kv" / "kv_cache.png").is_file()


def test_what_was_measured_before_it_was_stopped_is_kept(base, tmp_path, capsys):
    whole = measure(base, tmp_path, "--batches", "1")
    again = measure(base, tmp_path)
    assert again[:2] == whole, "figures as they were"
    assert [row["batch"] for row in again] == ["1", "1", "2", "2"]
    assert capsys.readouterr().out.count("; done before") == 1
    assert measure(base, tmp_path) == again
    table = tmp_path / "kv_cache.csv"
    table.write_text(table.read_text(encoding="utf-8").replace("torch ", "torch 0"))
    capsys.readouterr()
    measure(base, tmp_path)
    assert "done before" not in capsys.readouterr().out, "measured with other versions"
