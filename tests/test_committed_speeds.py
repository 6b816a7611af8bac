"""The column of measured speeds in docs/models.md, filled from the tables in results/."""

import pytest
from conftest import ROOT, load_script

from sftlab.measurement.committed_speeds import committed_speeds

models = load_script("docs/make_models.py")


@pytest.fixture
def results(tmp_path):
    """Tables as benchmarks write them: one that names no shape, and one of several families."""
    (tmp_path / "throughput").mkdir()
    (tmp_path / "throughput" / "throughput.csv").write_text(
        "variant,gpus,tokens_per_s\n"
        '"sft.py bf16, 64 rows",1,102919\nsft.py bf16,1,90000\n'
        "sft.py fp8,1,125297\nsft.py bf16,2,200063\ntrl bf16,1,400000\n"
    )
    (tmp_path / "families").mkdir()
    (tmp_path / "families" / "throughput.csv").write_text(
        "variant,shape,gpus,tokens_per_s\n"
        "sft.py bf16,qwen3-1.7b,1,60000\nsft.py bf16,qwen3-30b-a3b-6layers,1,41000\n"
        "sft.py bf16,qwen3.5-2b,1,30000\nsft.py bf16,gpt-oss-20b-4layers,1,\n"
    )
    return tmp_path


def test_the_fastest_training_of_each_shape_is_found(results):
    found = {shape: speed.tokens_per_s for shape, speed in committed_speeds(results).items()}
    assert found == {
        "llama3.2-1b": 102_919,
        "qwen3-1.7b": 60_000,
        "qwen3-30b-a3b-6layers": 41_000,
        "qwen3.5-2b": 30_000,
    }


@pytest.mark.parametrize(
    ("family", "said"),
    [
        ("Qwen 3", "[qwen3-1.7b: 60,000](../results/families/throughput.csv)"),
        ("Qwen 3 MoE", "[qwen3-30b-a3b-6layers: 41,000](../results/families/throughput.csv)"),
        ("Qwen 3.5 (text)", "[qwen3.5-2b: 30,000](../results/families/throughput.csv)"),
        ("gpt-oss", ""),
        ("Gemma 2", ""),
    ],
)
def test_a_shape_is_one_of_its_family(results, family, said, monkeypatch):
    monkeypatch.setattr(models, "ROOT", results.parent)
    speeds = {
        shape: speed._replace(table=results.parent / "results" / speed.table.relative_to(results))
        for shape, speed in committed_speeds(results).items()
    }
    assert models.measured_of(family, speeds) == said


def test_every_committed_shape_is_of_a_family():
    speeds = committed_speeds(ROOT / "results")
    links = [models.measured_of(family, speeds) for family in models.FAMILIES]
    assert sum(map(bool, links)) >= 1 and set(models.SHAPES.values()) <= set(models.FAMILIES)


def test_a_shape_of_no_family_is_said():
    speeds = {"falcon-7b": models.Speed(1.0, ROOT / "results" / "x" / "throughput.csv")}
    with pytest.raises(ValueError, match="has the shape falcon-7b, which is of no family"):
        models.measured_of("Qwen 3", speeds)
