"""Templates that put the right or the wrong tokens into the loss, and conversations for them."""

from pathlib import Path

from conftest import byte_tokenizer, write_jsonl

FOR = "{{ bos_token }}{% for m in messages %}"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SYSTEM_LAST = (
    "{{ bos_token }}{% set head = messages[0]['content'] if messages[0]['role'] == 'system' %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}Q {% if loop.last and head %}{{ head }} "
    "{% endif %}{{ m['content'] }} A{% elif m['role'] == 'assistant' %} {{ m['content'] }}"
    "{{ eos_token }}{% endif %}{% endfor %}"
)
R1 = (
    FOR + "{% if m['role'] == 'assistant' %}<A>{{ m['content'].split('</think>')[-1] }}"
    "{{ eos_token }}{% else %}<U>{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<A><think>\n{% endif %}"
)
NO_END = (
    FOR + "{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
HEADER = FOR + "<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}{% endfor %}"
FORGETS = (
    "{% set asked = messages | selectattr('role', 'equalto', 'user') | list %}"
    "{{ bos_token }}<user>{{ asked[-1].content }}"
    "{% if messages[-1]['role'] == 'assistant' %}<assistant>{{ messages[-1]['content'] }}"
    "{{ eos_token }}{% endif %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
UPPER = (
    FOR + "<{{ m['role'] }}>{{ m['content'] | upper }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# the answer stands before its question, and no token ends it
BACKWARDS = "{{ messages[-1]['content'] }}{{ messages[0]['content'] }}"
REFUSES = (
    FOR + "{% if m['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    "<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}" + CHATML


def with_template(template, special=()):
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    tokenizer.chat_template = template
    return tokenizer


def chats(path, count=60, answer="It is {}.", **odd):
    """Conversations of one question; `odd` are messages before those of one row."""
    rows = [
        {
            "messages": [
                *odd.get(f"row_{i}", []),
                {"role": "user", "content": f"Name the number {i}."},
                {"role": "assistant", "content": answer.format(i)},
            ]
        }
        for i in range(count)
    ]
    return write_jsonl(path, rows)


def in_template(folder: Path, template: str) -> str:
    (folder / "it.jinja").write_text(template)
    return str(folder / "it.jinja")
