import json
import shutil

import pytest
from pilotfish.common.errors import InvalidRequest, ModelLoadError
from pilotfish.text.chat_template import ChatTemplate
from transformers import AutoTokenizer

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TRIMMING = CHATML.replace("message['content']", "message['content'] | trim")
# Whitespace control, trimming, loop controls, a refusal, a date, JSON, namespaces, special tokens and the training mark.
ELABORATE = """{{ bos_token }}
{%- set ns = namespace(turn=0) %}
{% if messages[0]['role'] == 'system' %}
    [SYS]{{ messages[0]['content'] | trim }}[/SYS] {{ strftime_now('%Y') | length }}
    {%- set messages = messages[1:] %}
{% endif %}
{% for message in messages %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('roles must alternate user/assistant') }}
    {% endif %}
    {% set ns.turn = ns.turn + 1 %}
    {%- if message['role'] == 'user' %}
[INST] {{ message['content'] | trim }} [/INST]
    {%- else %}
{% generation %} {{ message['content'] | trim }} {{ eos_token }}{% endgeneration %}
    {%- endif %}
    {% if ns.turn > 7 %}{% break %}{% endif %}
{% endfor %}
{{ {'turns': ns.turn, 'text': '<é>'} | tojson }}{{ tools is none }}{{ undefined_name }}
"""
CONVERSATIONS = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": " Be brief.\n"}, {"role": "user", "content": "  What <b>is</b> 'it'? 😀 "}],
    [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b "},
        {"role": "user", "content": "multi\nline\n"},
        {"role": "assistant", "content": "The answer is"},
    ],
]


@pytest.fixture
def directory(byte_level_path, tmp_path):
    return shutil.copytree(byte_level_path, tmp_path, dirs_exist_ok=True)


@pytest.mark.parametrize("source", [CHATML, ELABORATE])
@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_equal_to_transformers(directory, source, messages):
    (directory / "chat_template.jinja").write_text(source)
    ours, theirs = ChatTemplate.from_directory(directory), AutoTokenizer.from_pretrained(directory)
    for add in (True, False):
        assert ours.render(messages, add_generation_prompt=add) == theirs.apply_chat_template(
            messages, add_generation_prompt=add, tokenize=False
        )


def test_the_embedded_model_equals_transformers(smollm2_path):
    ours, theirs = ChatTemplate.from_directory(smollm2_path), AutoTokenizer.from_pretrained(smollm2_path)
    for messages in CONVERSATIONS:
        assert ours.render(messages) == theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


@pytest.mark.parametrize("source", [CHATML, TRIMMING, ELABORATE])
@pytest.mark.parametrize("final", ["The answer is", "The answer is ", "", " \n{", "Hi"])
def test_continuing_the_final_message_equals_transformers(directory, source, final):
    (directory / "chat_template.jinja").write_text(source)
    ours, theirs = ChatTemplate.from_directory(directory), AutoTokenizer.from_pretrained(directory)
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": final}]
    assert ours.render(messages, continue_final_message=True) == theirs.apply_chat_template(
        messages, continue_final_message=True, tokenize=False
    )


@pytest.mark.parametrize(
    "in_config",
    ["from config", [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "from config"}]],
)
def test_where_a_template_is_found(directory, in_config):
    config = json.loads((directory / "tokenizer_config.json").read_text())
    assert not ChatTemplate.from_directory(directory).exists
    (directory / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": in_config}))
    assert ChatTemplate.from_directory(directory).render(CONVERSATIONS[0]) == "from config"
    (directory / "chat_template.jinja").write_text("from its own file")
    assert ChatTemplate.from_directory(directory).render(CONVERSATIONS[0]) == "from its own file"


def test_text_parts_become_one_text():
    template = ChatTemplate(CHATML, {})
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert template.render([{"role": "user", "content": parts}]) == template.render([{"role": "user", "content": "a\nb"}])


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "at least one message"),
        (["hi"], r"messages\[0\] must be an object"),
        ([{"role": "user", "content": "a"}, {"content": "b"}], r"messages\[1\]\.role must be a non-empty string, not None"),
        ([{"role": "user"}], r"messages\[0\]\.content must be a string"),
        ([{"role": "user", "content": 7}], r"messages\[0\]\.content must be a string or a list of text parts, not 7"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "type 'image_url'; this model takes text"),
        ([{"role": "assistant", "content": "a"}], "refuses these messages: roles must alternate"),
    ],
)
def test_refused_messages(messages, message):
    with pytest.raises(InvalidRequest, match=message):
        ChatTemplate(ELABORATE, {"bos_token": "<s>"}).render(messages)


def test_refused_continuations():
    with pytest.raises(InvalidRequest, match="last message of role 'assistant', not 'user'"):
        ChatTemplate(CHATML, {}).render(CONVERSATIONS[0], continue_final_message=True)
    only_users = ChatTemplate("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", {})
    with pytest.raises(InvalidRequest, match="leaves the last message out"):
        only_users.render(CONVERSATIONS[2], continue_final_message=True)


def test_no_template_and_broken_templates(directory):
    with pytest.raises(InvalidRequest, match="no chat template: use generate"):
        ChatTemplate.from_directory(directory).render(CONVERSATIONS[0])
    (directory / "chat_template.jinja").write_text("{% for %}")
    with pytest.raises(ModelLoadError, match="not valid Jinja"):
        ChatTemplate.from_directory(directory)
    (directory / "chat_template.jinja").unlink()
    (directory / "tokenizer_config.json").write_text('{"chat_template": {"tool_use": "x"}}')
    with pytest.raises(ModelLoadError, match="none of them is 'default'"):
        ChatTemplate.from_directory(directory)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ 1 / 0 }}",
        "{{ messages[0].content + 1 }}",
        "{% for i in range(10**9) %}{% endfor %}",
    ],
)
def test_a_template_that_fails_or_reaches_out_is_an_error_of_the_request(source):
    with pytest.raises(InvalidRequest, match="refuses these messages"):
        ChatTemplate(source, {}).render(CONVERSATIONS[0])
