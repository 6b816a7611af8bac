"""A local judge reads what fits its context, and its sanity checks decide whether it is fit."""

import pytest
from conftest import byte_tokenizer
from judging import ScriptedJudge, prompt
from transformers import LlamaConfig, LlamaForCausalLM

from sftlab.data.chat_template import set_template
from sftlab.evaluation.answer_file import AnswerFile
from sftlab.judging.asking import CUT, ask, longest_fitting
from sftlab.judging.judge_formats import load_format
from sftlab.judging.judgement_files import judgement_hashes
from sftlab.judging.judges import LocalJudge
from sftlab.judging.pairwise import Pair, judge_pairs, score
from sftlab.judging.sanity_checks import SanityChecks
from sftlab.runs.run_directory import SIDES


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Folder of a random judge of 1,024 positions with a chat template."""
    folder = tmp_path_factory.mktemp("judge") / "random"
    config = LlamaConfig(
        vocab_size=259,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=1024,
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=258,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer = byte_tokenizer()
    set_template(tokenizer)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_local_judge_loads_its_weights_when_it_is_first_asked(model, tmp_path):
    judge = LocalJudge(model, 8)
    assert judge.room == 1024 - 8
    assert "_model" not in vars(judge)
    prompts = [prompt("x" * n) for n in (5, 50, 5)]
    file = AnswerFile(tmp_path, judge.facts, kind="verdicts")
    first = ask(judge, prompts, file, 2, "judging")
    assert all(0 < one.tokens <= 8 for one in first)
    assert first[0] == first[2]
    assert len(file.found) == 2
    again = LocalJudge(model, 8)
    assert (
        ask(again, prompts, AnswerFile(tmp_path, again.facts, kind="verdicts"), 2, "judging")
        == first
    )
    assert "_model" not in vars(again)
    assert [LocalJudge(model, 8).answers([one])[0] for one in prompts] == first


def test_other_weights_are_another_judge(model, tmp_path):
    before = LocalJudge(model, 8).facts
    LlamaForCausalLM.from_pretrained(model).save_pretrained(tmp_path / "other")
    byte_tokenizer().save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    weights = (tmp_path / "other" / "model.safetensors").read_bytes()
    assert LocalJudge(str(tmp_path / "other"), 8).facts["weights"] == before["weights"]
    (tmp_path / "other" / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    assert LocalJudge(str(tmp_path / "other"), 8).facts["weights"] != before["weights"]


@pytest.mark.parametrize("system", ["{{ raise_exception('no system') }}", ""])
def test_a_template_without_a_place_for_a_system_prompt_gets_it_in_the_users_turn(model, system):
    judge = LocalJudge(model, 8)
    judge.tokenizer.chat_template = (
        f"{{% for m in messages %}}{{% if m.role == 'system' %}}{system}{{% else %}}{{{{ m.content "
        f"}}}}{{% endif %}}"
        "{% endfor %}"
    )
    messages = load_format("fastchat").messages("turn_1", question_1="q", answer_1="a")
    text = judge.tokenizer.decode(judge._ids(messages))
    assert text.startswith("You are a helpful assistant.\n\n[Instruction]")


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("template", "has no chat template, so it cannot be asked"),
        ("nothing", "cannot be loaded"),
        ("room", "leaves the judge .* no room for a prompt: it has 1024 positions"),
    ],
)
def test_a_judge_that_cannot_judge_is_one_sentence(model, tmp_path, broken, message):
    folder, new_tokens = model, 8
    if broken == "template":
        LlamaForCausalLM.from_pretrained(model).save_pretrained(tmp_path)
        byte_tokenizer().save_pretrained(tmp_path)
        folder = str(tmp_path)
    if broken == "nothing":
        folder = str(tmp_path / "nothing")
    if broken == "room":
        new_tokens = 1024
    with pytest.raises(ValueError, match=message) as error:
        LocalJudge(folder, new_tokens)
    assert "\n" not in str(error.value)


def test_answers_beyond_the_judges_context_are_cut_from_the_middle(model):
    judge = LocalJudge(model, 24)
    texts = {"a": "start" + "x" * 3000 + "end", "b": "short"}

    def build(kept):
        return prompt(f"Compare: {kept['a']} and {kept['b']}")

    messages, cut = longest_fitting(judge, build, texts)
    assert judge.room - 60 < judge.size(messages) <= judge.room
    head, _, tail = messages[0]["content"].partition(CUT)
    assert head.startswith("Compare: startxxx")
    assert tail.endswith("xxxend and short")
    assert cut == len(texts["a"]) - (len(head) - len("Compare: ")) - (len(tail) - len(" and short"))
    assert longest_fitting(judge, build, {"a": "x", "b": "y"}) == (build({"a": "x", "b": "y"}), 0)
    with pytest.raises(
        ValueError, match="room for prompts of 1000 tokens, and one without its answers has"
    ):
        longest_fitting(judge, lambda kept: prompt("x" * 2000 + kept["a"]), {"a": "y"})


def test_what_was_cut_is_counted_in_the_record(tmp_path):
    judge = ScriptedJudge(lambda *_: "[RESULT] A")
    judge.room = 3000
    style = load_format("prometheus")
    pairs = [Pair(0, "q", "x" * 4000, "y" * 10), Pair(1, "q", "x", "y")]
    file = AnswerFile(tmp_path, {}, kind="verdicts")
    long, short = judge_pairs(judge, style, pairs, file, 4, "judging")
    assert long["characters_cut"] > 1000
    assert short["characters_cut"] == 0
    assert all(CUT in one[0]["content"] for one in long["prompts"])
    assert long["answer"] == "x" * 4000


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        ("AB", 1),
        ("BA", 0),
        ("AA", 0.5),
        ("BB", 0.5),
        ("CC", 0.5),
        ("AC", 0.5),
        ("CB", 0.5),
        ("A-", None),
        ("--", None),
    ],
)
def test_two_orders_make_one_score(verdicts, expected):
    assert score([None if one == "-" else one for one in verdicts]) == expected


@pytest.mark.parametrize(
    ("wins", "losses", "passed"), [(30, 10, False), (24, 16, True), (0, 0, True), (10, 30, False)]
)
def test_one_model_that_beats_itself_too_often_fails_the_judge(wins, losses, passed):
    scores = [1.0] * wins + [0.0] * losses + [0.5] * (40 - wins - losses)
    letters = {1.0: ["A", "B"], 0.0: ["B", "A"], 0.5: ["A", "A"]}
    records = [
        {
            "row": 0,
            "answer": "x",
            "score": one,
            "verdicts": letters[one],
            "contradictions": [False] * 2,
            "characters_cut": 0,
        }
        for one in scores
    ]
    checks = SanityChecks(lambda pairs, title: records)
    checks.noise_floor([])
    assert (checks.rows[0]["passed"], checks.fit) == (passed, passed)
    assert checks.rows[0]["value"] == sum(scores) / 40


def test_two_models_with_the_same_judgements_stop_it():
    records = {
        side: [{"answer": f"{side} {i}", "judgements": ["[RESULT] A"] * 2} for i in range(3)]
        for side in SIDES
    }
    assert len(set(judgement_hashes(records, "answer", "judgements").values())) == 2
    with pytest.raises(ValueError, match="base and tuned have the same judgements"):
        judgement_hashes(records | {"tuned": records["base"]}, "answer", "judgements")
