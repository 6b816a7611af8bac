"""Base against tuned on the untouched test split: response perplexity with 95 % intervals.

python eval/quality.py --run runs/demo-attn_r16 [--samples 1000] [--batch_size 16]

Both models answer for the same rows, with the run's own template and mask, from one load of the weights (the adapter
switched off and on). Writes RUN/eval/quality.json and, one record a row, RUN/eval/quality.jsonl.
"""

import sftlab.quiet  # noqa: F401, I001  (before the libraries that it quiets)

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from trl import get_quantization_config
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from sftlab.config import DataArguments, ModelArguments
from sftlab.data import Splits, load_splits
from sftlab.likelihood import RowNll, bootstrap_perplexity, row_nll, with_fused_head
from sftlab.model import model_init_kwargs
from sftlab.run import read_run, write_json
from sftlab.template import encode, template_hash

RESAMPLES = 10_000
FEW_ROWS = 30


def main() -> None:
    """Load the run, score the test split with the base and the tuned model, compare, write, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", required=True, type=Path, help="a finished run's directory")
    parser.add_argument("--samples", type=int, default=0, help="the first n test rows (default: all)")
    parser.add_argument("--batch_size", type=int, default=16)
    arguments = parser.parse_args()
    try:
        run = read_run(arguments.run)
        if run["status"] != "succeeded":
            raise ValueError(
                f"{arguments.run} did not succeed (status {run['status']}: {run['reason']}): train it first"
            )
        splits = test_split(run)
        test = splits.test.select(range(min(arguments.samples or len(splits.test), len(splits.test))))
        tokenizer = AutoTokenizer.from_pretrained(arguments.run / "adapter")
        if template_hash(tokenizer) != run["template"]["hash"]:
            raise ValueError(f"the template in {arguments.run / 'adapter'} is not the one that the run trained with")
        rows = [encode(tokenizer, row, run["recipe"]["max_length"]) for row in test]
        scored = [i for i, row in enumerate(rows) if any(label != -100 for label in row["labels"])]
        model = load_models(run, arguments.run / "adapter")
        batches = collate([rows[i] for i in scored], tokenizer, arguments.batch_size, model.device)
        tuned = row_nll(model, batches)
        with model.disable_adapter():
            base = row_nll(model, batches)
    except ValueError as error:
        sys.exit(f"error: {error}")
    report = compare(base, tuned) | {
        "run": str(arguments.run),
        "test_rows": len(test),
        "rows_without_a_response_token": len(test) - len(scored),
        "test_fingerprint": splits.facts["test"]["fingerprint"],
        "resamples": RESAMPLES,
    }
    folder = arguments.run / "eval"
    folder.mkdir(exist_ok=True)
    write_rows(folder / "quality.jsonl", test, scored, base, tuned)
    write_json(folder / "quality.json", report)
    print_report(report)


def test_split(run: dict[str, Any]) -> Splits:
    """The run's test split, made again from its recipe; ValueError where the data are no longer the same."""
    fields = DataArguments.__dataclass_fields__
    splits = load_splits(DataArguments(**{k: v for k, v in run["recipe"].items() if k in fields}))
    then, now = run["data"]["test"]["fingerprint"], splits.facts["test"]["fingerprint"]
    if then != now:
        raise ValueError(
            f"the test split of {run['recipe']['dataset_name']} has changed since the run ({then}, now {now})"
        )
    if len(splits.test) == 0:
        raise ValueError("the run's recipe has no test split (split_fractions)")
    return splits


def load_models(run: dict[str, Any], adapter: Path) -> PeftModel:
    """The base model with the adapter on it, on the GPU if there is one, in the dtype that the run trained in."""
    recipe = run["recipe"]
    arguments = ModelArguments(**{name: recipe[name] for name in ModelArguments.__dataclass_fields__})
    kwargs = model_init_kwargs(arguments, recipe["trust_remote_code"], recipe["model_init_kwargs"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name, quantization = recipe["model_name_or_path"], get_quantization_config(arguments)
    try:
        base = AutoModelForCausalLM.from_pretrained(name, device_map=device, quantization_config=quantization, **kwargs)
    except OSError as error:
        raise ValueError(f"the base model {name} of the run cannot be loaded: {str(error).splitlines()[0]}") from error
    return PeftModel.from_pretrained(with_fused_head(base), adapter).eval()


def collate(
    rows: list[dict[str, list[int]]], tokenizer: PreTrainedTokenizerBase, size: int, device: torch.device
) -> list[dict[str, torch.Tensor]]:
    """Right-padded batches of `size` rows, as in training."""
    collator = DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id)
    groups = [rows[i : i + size] for i in range(0, len(rows), size)]
    return [{k: v.to(device) for k, v in collator(group).items()} for group in groups]


def compare(base: RowNll, tuned: RowNll) -> dict[str, Any]:
    """Perplexities, their ratio base / tuned, 95 % intervals and the bootstrap p-value of 'no difference'."""
    intervals, resampled = bootstrap_perplexity([base, tuned], RESAMPLES)
    ratios = resampled[0] / resampled[1]
    low, high = np.percentile(ratios, [2.5, 97.5])
    # two-sided, with the observed sample counted (Davison and Hinkley 1997, equation 4.11)
    beyond = min((ratios <= 1).sum(), (ratios >= 1).sum())
    return {
        "response_perplexity": {
            "base": {"value": base.perplexity, "interval_95": intervals[0]},
            "tuned": {"value": tuned.perplexity, "interval_95": intervals[1]},
            "ratio": {"value": base.perplexity / tuned.perplexity, "interval_95": [low, high]},
            "p_value": min(1.0, 2 * (beyond + 1) / (len(ratios) + 1)),
        },
        "response_tokens": int(base.tokens.sum()),
    }


def write_rows(path: Path, test: Any, scored: list[int], base: RowNll, tuned: RowNll) -> None:
    """One record a scored row: prompt, reference, and each model's summed negative log-likelihood in nats."""
    with path.open("w", encoding="utf-8") as file:
        for position, index in enumerate(scored):
            record = {
                "row": index,
                "prompt": test[index]["prompt"],
                "reference": test[index]["completion"][0]["content"],
                "response_tokens": int(base.tokens[position]),
                "base_nll": float(base.nll[position]),
                "tuned_nll": float(tuned.nll[position]),
            }
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def print_report(report: dict[str, Any]) -> None:
    """The comparison in a table."""
    perplexity = report["response_perplexity"]
    print(f"\n{report['run']}: response perplexity on {report['test_rows']} test rows that no training saw")
    print(f"  {'':<14}{'value':>10}   95 % interval")
    for name, label in (("base", "base"), ("tuned", "tuned"), ("ratio", "base / tuned")):
        value, (low, high) = perplexity[name]["value"], perplexity[name]["interval_95"]
        print(f"  {label:<14}{value:>10.3f}   {low:.3f} to {high:.3f}")
    print(f"  p-value of no difference (paired bootstrap over rows): {perplexity['p_value']:.2g}")
    if report["test_rows"] < FEW_ROWS:
        print(f"  fewer than {FEW_ROWS} rows: the intervals are rough")


if __name__ == "__main__":
    main()
