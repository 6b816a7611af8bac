"""Chat templates in the style of today's families, and a tokenizer of bytes with their tokens."""

from conftest import byte_tokenizer

# Qwen 2.5: a default system prompt, tools, calls; a result of a tool is the user's
CHATML = (
    "{% if tools %}<|im_start|>system\n{{ messages[0].content if messages[0].role == 'system' "
    "else 'You help.' }}\n# Tools\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}"
    "<|im_end|>\n{% elif messages[0].role == 'system' %}<|im_start|>system\n"
    "{{ messages[0].content }}<|im_end|>\n{% else %}<|im_start|>system\nYou help.<|im_end|>\n"
    "{% endif %}{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n"
    '{{ m.content }}{% for call in m.tool_calls or [] %}<tool_call>\n{"name": '
    '"{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n'
    "</tool_call>{% endfor %}<|im_end|>\n{% elif m.role == 'tool' %}<|im_start|>user\n"
    "<tool_response>\n{{ m.content }}\n</tool_response><|im_end|>\n{% elif m.role == 'user' or "
    "not loop.first %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Llama 3: the date in a system turn
LLAMA = (
    "{{ bos_token }}<|h|>system<|/h|>\n\nToday Date: {{ strftime_now('%d %b %Y') }}\n\n"
    "{% if messages[0].role == 'system' %}{{ messages[0].content | trim }}{% endif %}<|eot|>"
    "{% for m in messages %}{% if m.role != 'system' %}<|h|>{{ m.role }}<|/h|>\n\n"
    "{{ m.content | trim }}<|eot|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|h|>assistant<|/h|>\n\n{% endif %}"
)
# Gemma: no system prompt, and roles that alternate
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}<turn>"
    "{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>model\n{% endif %}"
)
# Qwen 3: reasoning stays in the answers behind the last question alone
QWEN3 = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}<|im_start|>"
    "{{ m.role }}\n{% if m.role == 'assistant' and m.reasoning_content and loop.index0 > ns.last %}"
    "<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# SmolLM3, and trl's templates for training: what is generated is marked
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{{ '\n' }}{% else %}"
    "{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}"
    "<|im_start|>assistant\n"
    "{% endif %}"
)
# plain text whose line ends merge in some tokenizers
PLAIN = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
# the number of questions first: no prompt is the beginning of the next one
COUNTS = (
    "{{ messages | selectattr('role', 'equalto', 'user') | list | length }} asked\n"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "llama": LLAMA,
    "gemma": GEMMA,
    "qwen3": QWEN3,
    "marked": MARKED,
    "plain": PLAIN,
}
TOKENS = ["<|im_start|>", "<|im_end|>", "<|h|>", "<|/h|>", "<|eot|>", "<turn>", "<end>"]
ENDS = {"llama": "<|eot|>", "gemma": "<end>", "plain": "<eos>"}


def tokenizer_with(name):
    """A tokenizer of bytes and control tokens with one of the templates."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": TOKENS})
    tokenizer.eos_token = ENDS.get(name, "<|im_end|>")
    tokenizer.chat_template = TEMPLATES[name]
    return tokenizer


def shown(tokenizer, ids, labels):
    """The text that is fed to the model, with what is in the loss in double brackets."""
    text, run, inside = "", [], False
    for one, label in zip([*ids, None], [*labels, -100], strict=True):
        if (label != -100) != inside or one is None:
            text += f"[[{tokenizer.decode(run)}]]" if inside else tokenizer.decode(run)
            run, inside = [], not inside
        run.append(one)
    return text
