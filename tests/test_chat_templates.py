"""Chat templates filled in where texts cannot change what is around them, against the template itself."""

from __future__ import annotations

import random

import jinja2
import pytest

from clkit.language.templates import ChatTemplate


class Renderer:
    """What ``ChatTemplate`` needs of a tokenizer; counts how often the template runs."""

    def __init__(self, template):
        self.chat_template, self.n = template, 0
        self._template = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).from_string(template)

    def apply_chat_template(self, messages, tokenize, add_generation_prompt, **options):
        self.n += 1
        return self._template.render(messages=messages, add_generation_prompt=add_generation_prompt, **options)


OPENING = "{% if add_generation_prompt %}assistant: {% endif %}"
EACH = "{% for m in messages %}{{ m.role }}: BODY\n{% endfor %}" + OPENING
TEMPLATES = {
    "plain": (EACH.replace("BODY", "{{ m.content }}"), True),
    "stripped": (EACH.replace("BODY", "{{ m.content | trim }}"), True),
    "thoughts": (
        EACH.replace("BODY", "{% set c = m.content %}{% if '</think>' in c %}(done) {% endif %}{{ c }}"),
        True,
    ),
    "cut": (EACH.replace("BODY", "{{ m.content.split('</think>')[-1].lstrip('\n') }}"), True),
    "whole": (EACH.replace("BODY", "{% if m.content == 'stop' %}END{% endif %}{{ m.content }}"), True),
    "upper": (EACH.replace("BODY", "{{ m.content | upper }}"), False),
    "first": (EACH.replace("BODY", "{% if m.content[0] == 'a' %}an {% endif %}{{ m.content }}"), False),
    "parts": (EACH.replace("BODY", "{% for c in m.content %}{{ c.text or '<image>' }}{% endfor %}"), True),
}
TEXTS = [
    "red",
    "stop",
    "a </think> b",
    " left",
    "right ",
    "",
    "x\n</think>\n y",
    "two words",
    "{{ x }}",
    "\\1",
    "a \n b",
]


@pytest.mark.parametrize(("template", "filled"), TEMPLATES.values(), ids=TEMPLATES)
def test_a_filled_template_is_what_the_template_writes(template, filled):
    rng = random.Random(0)
    counted, expected = Renderer(template), Renderer(template)
    write = ChatTemplate(counted)

    def content(n):
        text = rng.choice(TEXTS) if rng.random() < 0.4 else f"text {n}"
        parts = [*[{"type": "image"}] * (n % 3), {"type": "text", "text": text}]
        return parts if "in m.content %}" in template else text

    for n in range(200):
        messages = [{"role": "user", "content": content(n)}, {"role": "assistant", "content": content(n + 1)}]
        for shown, answered in ((messages, True), (messages[:1], False)):
            options = {"tokenize": False, "add_generation_prompt": not answered}
            assert write(shown, answered) == expected.apply_chat_template(shown, **options)
    assert (counted.n < 250) is filled
    assert expected.n == 400


def test_a_template_that_depends_on_texts_in_an_unforeseen_way_is_found_out():
    template = EACH.replace("BODY", "{% for letter in m.content %}{{ letter }}.{% endfor %}")
    write, expected = ChatTemplate(Renderer(template)), Renderer(template)
    for n in range(30):
        messages = [{"role": "user", "content": f"text {n}"}]
        assert write(messages, False) == expected.apply_chat_template(messages, False, True)
