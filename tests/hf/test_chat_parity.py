"""Chat templates give the text, the ids and the mask that transformers gives."""

import datetime
import json

import chat_templates
import pytest
import tokenizers
import transformers

from ladder_jax.data import chat_template
from ladder_jax.data.chat import ChatEncoder

CONVERSATIONS = [
    [("user", "What is it?"), ("assistant", "It is 42.")],
    [
        ("user", " Über: a <b>\n\n"),
        ("assistant", "no\nyes \U0001f600"),
        ("user", "and 'that'?"),
        ("assistant", "  42  "),
    ],
    [("system", "Be a poet."), ("user", "q"), ("assistant", "a")],
    [("user", "a question without an answer")],
]
MESSAGES = [
    [dict(role=role, content=content) for role, content in turns]
    for turns in CONVERSATIONS
]
OTHERS = {
    "thinking": chat_templates.THINKING,
    "plain_text": chat_templates.PLAIN_TEXT,
    "own_chatml": chat_template.CHATML,
    "own_plain": chat_template.PLAIN,
    "json": "{{ messages | tojson }}{{ [1, 'ü<'] | tojson(indent=2) }}{{ pad_token }}",
}
ALL = chat_templates.TEMPLATES | OTHERS


def theirs(ours):
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(ours.tokenizer_json()),
        bos_token="<s>",
        eos_token="</s>",
        chat_template=ours.chat_template,
    )


def outcome(function, *args, **options):
    """What a call returns, or the last line of its exception."""
    try:
        return function(*args, **options)
    except Exception as error:
        return f"refused: {str(error).splitlines()[-1]}"


@pytest.mark.parametrize("kind", chat_templates.KINDS)
@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("add_generation_prompt", [False, True])
def test_text_and_ids_are_those_of_transformers(name, kind, add_generation_prompt):
    ours = chat_templates.make(ALL[name], kind)
    other = theirs(ours)
    encoder = ChatEncoder(ours)
    render = lambda messages, **options: (
        encoder.template.render(messages, **options).text
    )
    refused = 0
    for messages in MESSAGES:
        options = dict(add_generation_prompt=add_generation_prompt)
        text = outcome(render, messages, **options)
        assert text == outcome(
            other.apply_chat_template, messages, tokenize=False, **options
        )
        if text.startswith("refused"):
            refused += 1
            continue
        expected = other.apply_chat_template(messages, **options)["input_ids"]
        [rendered] = ours.encode_rendered([text])
        assert rendered.ids == expected
        if add_generation_prompt:
            assert encoder.prompt(messages) == expected
    assert refused == {"mistral": 1}.get(name, 0)


@pytest.mark.parametrize("kind", chat_templates.KINDS)
@pytest.mark.parametrize("end", ["' -}}\n{% endgen", "' }}\n{% endgen"])
def test_the_mask_of_generation_blocks_is_that_of_transformers(kind, end):
    """The second block ends in a line end, which follows the end of the turn."""
    template = chat_templates.GENERATION.replace("' -}}\n{% endgen", end)
    ours = chat_templates.make(template, kind)
    other = theirs(ours)
    encoder = ChatEncoder(ours)
    for messages in MESSAGES[:3]:
        expected = other.apply_chat_template(
            messages, return_assistant_tokens_mask=True, return_dict=True
        )
        [encoded] = encoder.encode([encoder.find_answers(messages, "assistant")])
        assert encoded.ids == expected["input_ids"]
        assert [int(c) for c in encoded.counted] == expected["assistant_masks"]


def test_a_folder_that_transformers_wrote_is_read_with_its_template(tmp_path):
    from ladder_jax.data import tokenizer

    ours = chat_templates.make(chat_templates.LLAMA3)
    theirs(ours).save_pretrained(tmp_path)
    loaded = tokenizer.load(str(tmp_path))
    assert loaded.chat_template == chat_templates.LLAMA3
    now = datetime.datetime.now()
    for messages in MESSAGES:
        assert ChatEncoder(loaded, now).prompt(messages) == (
            ChatEncoder(ours, now).prompt(messages)
        )
    # The older form: a template inside of tokenizer_config.json, perhaps several.
    (tmp_path / "chat_template.jinja").unlink()
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text())
    for template in (
        "old",
        [dict(name="tools", template="x"), dict(name="default", template="old")],
    ):
        path.write_text(json.dumps(config | dict(chat_template=template)))
        assert tokenizer.load(str(tmp_path)).chat_template == "old"
