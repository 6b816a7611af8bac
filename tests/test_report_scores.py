"""Scores in a report: paired differences, Holm's correction, lm-eval's metrics and judges."""

import json
import re

import pytest
from report_runs import read_csv, refused, run_report, table_row

from sftlab.evaluation.significance import add_holm, compare
from sftlab.evaluation.text_metrics import paired_scores
from sftlab.runs.run_directory import adapter_hash
from sftlab.tables import interval, p_value

pytestmark = pytest.mark.usefixtures("no_other_plots")


def test_a_run_judged_twice_is_named(make, report, capsys, tmp_path):
    for rank in (4, 8, 16, 32):
        folder = make(
            f"r{rank}",
            lora_r=rank,
            lora_alpha=2 * rank,
            wrong=rank // 4,
            adapter="x" if rank < 16 else None,
        )
        (folder / "eval" / "judgments.jsonl").write_text("A\nB\n" if rank > 8 else f"{rank}\n")
    text = (tmp_path / "runs" / "r4" / "eval" / "quality.jsonl").read_text()
    (tmp_path / "runs" / "r32" / "eval" / "quality.jsonl").write_text(text)
    printed = run_report(report, capsys, "--runs", tmp_path / "runs", "--out", tmp_path / "out")
    markdown, rows = (tmp_path / "out" / "report.md").read_text(), read_csv(tmp_path / "out")
    for where in (printed, markdown):
        assert "r4 and r8 hold the same adapter:" in where
        assert "r16 and r32 hold the same judgements (judgments.jsonl)" in where
        assert "r4 and r32 hold the same answers" in where
    assert rows["r8"]["note"] == "same adapter as r4"
    assert rows["r4"]["note"] == "same adapter as r8; same answers as r32"
    assert "same adapter as r4" in table_row(markdown, "r8")
    assert "r8 and r16" not in printed


def test_scores_of_another_data_set_are_compared_where_asked_for(make, report, capsys, tmp_path):
    for name, wrong in (("a", 1), ("b", 30)):
        evaluated = make(name, wrong=1) / "eval"
        scored = make(f"{name}-elsewhere", wrong=wrong) / "eval"
        record = json.loads((scored / "quality.json").read_text())
        record["held_out"]["dataset"] = "data/other rows.jsonl"
        record["adapter_hash"] = adapter_hash(evaluated.parent)
        (evaluated / "quality-other-rows.json").write_text(json.dumps(record))
        (scored / "quality.jsonl").rename(evaluated / "quality-other-rows.jsonl")
    given = ("--runs", tmp_path / "runs" / "a", tmp_path / "runs" / "b", "--out", tmp_path / "out")
    run_report(report, capsys, *given)
    own = read_csv(tmp_path / "out")
    run_report(report, capsys, *given, "--scored_on", "data/other rows.jsonl")
    other = read_csv(tmp_path / "out")
    assert own["a"]["tuned bleu"] == own["b"]["tuned bleu"] == other["a"]["tuned bleu"]
    assert float(other["b"]["tuned bleu"]) < float(own["b"]["tuned bleu"]) / 2
    assert (
        "## Base and tuned on the rows of data/other rows.jsonl"
        in (tmp_path / "out" / "report.md").read_text()
    )
    for name in ("nowhere", "elsewhere/other rows.jsonl"):
        with pytest.raises(SystemExit, match=rf"a, b have no scores of {name}: run eval/quality"):
            run_report(report, capsys, *given, "--scored_on", name)
    changed = evaluated / "quality-other-rows.json"  # of b
    record = json.loads(changed.read_text())
    record["held_out"]["fingerprint"] = "of other rows"
    changed.write_text(json.dumps(record))
    with pytest.raises(SystemExit, match="were scored on other rows of data/other rows"):
        run_report(report, capsys, *given, "--scored_on", "data/other rows.jsonl")


def test_equal_answers_differ_by_nothing(make, report, capsys, tmp_path):
    for name in ("a", "b"):
        folder = make(name)
        text = (tmp_path / "runs" / "a" / "eval" / "quality.jsonl").read_text()
        (folder / "eval" / "quality.jsonl").write_text(text)
    flags = ("--reference", tmp_path / "runs" / "b")
    run_report(report, capsys, "--runs", tmp_path / "runs", "--out", tmp_path / "out", *flags)
    section = (tmp_path / "out" / "report.md").read_text().split("## Tuned models against b")[1]
    # answers to other rows may differ: BLEU and ROUGE-L have an interval
    row = table_row(section, "a")
    assert re.fullmatch(
        r"\| a \| 0 \[0, 0\] \| 1.000 (\| 0 \[-([\d.]+), \2\] \| 1.000 ){2}\|", row
    ), row


def test_holm_counts_the_runs_of_a_score(make, report, capsys, tmp_path):
    made = {
        rank: make(f"r{rank}", lora_r=rank, lora_alpha=2 * rank, wrong=wrong)
        for rank, wrong in ((8, 9), (16, 1), (32, 8))
    }
    make("r64", lora_r=64, lora_alpha=128, wrong=None)
    printed = run_report(report, capsys, "--runs", tmp_path / "runs", "--out", tmp_path / "out")
    assert "Tuned models against r8" in printed
    assert "after Holm over the runs of a score" in printed
    assert "not compared: r64 (no scores)" in printed
    tuned = {
        rank: [
            json.loads(line)["tuned"]
            for line in (folder / "eval" / "quality.jsonl").read_text().splitlines()
        ]
        for rank, folder in made.items()
    }
    expected = {}
    for rank in (16, 32):
        pairs = paired_scores(tuned[8], tuned[rank])
        found = compare({score: pairs[score] for score in report.SHOWN})
        expected |= {(rank, score): one for score, one in found.items()}
    for score in report.SHOWN:
        add_holm({key: one for key, one in expected.items() if key[1] == score})
    section = (tmp_path / "out" / "report.md").read_text().split("## Tuned models against")[1]
    for rank in (16, 32):
        cells = []
        for score in report.SHOWN:
            cells += [
                interval(expected[rank, score]["difference"]),
                p_value(expected[rank, score]["p_holm"]),
            ]
        assert table_row(section, f"r{rank}") == f"| r{rank} | {' | '.join(cells)} |"
    assert expected[16, "bleu"]["p_holm"] > expected[16, "bleu"]["p_value"]


def test_scores_on_other_rows_are_not_compared(make, report, capsys, tmp_path):
    folders = [make("a"), make("b")]
    path = folders[1] / "eval" / "quality.jsonl"
    path.write_text(path.read_text().replace("no other number", "no other one"))
    printed = run_report(report, capsys, "--runs", tmp_path / "runs", "--out", tmp_path / "out")
    said = "Tuned models are not compared with a: b (other held-out rows)"
    assert said in printed and said in (tmp_path / "out" / "report.md").read_text()
    make("c")
    printed = run_report(report, capsys, "--runs", tmp_path / "runs", "--out", tmp_path / "out")
    assert "not compared: b (other held-out rows)" in printed
    error = refused(report, "--runs", *folders, "--reference", "a", "--out", tmp_path / "out")
    assert "no other run can be compared with it: b (other held-out rows)" in error


def test_scores_of_another_adapter_are_not_the_runs(plots, make, report, capsys, tmp_path):
    folder = make("a")
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"trained again")
    printed = run_report(report, capsys, "--runs", folder, "--out", tmp_path / "out")
    row = read_csv(tmp_path / "out")["a"]
    assert "warning: a: stale scores, of another adapter" in printed
    assert (row["tuned bleu"], row["note"]) == ("", "stale scores")
    assert not (tmp_path / "out" / "quality.png").exists()


def test_main_metrics_of_the_harness_are_shown(make, report, capsys, tmp_path):
    folder = make("a", wrong=None)
    one = {
        side: {"value": v, "interval_95": [v - 0.1, v + 0.1]}
        for side, v in (("base", 0.25), ("tuned", 0.375))
    }
    entry = {
        "task": "arc_easy",
        "chat_template": True,
        "few_shot": 5,
        "limit": None,
        "main_metric": "acc_norm,none",
        "metrics": {"acc,none": {}, "acc_norm,none": one},
        "adapter_hash": adapter_hash(folder),
    }
    stale = entry | {"task": "gsm8k", "adapter_hash": "another"}
    (folder / "eval" / "harness.json").write_text(json.dumps({"entries": [entry, stale]}))
    printed = run_report(report, capsys, "--runs", folder, "--out", tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "tuned arc_easy 5-shot" in text
    assert "0.375 [0.275, 0.475]" in text
    assert "gsm8k" not in text
    assert "stale harness scores" in printed


def test_scores_of_judges_stand_under_their_titles(make, report, capsys, tmp_path):
    for name in ("r8", "r16"):
        folder = make(name, wrong=None, lora_r=int(name[1:]), lora_alpha=2 * int(name[1:]))
        one = {
            side: {"value": v, "interval_95": [v - 4, v + 4]}
            for side, v in (("base", 12.5), ("tuned", 31.25))
        }
        entry = {
            "title": "AlpacaEval instructions, judge x, reference base",
            "judge_fit": name == "r8",
            "scores": {"win_rate": one},
            "adapter_hash": adapter_hash(folder),
            "answers": {"tuned": {"hash": f"of {name}"}},
            "judged": {"tuned": {"hash": "the same"}},
            "judge": {"judge": "x"},
            "generation": {"max_new_tokens": 256},
            "questions_hash": "q",
        }
        rated = entry | {"title": "MT-Bench, judge x, scale 1 to 5", "scores": {"overall": one}}
        for file, found in (
            ("alpaca", [entry]),
            ("mt_bench", [rated, rated | {"adapter_hash": "another"}]),
        ):
            (folder / "eval" / f"{file}.json").write_text(json.dumps({"entries": found}))
    printed = run_report(report, capsys, "--runs", tmp_path / "runs", "--out", tmp_path / "out")
    text, rows = (tmp_path / "out" / "report.md").read_text(), read_csv(tmp_path / "out")
    title = "tuned win rate %, AlpacaEval instructions, judge x, reference base"
    assert (rows["r8"][title], rows["r16"][title]) == ("31.25", "")
    assert rows["r16"][f"{title}, UNFIT judge"] == "31.25"
    assert rows["r8"]["base mean rating, MT-Bench, judge x, scale 1 to 5"] == "12.5"
    assert "31.25 [27.25, 35.25]" in text
    assert "stale mt_bench scores" in printed
    assert "hold the same judgements (AlpacaEval instructions, judge x" in printed

    (folder / "eval" / "mt_bench.json").write_text(
        json.dumps({"entries": [rated | {"generation": {"max_new_tokens": 9}}]})
    )
    with pytest.raises(SystemExit) as stopped:
        report.main(
            ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out"), "--axis", "lora_r"]
        )
    assert "quality.MT-Bench, judge x, scale 1 to 5.max_new_tokens" in str(stopped.value)


def test_a_base_far_from_the_tuned_models_is_written_not_drawn(
    make, report, plots, capsys, tmp_path
):
    for rank, wrong in ((8, 4), (16, 1)):
        make(f"r{rank}", lora_r=rank, lora_alpha=2 * rank, wrong=wrong)
    run_report(report, capsys, "--runs", tmp_path / "runs", "--out", tmp_path / "out")
    svg = (tmp_path / "out" / "quality.svg").read_text()
    assert "exact match" in svg and "final number" not in svg  # which no run has
    base = read_csv(tmp_path / "out")["r8"]["base bleu"]
    assert f"base {float(base):.4g}, not drawn" in svg
