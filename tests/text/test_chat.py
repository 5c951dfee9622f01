"""Templates in their sandbox, special tokens that stay the template's own, and answers read."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refmoe.files import InputError
from refmoe.run.load import golden_folder
from refmoe.text.messages import read_tools
from refmoe.text.reply import Marker, Parser, Reply, ToolCall, collect, ends_in_thought, parse
from refmoe.text.template import ChatTemplate
from refmoe.text.tokenizer import Tokenizer

TINY = golden_folder() / "tiny-k2"
TEMPLATE, WORDS = ChatTemplate.load(TINY), Tokenizer.load(TINY)
SYSTEM = (
    "<|im_system|>system<|im_middle|>You are Kimi, an AI assistant created by Moonshot AI."
    "<|im_end|>"
)
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALL = {
    "id": "functions.weather:0",
    "type": "function",
    "function": {"name": "weather", "arguments": '{"city": "Århus"}'},
}

# K2.5's form in our own words: no default system, thinking switch, TypeScript tools, ids verbatim
K25 = """
{%- macro call_text(m) -%}
{%- if m.get('tool_calls') -%}
<|tool_calls_section_begin|>
{%- for c in m.tool_calls -%}
<|tool_call_begin|>{{ c.id }}<|tool_call_argument_begin|>
{%- if c.function.arguments is string -%}{{ c.function.arguments }}
{%- else -%}{{ c.function.arguments | tojson }}{%- endif -%}
<|tool_call_end|>
{%- endfor -%}
<|tool_calls_section_end|>
{%- endif -%}
{%- endmacro -%}
{%- if tools -%}
<|im_system|>tool_declare<|im_middle|>
{%- if tools_ts_str -%}{{ tools_ts_str }}
{%- else -%}{{ tools | tojson(separators=(',', ':')) }}{%- endif -%}
<|im_end|>
{%- endif -%}
{%- set ns = namespace(last=-1) -%}
{%- for m in messages -%}
{%- if m.role == 'assistant' and not m.get('tool_calls') -%}
{%- set ns.last = loop.index0 -%}
{%- endif -%}
{%- endfor -%}
{%- for m in messages -%}
<|im_{{ m.role if m.role in ('user', 'assistant') else 'system' }}|>
{{- m.get('name') or m.role }}<|im_middle|>
{%- if m.role == 'assistant' -%}
<think>
{%- if preserve_thinking or loop.index0 > ns.last -%}
{{ m.get('reasoning_content', '') }}
{%- endif -%}
</think>
{%- elif m.role == 'tool' -%}
{{ '## Return of ' ~ m.tool_call_id ~ '\n' }}
{%- endif -%}
{{ m.content }}{{ call_text(m) }}<|im_end|>
{%- endfor -%}
{%- if add_generation_prompt -%}
<|im_assistant|>assistant<|im_middle|>
{%- if thinking is defined and thinking is false -%}<think></think>{%- else -%}<think>{%- endif -%}
{%- endif -%}
"""


# --- templates


def test_the_default_system_message_and_the_generation_prompt():
    user = {"role": "user", "content": "Who art thou?"}
    said = "<|im_user|>user<|im_middle|>Who art thou?<|im_end|>"
    asks = "<|im_assistant|>assistant<|im_middle|>"
    assert TEMPLATE.render([user]) == SYSTEM + said + asks
    assert TEMPLATE.render([user], add_generation_prompt=False) == SYSTEM + said
    own = {"role": "system", "content": "Be brief."}
    assert TEMPLATE.render([own, user]).startswith("<|im_system|>system<|im_middle|>Be brief.")


def test_tools_calls_results_names_and_parts():
    messages = [
        {"role": "user", "name": "ann", "content": [{"type": "text", "text": t} for t in "ab"]},
        {"role": "assistant", "content": "", "reasoning_content": "look", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": CALL["id"], "content": "rain"},
    ]
    text = TEMPLATE.render(messages, [WEATHER])
    tools = (
        '[{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]'
    )
    assert text == (
        f"<|im_system|>tool_declare<|im_middle|>{tools}<|im_end|>{SYSTEM}"
        "<|im_user|>ann<|im_middle|>ab<|im_end|>"
        "<|im_assistant|>assistant<|im_middle|><think>look</think><|tool_calls_section_begin|>"
        "<|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>"
        '{"city": "Århus"}<|tool_call_end|><|tool_calls_section_end|><|im_end|>'
        "<|im_system|>tool<|im_middle|>## Return of functions.weather:0\nrain<|im_end|>"
        "<|im_assistant|>assistant<|im_middle|>"
    )


def test_arguments_given_as_an_object_become_json():
    call = {**CALL, "function": {"name": "weather", "arguments": {"city": "Århus"}}}
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "tool_calls": [call]}]
    assert '<|tool_call_argument_begin|>{"city": "Århus"}<' in TEMPLATE.render(messages)


def test_the_published_vectors_hold(kimi):
    """Text for the K2-Thinking form, made by tiny-k2's own template; ids for every vector."""
    words = Tokenizer.load(kimi / "k2.6")
    vectors = json.loads((kimi / "chat_vectors.json").read_text("utf-8"))[1:]
    thinking = [v for v in vectors if "Thinking" in v["template"]]
    assert len(thinking) == 14
    for v in thinking:
        prompt = TEMPLATE.encode(words, v["messages"], v["tools"], v["add_generation_prompt"])
        assert prompt.text == v["text"], v["name"]
        assert prompt.tokens == v["ids"], v["name"]
    for v in vectors:
        assert words.encode(v["text"]) == v["ids"]


def test_k25_thinks_unless_told_not_to():
    template, user = ChatTemplate(K25), [{"role": "user", "content": "hi"}]
    assert template.render(user).endswith("<|im_middle|><think>")
    assert template.render(user, thinking=False).endswith("<|im_middle|><think></think>")
    assert ends_in_thought(template.render(user))
    assert not ends_in_thought(template.render(user, thinking=False))
    assert not ends_in_thought(TEMPLATE.render(user))


def test_k25_takes_tools_as_typescript_or_as_compact_json():
    template, user = ChatTemplate(K25), [{"role": "user", "content": "hi"}]
    tools = [WEATHER]
    assert '[{"type":"function","function":{"name":"weather"' in template.render(user, tools)
    ts = "# Tools\n\n## functions\nnamespace functions {}"
    assert template.render(user, tools, tools_ts_str=ts).startswith(
        f"<|im_system|>tool_declare<|im_middle|>{ts}<|im_end|>"
    )


def test_k26_preserves_reasoning_where_asked():
    template = ChatTemplate(K25)
    turns = [
        {"role": "user", "content": "1"},
        {"role": "assistant", "content": "one", "reasoning_content": "hm"},
        {"role": "user", "content": "2"},
    ]
    assert "<think></think>one" in template.render(turns)
    assert "<think>hm</think>one" in template.render(turns, preserve_thinking=True)


def test_a_template_is_looked_for_in_both_places(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(InputError, match=r"no chat template .*put the published model's there"):
        ChatTemplate.load(tmp_path)
    several = [
        {"name": "tool_use", "template": "tools"},
        {"name": "default", "template": "{{ bos_token }}hello"},
    ]
    config = {"chat_template": several, "bos_token": {"content": "[BOS]"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    user = [{"role": "user", "content": "x"}]
    assert ChatTemplate.load(tmp_path).render(user) == "[BOS]hello"
    config["chat_template"] = "one"  # type: ignore[assignment]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert ChatTemplate.load(tmp_path).render(user) == "one"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert ChatTemplate.load(tmp_path).render(user) == "file"


def render(source: str, content: str = "x", **variables: object) -> str:
    return ChatTemplate(source).render([{"role": "user", "content": content}], **variables)


def test_hugging_faces_settings_filters_and_globals():
    assert render("{% if true %}\n  a\n{% endif %}\nb") == "  a\nb"  # trim and lstrip blocks
    assert render("{{ messages | tojson }}", "<é>") == '[{"role": "user", "content": "<é>"}]'
    assert render("{{ {'b': 1, 'a': 2} | tojson(indent=1, sort_keys=true) }}") == (
        '{\n "a": 2,\n "b": 1\n}'
    )
    assert render(
        "{% for i in range(9) %}{% if i > 2 %}{% break %}{% endif %}{{ i }}{% endfor %}"
    ) == ("012")
    assert re.fullmatch(r"\d{4}", render("{{ strftime_now('%Y') }}"))
    assert render("{% generation %}a{% endgeneration %}") == "a"
    with pytest.raises(InputError, match="chat template:1: roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")


@pytest.mark.peers
@pytest.mark.parametrize(
    "source",
    [
        (TINY / "chat_template.jinja").read_text("utf-8"),
        K25,
        "{{ messages[0] }}{{ messages[0].content[::-1] }}{{ messages[-1:] | length }}",
        "{{ messages | map(attribute='role') | join('-') }}{{ ','.join(messages[0].keys()) }}",
        "{% for k, v in messages[0].items() %}{{ loop.index ~ k ~ v }}{{ loop.last }}{% endfor %}",
        "{% macro f(x, y=[1]) %}{{ x ~ y ~ caller() }}{% endmacro %}{% call f(1) %}c{% endcall %}",
        "{% filter upper %}a{% endfilter %}{{ '%05.2f %s' | format(3, 10**9) ~ ('é<' | tojson) }}",
        "{% set a, b = 7, 2 %}{{ [a + b, a - b, a * b, a / b, a // b, a % b, a ** b, 'a' * b] }}",
        "{% set c = cycler('a', 'b') %}{{ c.next() ~ c.next() ~ ('<' | e) ~ ('<' | safe) }}",
        "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}{{ [3, 1] | sort }}",
        "{{ [1, 2, 3] | batch(2) | list }}{{ {'b': 1, 'a': 2} | dictsort }}{{ tools }}{{ none }}",
        "{%- block x %}q{% endblock %}{{ self.x() }}{% for a in [] %}{% else %}none{% endfor %}",
    ],
)
def test_hugging_face_renders_the_same(source):
    """The witness is transformers' own environment, without any budget."""
    from transformers.utils import chat_template_utils as utils

    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "name": "ann", "content": "Rain <in> Århus?\n"},
        {"role": "assistant", "content": "", "reasoning_content": "look", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": CALL["id"], "content": "rain"},
        {"role": "assistant", "content": "Rain.", "reasoning_content": "so"},
        {"role": "user", "content": "Thanks."},
        {"role": "assistant", "content": "Ay.", "reasoning_content": "polite"},
    ]
    for some in (messages, messages[1:4], messages[1:]):
        for tools in ([WEATHER], None):
            witness = utils.render_jinja_template([some], tools, chat_template=source)[0][0]
            assert ChatTemplate(source).render(some, tools, False) == witness


def test_a_template_may_append_to_its_lists_and_never_changes_ours():
    assert render(
        "{% set l = [] %}{% for i in range(3) %}{% set _ = l.append(i) %}{% endfor %}{{ l }}"
    ) == ("[0, 1, 2]")
    messages = [{"role": "user", "content": "x"}]
    tools = [json.loads(json.dumps(WEATHER))]
    ChatTemplate("{% set _ = messages.append(1) %}{% set _ = tools.append(2) %}").render(
        messages, tools
    )
    assert messages == [{"role": "user", "content": "x"}]
    assert tools == [WEATHER]


@pytest.mark.parametrize(
    "escape",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__ }}",
        "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
        "{{ '%s' | attr('__class__') }}",
        "{{ cycler.__init__.__globals__.os }}",
        "{{ joiner.__init__.__globals__ }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__code__ }}",
        "{{ self.__init__.__globals__ }}",
        "{{ messages[0].items.__self__ }}",
        "{% set n = namespace() %}{% set n.__class__ = 1 %}",
        "{{ (messages | map(attribute='__class__') | list)[0].__mro__ }}",
        "{{ messages.clear() }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}{{ os }}",
        "{{ lipsum(n=10) }}",
    ],
)
def test_escapes_from_the_sandbox_are_refused(escape):
    with pytest.raises(InputError, match="chat template"):
        render(escape)


@pytest.mark.parametrize(
    "bomb",
    [
        "{{ 'x' * 10**10 }}",
        "{{ 'x'.ljust(10**10) }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '{:>1000000000}'.format(1) }}",
        "{{ 2**99999999 }}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% set ns = namespace(s='xxxx') %}"
        "{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
        "{% set l = [1] %}{% for i in range(60) %}{% set _ = l.append(l) %}{% endfor %}{{ l }}",
        "{% set ns = namespace(l=[1]) %}"
        "{% for i in range(60) %}{% set ns.l = [ns.l, ns.l] %}{% endfor %}{{ ns.l | upper }}",
        "{% set s = 'x' * 10**6 %}"
        "{% set all %}{% for i in range(99999) %}{{ s }}{% endfor %}{% endset %}",
        "{% set s, ns = 'x' * 10**6, namespace(l=()) %}"
        "{% for i in range(99999) %}{% set ns.l = (ns.l, s[1:]) %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) ~ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{{ range(99999) | join('x' * 9999) }}",
        "{{ messages | tojson(indent=10**9) }}",
        "{{ 1 | round(10**9, 'floor') }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ 'x' | center(10**10) }}",
        "{{ ['x'] * 10**9 }}",
        "{{ 'ab' | replace('', 'x' * 9999) | replace('', 'x' * 9999) }}",
        "{{ 'a,' * 99999 | indent(99999, true) }}",
    ],
)
def test_unbounded_work_is_stopped(bomb):
    with pytest.raises(InputError):
        render(bomb)


@pytest.mark.parametrize(
    "source",
    [
        "{{",
        "{% if %}",
        "{{ x | nosuch }}",
        "{% for %}",
        "{{ 1 / 0 }}",
        "(" * 999 + "{{" + "(" * 9999,
    ],
)
def test_broken_templates_are_refused_with_their_line(source):
    with pytest.raises(InputError, match=r"chat template(:1)?: "):
        render(source)


@settings(max_examples=60)
@given(st.text(alphabet="{}%#|.()[]'\"<>_ ~+-*/=,:0aifomnst\n", max_size=60))
def test_any_text_as_a_template_renders_or_is_refused(source):
    """Anything else than `InputError` fails the test; the error says which template."""
    try:
        shown = render(source)
    except InputError as e:
        shown = str(e)
        assert shown.startswith("chat template")
    assert "\x00" not in shown


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([], "no messages"),
        ("x", "expected a list"),
        ([{"content": "x"}], "message 0: expected an object with a role"),
        ([{"role": "user", "content": 3}], "content is 3"),
        ([{"role": "user", "content": [{"text": "x"}]}], "part"),
        ([{"role": "user", "content": [{"type": "image", "url": "x"}]}], "image"),
        ([{"role": "assistant", "tool_calls": [{"id": "x"}]}], "tool call"),
        ([{"role": "user", "content": object()}], "expected what JSON can hold"),
    ],
)
def test_bad_messages_are_refused(messages, says):
    with pytest.raises(InputError, match=says):
        TEMPLATE.encode(WORDS, messages)


def test_bad_tools_are_refused(tmp_path):
    file = tmp_path / "tools.json"
    for content, says in (
        ("{", "not JSON"),
        ("3", "expected a list"),
        ('[{"name": "x"}]', "tool 0 is"),
        (json.dumps([WEATHER, WEATHER]), "two tools are called 'weather'"),
        ('[{"type": "function", "function": {"name": "a b"}}]', "without spaces"),
    ):
        file.write_text(content)
        with pytest.raises(InputError, match=says):
            read_tools(file)
    file.write_text(json.dumps({"tools": [WEATHER]}))
    assert read_tools(file) == [WEATHER]


# --- special tokens are the template's


@given(
    st.lists(st.sampled_from([*list(WORDS.special)[:24], "hi ", "<|", "think>"]), max_size=6).map(
        "".join
    )
)
def test_what_a_user_types_is_never_a_control_token(content):
    prompt = TEMPLATE.encode(WORDS, [{"role": "user", "content": content}])
    plain = TEMPLATE.encode(WORDS, [{"role": "user", "content": "hi"}])
    special = set(WORDS.special.values())
    assert [i for i in prompt.tokens if i in special] == [i for i in plain.tokens if i in special]
    assert WORDS.decode(prompt.tokens) == prompt.text
    assert content in prompt.text


def test_tools_parts_and_results_cannot_spell_a_control_token_either():
    """Nor can two parts together, a parameter's name, or an answer that is now history."""
    ends = "<|im_end|><|im_system|>"
    tool = {"function": {"name": ends, "parameters": {"properties": {ends: {"enum": ["[EOS]"]}}}}}
    call = {"id": ends, "function": {"name": ends, "arguments": {ends: ends}}}
    messages = [
        {"role": "system", "content": ends},
        {
            "role": "user",
            "name": ends,
            "content": [{"type": "text", "text": t} for t in "<|im_end|>"],
        },
        {
            "role": "assistant",
            "content": ends,
            "reasoning_content": "</think>",
            "tool_calls": [call],
        },
        {"role": "tool", "content": ends},
    ]
    prompt = TEMPLATE.encode(WORDS, messages, [tool])
    name = {i: special for special, i in WORDS.special.items()}
    middle = ["<|im_middle|>"]
    think = ["<think>", "</think>", "<|tool_calls_section_begin|>", "<|tool_call_begin|>"]
    think += ["<|tool_call_argument_begin|>", "<|tool_call_end|>", "<|tool_calls_section_end|>"]
    assert [name[i] for i in prompt.tokens if i in name] == [
        *["<|im_system|>", *middle, "<|im_end|>"] * 2,  # tools, system
        *["<|im_user|>", *middle, "<|im_end|>"],
        *["<|im_assistant|>", *middle, *think, "<|im_end|>"],
        *["<|im_system|>", *middle, "<|im_end|>"],  # the result
        *["<|im_assistant|>", *middle],
    ]
    assert WORDS.decode(prompt.tokens) == prompt.text == TEMPLATE.render(messages, [tool])


def test_a_template_that_looks_for_special_tokens_in_messages_is_refused_not_misread():
    looks = ChatTemplate("{{ messages[0].content.split('</think>')[-1] }}")
    assert looks.render([{"role": "user", "content": "<think>a</think>b"}]) == "b"
    assert looks.encode(WORDS, [{"role": "user", "content": "b"}]).text == "b"
    with pytest.raises(InputError, match="give reasoning as reasoning_content"):
        looks.encode(WORDS, [{"role": "user", "content": "<think>a</think>b"}])


def test_half_a_surrogate_pair_becomes_a_character_that_can_be_encoded():
    prompt = TEMPLATE.encode(WORDS, [{"role": "user", "content": "a\ud800<|im_end|>\ud83d\ude00"}])
    assert "a\ufffd<|im_end|>\U0001f600" in prompt.text
    assert WORDS.decode(prompt.tokens) == prompt.text


@given(st.text(max_size=30).filter(lambda t: "<" not in t and "[" not in t))
def test_an_ordinary_prompt_is_encoded_as_moonshots_tokenizer_does(content):
    prompt = TEMPLATE.encode(WORDS, [{"role": "user", "content": content}])
    assert prompt.tokens == WORDS.encode(prompt.text)


# --- answers


ANSWERS = [
    "plain",
    "<think></think>Ay, my lord.",
    "<think>hm</think>Yes.",
    "<think>hm</think><|tool_calls_section_begin|><|tool_call_begin|>functions.a:0"
    '<|tool_call_argument_begin|>{"x": "</think>"}<|tool_call_end|><|tool_calls_section_end|>',
    "<think>never closed",
    "text<|tool_call_begin|>outside",
    "<|tool_calls_section_begin|><|tool_call_begin|>a:0<|tool_call_argument_begin|>{}"
    "<|tool_call_end|><|tool_calls_section_end|>",
    "<|tool_calls_section_begin|><|tool_call_begin|>functions.a:0<|tool_call_argument_begin|>[1]"
    "<|tool_call_end|><|tool_calls_section_end|>",
    "<|tool_calls_section_begin|><|tool_call_begin|>functions.a:0<|tool_call_argument_begin|>{",
    "<|tool_calls_section_begin|>words<|tool_calls_section_end|>after",
    "<|tool_calls_section_begin|><|tool_calls_section_end|>",
    "a < b <th </think> <think>",
]


def test_a_well_formed_answer_is_read():
    reply = parse(ANSWERS[3])
    call = ToolCall("functions.a:0", "a", '{"x": "</think>"}')
    assert reply == Reply("hm", "", (call,), ())
    assert parse("Yes.", in_thought=True) == Reply(
        "Yes.", "", (), ("the thought is not closed: no </think>",)
    )
    assert parse("hm</think>Yes.", in_thought=True) == Reply("hm", "Yes.")


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (4, "the thought is not closed"),
        (5, "<|tool_call_begin|> out of place"),
        (6, 'id is "a:0", expected functions.NAME:INDEX'),
        (7, 'arguments of "functions.a:0" are no JSON object'),
        (8, "a tool call is not closed"),
        (9, "text between tool calls"),
        (10, "a section without tool calls"),
        (11, "out of place"),
    ],
)
def test_a_malformed_answer_is_reported_and_kept_as_text(answer, says):
    reply = parse(ANSWERS[answer])
    assert any(says in p for p in reply.problems)
    assert reply.tool_calls == ()
    kept = reply.reasoning + reply.content
    words = re.split("|".join(map(re.escape, Marker)), ANSWERS[answer])
    at = 0
    for word in words:  # what stands between the markers is all there, in order
        at = kept.index(word, at) + len(word)


pieces = st.lists(
    st.sampled_from(
        [*Marker, "functions.a:0", "functions.b:1", "{}", '{"x": 1}', "text", "<", "<|tool"]
    ),
    max_size=12,
).map("".join)


@settings(max_examples=200)
@given(st.one_of(st.sampled_from(ANSWERS), pieces), st.booleans(), st.data())
def test_streaming_in_any_cuts_equals_reading_at_once(answer, in_thought, data):
    parser, events, at = Parser(in_thought), [], 0
    while at < len(answer):
        size = data.draw(st.integers(1, 9))
        for event in parser.feed(answer[at : at + size]):
            events.append(event)
        at += size
    events += parser.finish()
    assert collect(events) == parse(answer, in_thought)


@settings(max_examples=200)
@given(pieces, st.booleans())
def test_no_character_is_lost(answer, in_thought):
    """Whatever is not a call or a marker in its place is reasoning or content, in order."""
    reply = parse(answer, in_thought)
    kept = reply.reasoning + reply.content + "".join(c.id + c.arguments for c in reply.tool_calls)
    bare = re.sub("|".join(map(re.escape, Marker)), "", answer)
    left = re.sub("|".join(map(re.escape, Marker)), "", kept)
    assert sorted(left) == sorted(bare)


names = st.from_regex(r"[a-z_]{1,8}", fullmatch=True)
arguments = st.dictionaries(names, st.one_of(st.text(max_size=8), st.integers()), max_size=3)
calls = st.lists(st.tuples(names, arguments), max_size=3)
words_only = st.text(max_size=20).filter(lambda t: "<" not in t)


@given(words_only, words_only, calls)
def test_reasoning_and_calls_survive_a_round_trip_through_the_template(reasoning, content, made):
    """Reply → message → template → text → Reply."""
    reply = Reply(
        reasoning,
        content,
        tuple(
            ToolCall(f"functions.{name}:{i}", name, json.dumps(args, ensure_ascii=False))
            for i, (name, args) in enumerate(made)
        ),
    )
    user = {"role": "user", "content": "?"}
    k25 = ChatTemplate(K25)
    before = k25.render([user]).removesuffix("<think>")
    text = k25.render([user, reply.message()], add_generation_prompt=False, preserve_thinking=True)
    assert parse(text.removeprefix(before).removesuffix("<|im_end|>")) == reply
