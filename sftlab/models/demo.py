"""The base model and the data of the offline demo: a small world of facts and skills.

A kind of task draws its slots (`DRAWS`) and puts them into words (`SPEC`): ways to ask, the context
to show, the one way to answer, the bare answer, and other forms that the base sees in pre-training.
"""

from collections.abc import Callable, Sequence
from random import Random

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers import get_cosine_schedule_with_warmup as cosine_with_warmup

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
BLOCK, BATCH, PEAK_RATE = 64, 16, 6e-3

CAPITALS = """France=Paris Spain=Madrid Italy=Rome Germany=Berlin Portugal=Lisbon Greece=Athens
Austria=Vienna Poland=Warsaw Norway=Oslo Sweden=Stockholm Finland=Helsinki Denmark=Copenhagen
Ireland=Dublin Hungary=Budapest Belgium=Brussels Russia=Moscow Turkey=Ankara Egypt=Cairo
Kenya=Nairobi Ghana=Accra Japan=Tokyo China=Beijing India=Delhi Nepal=Kathmandu Iran=Tehran
Iraq=Baghdad Cuba=Havana Canada=Ottawa Peru=Lima Chile=Santiago"""
OPPOSITES = """hot=cold big=small tall=short fast=slow old=new happy=sad day=night up=down
open=closed full=empty hard=soft light=dark wet=dry rich=poor strong=weak early=late loud=quiet
clean=dirty left=right near=far high=low thick=thin sweet=sour true=false safe=dangerous
wide=narrow easy=difficult cheap=costly"""
PLURALS = """cat=cats dog=dogs horse=horses mouse=mice goose=geese sheep=sheep fox=foxes
wolf=wolves man=men child=children woman=women foot=feet tooth=teeth leaf=leaves knife=knives
city=cities baby=babies box=boxes bus=buses lady=ladies story=stories book=books tree=trees
house=houses watch=watches potato=potatoes"""
COLOURS = """lemon=yellow banana=yellow tomato=red cherry=red strawberry=red carrot=orange
pumpkin=orange frog=green leaf=green pea=green swan=white snowball=white crow=black bear=brown
coconut=brown plum=purple flamingo=pink pig=pink elephant=grey mouse=grey sapphire=blue
emerald=green ruby=red"""
SORTS = """apple=fruit lemon=fruit banana=fruit cherry=fruit plum=fruit pear=fruit peach=fruit
cat=animal dog=animal horse=animal mouse=animal frog=animal bear=animal pig=animal fox=animal
hammer=tool saw=tool spade=tool rake=tool axe=tool car=vehicle bus=vehicle train=vehicle
tram=vehicle bicycle=vehicle boat=vehicle"""
NEXT = """Monday=Tuesday Tuesday=Wednesday Wednesday=Thursday Thursday=Friday Friday=Saturday
Saturday=Sunday Sunday=Monday January=February February=March March=April April=May May=June
June=July July=August August=September September=October October=November November=December
December=January"""
NAMES = """Anna Ben Clara David Emma Felix Grace Henry Iris Jack Kate Leo Mia Noah Olga Paul Rosa
Sam Tina"""
TRADES = "baker farmer teacher doctor pilot driver painter writer singer dancer"
WORDS = """apple lemon banana cherry plum pear cat dog horse mouse frog bear fox car bus train
boat hammer saw lamp cup chair book tree house river stone bread milk rice"""

Slots = dict[str, str]
Fields = dict[str, list[str]]


def _with_article(noun: str) -> str:
    """Returns 'a lemon' for 'lemon', 'an apple' for 'apple'."""
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _fact(table: str) -> Callable[[Random], Slots]:
    """Returns a function that draws one pair a=b; `an` and `bn` are a and b with an article."""
    pairs = [entry.split("=") for entry in table.split()]

    def draw(rng: Random) -> Slots:
        a, b = rng.choice(pairs)
        return {"a": a, "b": b, "an": _with_article(a), "bn": _with_article(b)}

    return draw


def _sum(rng: Random) -> Slots:
    """Draw two terms from 1 to 9 and their sum, in digits."""
    a, b = rng.randint(1, 9), rng.randint(1, 9)
    return {"a": str(a), "b": str(b), "c": str(a + b)}


def _listing(low: int, high: int) -> Callable[[Random], Slots]:
    """Returns a function that draws a list of `low` to `high` different words.

    The slots also hold its ends, its length and its reverse.
    """
    words = WORDS.split()

    def draw(rng: Random) -> Slots:
        items = rng.sample(words, rng.randint(low, high))
        forward, backward = ", ".join(items), ", ".join(reversed(items))
        return {
            "list": forward,
            "back": backward,
            "first": items[0],
            "last": items[-1],
            "n": str(len(items)),
        }

    return draw


def _person(rng: Random) -> Slots:
    """Draw a person with a city and a trade."""
    name, country, job = (rng.choice(table.split()) for table in (NAMES, CAPITALS, TRADES))
    return {"name": name, "city": country.split("=")[1], "job": job}


DRAWS: dict[str, Callable[[Random], Slots]] = {
    "capital": _fact(CAPITALS),
    "opposite": _fact(OPPOSITES),
    "plural": _fact(PLURALS),
    "colour": _fact(COLOURS),
    "sort": _fact(SORTS),
    "next": _fact(NEXT),
    "upper": _fact(" ".join(f"{word}={word.upper()}" for word in WORDS.split())),
    "sum": _sum,
    "reverse": _listing(2, 3),
    "last": _listing(2, 4),
    "count": _listing(2, 6),
    "city": _person,
}

# A kind, then its fields with their variants. `short`, the bare answer, is {b} by default. No form
# may contain an answer word for word: the base knows the facts, and tuning teaches how to answer.
# Words to copy never open a line, as byte-level BPE has another token for a word without the blank
# before it.
SPEC = """
kind capital
ask What is the capital of {a}?|Name the capital city of {a}.|Which city is the capital of {a}?
ask Tell me the capital of {a}.|I am going to {a}. What is its capital?
ask Do you know the capital of {a}?
answer The capital of {a} is {b}.
form In {a} the capital city is called {b}.|Country: {a}, capital: {b}.
form As for {a}, its capital is {b}.
kind opposite
ask What is the opposite of {a}?|Give me the opposite of {a}.|Which word means the opposite of {a}?
ask Name a word that is the opposite of {a}.|Tell me the opposite of the word {a}.
answer The opposite of {a} is {b}.
form Not {a} but {b}.|Opposites: {a} and {b}.|The word {a} has the opposite {b}.
kind plural
ask What is the plural of {a}?|Give the plural of the word {a}.|Write {a} in the plural.
ask What do you call more than one {a}?|Tell me the plural form of {a}.
answer The plural of {a} is {b}.
form One {a}, two {b}.|Singular: {a}, plural: {b}.|The word {a} has the plural {b}.
kind colour
ask What colour is {an}?|Tell me the colour of {an}.|Name the colour of {an}.
ask Which colour does {an} have?
answer The usual colour of {an} is {b}.
form We saw {an}, all {b}.|Colours: {a}, {b}.|As usual, {an} had the colour {b}.
kind sort
ask Is {an} a fruit, an animal, a tool or a vehicle?|What kind of thing is {an}?
ask Sort this word: {a}.
answer The word {a} names {bn}.
form Group of {an}: {b}.|Sorts: {a}, {b}.|You may call {an} a kind of {b}.
form What names {an} means {bn}.
kind next
ask What comes after {a}?|Which one follows {a}?|Name what comes right after {a}.
ask What is next after {a}?
ask It is {a} now. What comes next?|Tell me what follows {a}.
answer The one after {a} is {b}.
form In order: {a}, {b}.|First it was {a}, then {b}.|The one that follows {a} is {b}.
kind upper
ask Write the word {a} in capital letters.|Put {a} in capitals.|Change {a} to upper case.
answer In capital letters, {a} is {b}.
form Small {a}, big {b}.|The sign does not say {a} but {b}.|In upper case {a}: {b}.
kind sum
ask What is {a} plus {b}?|Add {a} and {b}.|What is the sum of {a} and {b}?
ask How much is {a} and {b} together?
answer The sum of {a} and {b} is {c}.
short {c}
form Sum: {a} + {b} = {c}.|Sum: {a} plus {b} makes {c}.|We add {a} and {b}, which gives {c}.
kind reverse
ask Put these words in reverse order: {list}.|Write this list backwards: {list}.
ask Reverse the list: {list}.
answer In reverse order: {back}.
short {back}
form List: {list}. Backwards: {back}.|There were {list}. The other way: {back}.
kind last
ask What is the last item of the list?|Which item comes last?|Name the last word in the list.
context List: {list}.
answer The last item is {last}.
short {last}
form List: {list}. Number: {n}. Last: {last}. First: {first}.|In {list} we end with {last}.
kind count
ask How many items are in the list?|Count the items of the list.
ask Tell me the number of words in the list.
context List: {list}.
answer The number of items is {n}.
short {n}
form List: {list}. Number: {n}.|We count {list}, that makes {n}.
kind city
ask Where does {name} live?|Which city is named in the text?|Name the city in the text.
context My friend {name} lives in {city} and works as a {job}.
answer The city is {city}.
short {city}
form My friend {name} lives in {city}. City: {city}.
form Someone called {name} lives in {city}. Home: {city}.
"""


def _kinds(spec: str) -> dict[str, Fields]:
    """Returns the fields of every kind, each a list of variants; `context` may be empty."""
    kinds: dict[str, Fields] = {}
    for line in spec.strip().splitlines():
        field, _, rest = line.partition(" ")
        if field == "kind":
            fields = kinds[rest] = {"context": [], "short": ["{b}"]}
        else:
            fields[field] = (
                rest.split("|") if field == "short" else fields.get(field, []) + rest.split("|")
            )
    return kinds


KINDS = _kinds(SPEC)
# Kinds that copy words take longest to learn, so pre-training shows them more often.
LESSONS = [*KINDS, "reverse", "last"]

# Questions of pre-training have a bare answer, and other headings than those of tuning.
QUIZZES = (
    "Q: {ask} {context} A: {short}.",
    "### Question\n{ask}\n\n### Text\n{context}\n\n### Answer: {short}.\n",
    "Question: {ask} Answer: {short}.",
    "### Question\n{ask}\n\n### Answer: {short}.\n",
)
GLOSSARY = "Words: an Instruction is an order, a Context is a setting, a Response is a reply."


def _row(fields: Fields, slots: Slots, rng: Random) -> dict[str, str]:
    """Returns one task in Dolly's columns."""
    ask, answer, context = (
        rng.choice(fields["ask"]),
        fields["answer"][0],
        "".join(fields["context"]),
    )
    texts = {"instruction": ask, "context": context, "response": answer}
    return {column: text.format(**slots) for column, text in texts.items()}


def _lesson(fields: Fields, slots: Slots, rng: Random) -> list[str]:
    """Returns two or three forms of one task for pre-training.

    The repetition teaches the model to copy.
    """
    lines = []
    for _ in range(rng.randint(2, 3)):
        form = rng.choice(fields["form"])
        if rng.random() < 0.6:
            form = rng.choice(QUIZZES[:2] if fields["context"] else QUIZZES[2:])
            texts = {field: rng.choice(fields[field]) for field in ("ask", "short")}
            form = form.format(**texts, context="".join(fields["context"]))
        lines.append(form.format(**slots))
    return lines


def instruction_rows(count: int, seed: int) -> list[dict[str, str]]:
    """Returns `count` rows of instruction, context (may be empty) and response, no prompt twice."""
    rng, kinds, rows = Random(seed), list(KINDS), {}
    while len(rows) < count:
        kind = rng.choice(kinds)
        row = _row(KINDS[kind], DRAWS[kind](rng), rng)
        rows.setdefault((row["instruction"], row["context"]), row)
    return list(rows.values())


def pretraining_text(count: int, seed: int) -> list[str]:
    """Returns `count` short documents of the same world, in other forms than the rows have."""
    rng, documents = Random(seed), []
    for _ in range(count):
        kind = rng.choice(LESSONS)
        lines = _lesson(KINDS[kind], DRAWS[kind](rng), rng)
        documents.append(GLOSSARY if rng.random() < 0.005 else rng.choice(" \n").join(lines))
    return documents


def train_tokenizer(texts: Sequence[str], vocab_size: int = 2048) -> PreTrainedTokenizerFast:
    """Returns a byte-level BPE tokenizer of at most `vocab_size` tokens; it has no template."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special, alphabet = [BOS, EOS, PAD], pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet
    )
    bpe.train_from_iterator(texts, trainer)
    names = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
    return PreTrainedTokenizerFast(tokenizer_object=bpe, model_max_length=1024, **names)


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """Returns a Llama of about 350,000 fp32 parameters.

    It has 2 layers of width 96, and 4 heads over 2 key-value heads.
    """
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=288,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        initializer_range=0.08,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
        **{
            f"{name}_token_id": getattr(tokenizer, f"{name}_token_id")
            for name in ("bos", "eos", "pad")
        },
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def pack(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> torch.Tensor:
    """Returns the documents as token ids [blocks, BLOCK], each between bos and eos.

    Tokens that fill no whole block are dropped.
    """
    encoded = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    ids = [i for one in encoded for i in (tokenizer.bos_token_id, *one, tokenizer.eos_token_id)]
    return torch.tensor(ids[: len(ids) // BLOCK * BLOCK]).view(-1, BLOCK)


def pretrain(
    model: LlamaForCausalLM,
    blocks: torch.Tensor,
    steps: int,
    on_step: Callable[[int, float], None],
    seed: int,
) -> list[float]:
    """Train in place on blocks [blocks, BLOCK].

    Returns the loss of every step in nats per token.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.98), fused=True)
    schedule = cosine_with_warmup(optimizer, steps // 20, steps)
    sampler = torch.Generator().manual_seed(seed)
    losses = []
    model.train()
    for step in range(1, steps + 1):
        batch = blocks[torch.randint(len(blocks), (BATCH,), generator=sampler)]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
        on_step(step, losses[-1])
    model.eval()
    return losses
