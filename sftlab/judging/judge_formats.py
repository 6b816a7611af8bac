"""How a kind of judge is asked and how its text is read: the files of eval/judges."""

from typing import Any, NamedTuple

import yaml

from sftlab.data.formats import Message
from sftlab.judging.verdict_parsing import Reading, read
from sftlab.paths import ROOT

JUDGE_FORMATS = ROOT / "eval" / "judges"
Messages = list[Message]


class JudgeFormat(NamedTuple):
    """The prompts and the verdict's form of one kind of judge.

    `scale` is the lowest and the highest rating.
    """

    name: str
    scale: tuple[int, int]
    content: dict[str, Any]

    def messages(self, kind: str, **fields: str) -> Messages:
        """Returns the conversation that asks for a judgement.

        `kind` is pair, turn_1, turn_2, turn_1_reference or turn_2_reference.
        """
        if "dialogue" in self.content and "question_2" in fields:
            fields["dialogue"] = self.content["dialogue"].format(**fields)
        rubric = "pair_rubric" if kind == "pair" else "score_rubric"
        user = self.content[kind]["user"].format(**fields, rubric=self.content.get(rubric))
        system = self.content[kind]["system"]
        if self.content["system_in_user"]:
            return [{"role": "user", "content": f"{system}\n{user}"}]
        return [{"role": "system", "content": system}, {"role": "user", "content": user}]

    def read(self, kind: str, text: str, finish: str = "stop") -> Reading:
        """Returns the verdict in a judgement's text, or why there is none.

        `finish` is stop, or length for a text that was cut off.
        """
        return read(self.content["verdicts"]["pair" if kind == "pair" else "score"], text, finish)


def load_format(name: str) -> JudgeFormat:
    """Load a format by its name. Raises ValueError with the known names for another one."""
    found = {path.stem: path for path in JUDGE_FORMATS.glob("*.yaml")}
    if name not in found:
        raise ValueError(f"no judge format {name!r}: there are {', '.join(sorted(found))}")
    content = yaml.safe_load(found[name].read_text(encoding="utf-8"))
    return JudgeFormat(name, tuple(content["scale"]), content)
