"""Pairs judged by alpaca-eval's own annotator configs, and alpaca-eval's own metrics of them."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

from sftlab.files import write_json
from sftlab.judging.alpaca_files import read_json_list
from sftlab.judging.length_control import alpaca_metrics, quiet_alpaca
from sftlab.judging.pairwise import Pair, score
from sftlab.judging.verdict_parsing import Verdict

# the judge that alpaca-eval's length control was fitted to, and its leaderboard's reference
ALPACA_EVAL_2 = ("weighted_alpaca_eval_gpt4_turbo", "gpt4_1106_preview")
_KEYS = ("OPENAI_API_KEY", "OPENAI_API_KEYS", "OPENAI_CLIENT_CONFIG_PATH")


class Annotators:
    """Judges pairs with one of alpaca-eval's configs.

    Annotations are kept in `folder`, and no pair is annotated twice. alpaca-eval derives the order
    of a pair from its instruction, so a second call with the outputs exchanged shows the other
    order.
    """

    def __init__(self, name: str, folder: Path) -> None:
        with quiet_alpaca():
            from alpaca_eval.annotators import PairwiseAnnotator
            from alpaca_eval.constants import EVALUATORS_CONFIG_DIR
            from alpaca_eval.utils import load_configs

        there = Path(EVALUATORS_CONFIG_DIR)
        if not (there / name / "configs.yaml").is_file():
            known = ", ".join(sorted(path.parent.name for path in there.glob("*/configs.yaml")))
            raise ValueError(f"alpaca-eval has no annotators {name!r}: it has {known}")
        asks_openai = any(
            one["fn_completions"] == "openai_completions"
            for one in load_configs(there / name).values()
        )
        if asks_openai and not any(os.environ.get(key) for key in _KEYS):
            raise ValueError(
                f"--annotators {name} asks OpenAI's API: set OPENAI_API_KEY in the environment"
            )
        self.name = name
        folder.mkdir(parents=True, exist_ok=True)
        kept = folder / f"annotations-{name}.json"
        forget_missing(kept)
        with quiet_alpaca():
            self.annotator = PairwiseAnnotator(annotators_config=name, caching_path=kept)
        self.facts = {"judge": name, "annotators": True}

    def judged(self, pairs: Sequence[Pair], title: str) -> list[dict[str, Any]]:
        """Returns records like those of `judge_pairs`.

        The first verdict belongs to alpaca-eval's own order, whose record is under `annotation`.
        """
        first = self._annotate(pairs, "reference", "answer")
        second = self._annotate(pairs, "answer", "reference")
        records = []
        for pair, own, exchanged in zip(pairs, first, second, strict=True):
            verdicts = [_verdict(own["preference"]), _verdict(exchanged["preference"])]
            texts = [one.get("preference_raw_completion") for one in (own, exchanged)]
            records.append(
                {
                    **pair._asdict(),
                    "verdicts": verdicts,
                    "contradictions": [False, False],
                    "characters_cut": 0,
                    "judgements": texts,
                    "score": score(verdicts),
                    "annotation": own,
                }
            )
        return records

    def _annotate(self, pairs: Sequence[Pair], one: str, two: str) -> list[dict[str, Any]]:
        rows = [
            {"instruction": p.instruction, "output_1": getattr(p, one), "output_2": getattr(p, two)}
            for p in pairs
        ]
        with quiet_alpaca():
            return self.annotator(rows)


def official(
    records: Sequence[dict[str, Any]], names: tuple[str, str], control: bool
) -> dict[str, Any]:
    """Returns alpaca-eval's win rate and standard error over its own order of each pair.

    `control` adds the length-controlled win rate. It needs AlpacaEval's df_gamed.csv from the hub;
    without that file `note` says so. `names` are those of the model and of the reference.
    """
    import pandas

    glm = alpaca_metrics()
    table = pandas.DataFrame([record["annotation"] for record in records])
    known = table["preference"].map(is_preference)
    table["preference"] = table["preference"].where(known).astype(float)
    table["generator_2"], table["generator_1"] = names
    with quiet_alpaca():
        if not control:
            return _plain(glm.get_winrate(table))
        try:
            return _plain(glm.get_length_controlled_winrate(table, save_weights_dir=None))
        except (OfflineModeIsEnabled, LocalEntryNotFoundError, HfHubHTTPError):
            note = (
                "no length-controlled rate: AlpacaEval's df_gamed.csv is not in the hub's cache, "
                "and the hub cannot be reached"
            )
            return _plain(glm.get_winrate(table)) | {"note": note}


def forget_missing(kept: Path) -> None:
    """Remove annotations without a preference: alpaca-eval keeps those that failed for ever."""
    if not kept.is_file():
        return
    rows = read_json_list(kept, ())
    known = [row for row in rows if is_preference(row.get("preference"))]
    if not known:
        kept.unlink()
    elif len(known) < len(rows):
        write_json(kept, known)


def is_preference(value: object) -> bool:
    """Whether a value is alpaca-eval's preference: from 1 to 2, or 0 for a tie."""
    return isinstance(value, int | float) and (value == 0 or 1 <= value <= 2)


def _verdict(preference: float | None) -> Verdict:
    """Returns alpaca-eval's preference as a letter that `score` reads.

    A preference towards 1 is for the first output and towards 2 for the second; 1.5 and 0 are ties.
    The answer is the second output of the first call, so A says there that the answer won. In the
    other call it is the first output, and B says so.
    """
    if not is_preference(preference):
        return None
    return "C" if preference in (0, 1.5) else "AB"[preference < 1.5]


def _plain(metrics: dict[str, Any]) -> dict[str, Any]:
    return {
        key: value if isinstance(value, str) else float(value) for key, value in metrics.items()
    }
