"""Chat templates in the styles of published models, and tokenizers for them."""

import functools
import json

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from ladder_jax.data.tokenizer import HuggingFace
from ladder_jax.data.tokenizer_files import Special

CHATML = """\
{% for m in messages %}
{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}
{%- endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

# A system message of its own where the conversation has none.
DEFAULT_SYSTEM = """\
{%- set given = messages[0].role == 'system' %}
{%- if not given %}
    {{- '<|im_start|>system\nYou are a default.<|im_end|>\n' }}
{%- endif %}
{%- for m in messages %}
    {{- '<|im_start|>' ~ m.role ~ '\n' ~ m.content ~ '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""

# bos, headers, an end of turn that is not eos, a date, content that is trimmed.
LLAMA3 = """\
{{- bos_token }}
{%- set day = strftime_now('%d %b %Y') %}
{{- '<|start_header_id|>system<|end_header_id|>\n\nToday: ' + day + '\n\n' }}
{%- if messages[0]['role'] == 'system' %}
    {{- messages[0]['content'] | trim }}
    {%- set messages = messages[1:] %}
{%- endif %}
{{- '<|eot_id|>' }}
{%- for m in messages %}
    {%- if tools is not none or m.role == 'system' %}
        {{- raise_exception('The system message comes first, only') }}
    {%- endif %}
    {{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}
    {{- m.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""

# No generation prompt; the roles must take turns.
MISTRAL = """\
{{ bos_token }}{% for m in messages %}
{% if (m.role == 'user') != (loop.index0 is even) %}
{{ raise_exception('Roles must alternate user, assistant, ...') }}
{% endif %}
{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}
{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}
{% else %}{{ raise_exception('Only user and assistant are supported') }}
{% endif %}{% endfor %}"""

GENERATION = """\
{%- for m in messages %}
{%- if m.role == 'assistant' %}
{{- '<|im_start|>assistant\n' }}
{% generation %}
{{- m.content + '<|im_end|>' -}}
{% endgeneration %}
{{- '\n' }}
{%- elif loop.index0 > 99 %}{% break %}
{%- else %}
{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\n' }}
{%- endif %}
"""

# Earlier answers lose what they say before </think>, and the last one gets an empty
# thought.
THINKING = """\
{%- for m in messages %}
{{- '<|im_start|>' + m.role + '\n' }}
{%- if m.role == 'assistant' and loop.last %}
{{- '<think>\n\n</think>\n\n' }}
{%- endif %}
{{- m.content.split('</think>')[-1] + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}
"""

# No token ends a turn.
PLAIN_TEXT = """\
{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}
{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"""

TEMPLATES = {
    "chatml": CHATML,
    "default_system": DEFAULT_SYSTEM,
    "llama3": LLAMA3,
    "mistral": MISTRAL,
    "generation": GENERATION,
}

SPECIAL = [
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
]
_TEXTS = [
    "A question with words: what is the answer? It is 42, and no more than that.",
    "user assistant system [INST] Today: the day is a day.\n\nAnother line.\n",
]


@functools.cache
def byte_level_json(adds_bos: bool) -> str:
    """tokenizer.json of a byte-level BPE of a few merges."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXTS * 5, trainer)
    # It trims the spaces of a token's offsets, as that of GPT-2 and Llama-3 does.
    parts = [processors.ByteLevel(trim_offsets=True)]
    if adds_bos:
        bos = [("<s>", tokenizer.token_to_id("<s>"))]
        parts.append(
            processors.TemplateProcessing(
                single="<s> $A", pair="<s> $A $B", special_tokens=bos
            )
        )
    tokenizer.post_processor = processors.Sequence(parts)
    return tokenizer.to_str()


@functools.cache
def metaspace_json(adds_bos: bool) -> str:
    """tokenizer.json of a BPE as sentencepiece's, with a space before a text."""
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<unk>", *SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXTS * 5, trainer)
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A",
            pair="<s> $A $B",
            special_tokens=[("<s>", tokenizer.token_to_id("<s>"))],
        )
    values = json.loads(tokenizer.to_str())
    for token in values["added_tokens"]:  # the tokens of bytes stand for text
        token["special"] = not token["content"].startswith("<0x")
    values["added_tokens"] = [t for t in values["added_tokens"] if t["special"]]
    return json.dumps(values)


KINDS = {"byte_level": byte_level_json, "metaspace": metaspace_json}


@functools.cache
def make(
    template: str | None, kind: str = "byte_level", adds_bos: bool = False
) -> HuggingFace:
    """A tokenizer with a chat template."""
    special = Special({"bos": "<s>", "eos": "</s>"}, chat_template=template)
    return HuggingFace(KINDS[kind](adds_bos), special)
