"""A tokenized data set has the tokens that trl makes of the same rows."""

import random
import shutil
from datetime import date

import pytest
from conftest import (
    answered,
    byte_tokenizer,
    instruction_rows,
    load_script,
    read,
    write_jsonl,
)
from datasets import Dataset, load_dataset
from test_data import SHAPED
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers, trainers
from tokenizing import ODD, TURNS, fields_of, recipe_of, tokenized
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from trl import SFTConfig, SFTTrainer

from sftlab.data.batch_encoder import Encoder
from sftlab.data.chat_template import INSTRUCTION_TEMPLATE
from sftlab.data.messages import Conversation
from sftlab.data.shard_writer import place_of, tokenize_shard
from sftlab.data.splits import load_splits
from sftlab.data.tokenized_dataset import MANIFEST, training_rows
from sftlab.evaluation.held_out import held_out


@pytest.fixture(scope="module")
def script():
    return load_script("slurm/tokenize_dataset.py")


@pytest.fixture(scope="module")
def llama_like() -> PreTrainedTokenizerFast:
    """A BPE tokenizer with Llama 3's way of splitting and tokens for the turns."""
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    backend = Tokenizer(models.BPE(ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(False, use_regex=False),
        ]
    )
    special = ["<bos>", "<eos>", "<pad>", "<|start|>", "<|end|>", "<|turn|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    text = [ODD * 3, INSTRUCTION_TEMPLATE.read_text(), *map(str, instruction_rows(60))]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=special, initial_alphabet=alphabet)
    backend.train_from_iterator(text, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )


def odd_rows(shape, count=150):
    """Rows of a shape with odd white space, empty and long responses, prompts beyond max_length,
    several turns.
    """
    rng = random.Random(0)
    rows = []
    for i in range(count):
        question = f"{i} " + "".join(rng.choices(ODD, k=rng.choice([5, 40, 90, 160])))
        answer = rng.choice(
            [
                "",
                " \n",
                "".join(rng.choices(ODD, k=60)),
                "Fine! " * rng.choice([1, 5, 40]),
                "\n\nok ",
            ]
        )
        turns = [("user", question), ("assistant", answer), ("user", "And?"), ("assistant", "So.")][
            : rng.choice([2, 4])
        ]
        rows.append(
            {
                "openorca": {
                    "system_prompt": rng.choice(["", "Be brief."]),
                    "question": question,
                    "response": answer,
                },
                "dolly": {
                    "instruction": question,
                    "context": rng.choice(["", "Given."]),
                    "response": answer,
                },
                "alpaca": {
                    "instruction": question,
                    "input": rng.choice(["", "Given."]),
                    "output": answer,
                },
                "gsm8k": {"question": question, "answer": answer},
                "sharegpt": {"conversations": [{"from": r, "value": c} for r, c in turns]},
                "messages": {"messages": [{"role": r, "content": c} for r, c in turns]},
                "prompt_completion": {"prompt": question, "completion": answer},
            }[shape]
        )
    return rows


@pytest.fixture(scope="module")
def model_of(base, llama_like, tmp_path_factory):
    """Folders of the tiny model with each tokenizer."""
    turned = shutil.copytree(base, tmp_path_factory.mktemp("models") / "turned")
    llama_like.chat_template = TURNS
    llama_like.save_pretrained(turned)
    config = LlamaConfig.from_pretrained(base, vocab_size=len(llama_like))
    LlamaForCausalLM(config).save_pretrained(turned)
    return {"bytes": base, "llama": turned}


@pytest.fixture(scope="module")
def trl_rows(model_of, tmp_path_factory):
    """(rows, recipe) -> the rows that trl's own preparation makes."""
    trainers, folder = {}, str(tmp_path_factory.mktemp("trl"))

    def prepare(rows, recipe):
        name, args = recipe.model.model_name_or_path, recipe.training
        tokenizer = AutoTokenizer.from_pretrained(name)
        if not tokenizer.chat_template:
            tokenizer.chat_template = INSTRUCTION_TEMPLATE.read_text()
        if name not in trainers:
            one = Dataset.from_list([{"prompt": "a", "completion": "b"}])
            trainers[name] = SFTTrainer(
                name, SFTConfig(folder, report_to="none", use_cpu=True), train_dataset=one
            )
        trainer = trainers[name]
        trainer.completion_only_loss = args.completion_only_loss is not False
        rows = Dataset.from_list(answered(rows))
        made = trainer._prepare_dataset(rows, tokenizer, args, False, None, "train")
        return [(row["input_ids"], row["labels"]) for row in made]

    return prepare


def assert_same_as_trl(script, trl_rows, fields, out):
    manifest = tokenized(script, fields, out)
    text = load_splits(recipe_of(fields).data)
    recipe = recipe_of(fields | {"dataset_name": str(out)})
    tokens = load_splits(recipe.data)
    assert tokens.facts == text.facts
    assert list(tokens.test) == list(text.test)
    for name in ("train", "validation"):
        rows = training_rows(getattr(tokens, name), manifest, name)
        found = [(row["input_ids"], row["labels"]) for row in rows]
        assert found == trl_rows(getattr(text, name), recipe)
        assert len(getattr(tokens, name)) == len(getattr(text, name))
    return manifest


@pytest.mark.parametrize("model", ["bytes", "llama"])
@pytest.mark.parametrize("shape", SHAPED)
def test_rows_are_those_that_trl_makes_of_every_shape_and_template(
    shape, model, script, trl_rows, model_of, tmp_path
):
    rows = write_jsonl(tmp_path / "rows.jsonl", odd_rows(shape))
    fields = fields_of(model_of[model], rows, tmp_path, loss_on="completion")
    manifest = assert_same_as_trl(script, trl_rows, fields, tmp_path / "out")
    assert manifest["tokenized"]["train"]["dropped"] > 0
    assert manifest["tokenized"]["train"]["cut"] > 0
    assert manifest["facts"]["empty_responses_dropped"] > 0


@pytest.mark.parametrize(
    "how",
    [
        {"truncation_mode": "keep_end"},
        {"completion_only_loss": "false"},
        {"dataset_fraction": "0.5"},
    ],
)
def test_rows_are_those_that_trl_makes_under_every_setting(
    how, script, trl_rows, model_of, tmp_path
):
    rows = write_jsonl(tmp_path / "rows.jsonl", odd_rows("messages"))
    fields = fields_of(model_of["llama"], rows, tmp_path, loss_on="completion", **how)
    assert_same_as_trl(script, trl_rows, fields, tmp_path / "out")


@pytest.mark.parametrize("template", [INSTRUCTION_TEMPLATE.read_text(), TURNS])
@pytest.mark.parametrize("which", ["bytes", "llama", "metaspace", "stripping"])
def test_a_prompt_encoded_once_gives_the_ids_of_one_encoded_alone(which, template, llama_like):
    backend = {"bytes": byte_tokenizer()._tokenizer, "llama": llama_like._tokenizer}.get(which)
    if which == "metaspace":
        # words are not split at blanks: no place to join is known
        backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
        backend.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
        backend.train_from_iterator(
            [ODD * 3] * 9, trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>"])
        )
    if which == "stripping":
        # tokens that take the white space beside them with them
        backend = Tokenizer.from_str(llama_like._tokenizer.to_str())
        backend.add_special_tokens([AddedToken("###", lstrip=True, rstrip=True)])
    draw = random.Random(1)
    pieces = [*ODD, "\n\n", " \n", "### ", "<|end|>", "<|turn|>\n", "! R", "'s"]
    texts = [
        ["".join(draw.choices(pieces, k=draw.randint(1, 12))) for _ in "qa"] for _ in range(1500)
    ]
    asked = [
        Conversation([{"role": "user", "content": q}, {"role": "assistant", "content": a}], [1], [])
        for q, a in texts
    ]
    special = {"bos_token": "<bos>", "eos_token": "<eos>"}
    joined, plain = (
        list(Encoder(Tokenizer.from_str(backend.to_str()), template, special, shortcut)(asked))
        for shortcut in (True, False)
    )
    assert joined == plain


@pytest.fixture(scope="module")
def made(script, base, rows, tmp_path_factory):
    """Fields of a recipe, and the folder of its tokens, in shards of 16 rows."""
    folder = tmp_path_factory.mktemp("made")
    fields = fields_of(base, rows, folder)
    tokenized(script, fields, folder / "tokens", size=16)
    return fields, folder / "tokens"


def test_a_template_that_writes_the_date_is_held_to_its_day(script, base, rows, tmp_path):
    template = tmp_path / "dated.jinja"
    template.write_text("{{ strftime_now('%d %b %Y') }}" + TURNS)
    fields = fields_of(base, rows, tmp_path, chat_template_path=str(template))
    manifest = tokenized(script, fields, tmp_path / "out")
    assert manifest["settings"]["day"] == date.today().isoformat()
    path = tmp_path / "out" / MANIFEST
    path.write_text(path.read_text().replace(manifest["settings"]["day"], "2020-02-02"))
    part = load_dataset("json", data_files=str(rows), split="train")
    with pytest.raises(ValueError, match="2020-02-02 is over"):
        tokenize_shard(str(tmp_path / "out"), 0, place_of(part, 0, 9))


def test_training_and_judging_on_tokens_is_that_on_the_text(
    finished, script, tmp_path, trained_here
):
    text, fields, _ = finished
    tokenized(script, fields, tmp_path / "tokens", size=32)
    run = tmp_path / "run"
    trained_here({**fields, "dataset_name": str(tmp_path / "tokens"), "output_dir": str(run)})
    on_text, on_tokens = read(text), read(run)
    assert on_tokens["losses"] == on_text["losses"]
    assert on_tokens["measured"]["validation_loss"] == on_text["measured"]["validation_loss"]
    assert on_tokens["data"] == on_text["data"]
    weights = [
        (folder / "adapter" / "adapter_model.safetensors").read_bytes() for folder in (text, run)
    ]
    assert weights[0] == weights[1]
    rows = held_out(on_tokens)
    assert list(rows.rows) == list(held_out(on_text).rows)
    with pytest.raises(ValueError, match="ask what the run was trained or validated on"):
        held_out(on_tokens, dataset=fields["dataset_name"])
