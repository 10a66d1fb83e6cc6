"""A chat template is a program from elsewhere: what it does wrong is said, and what it takes is limited."""

import resource
import sys

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from pmod_cli.core import chat
from pmod_cli.core.errors import PmodError


def render(template: str) -> str:
    messages = [{"role": "user", "content": "why?"}]
    return chat.rendered(lambda: render_jinja_template(conversations=[messages], chat_template=template)[0][0])


def test_a_template_is_rendered_and_the_limit_is_gone_afterwards():
    before = resource.getrlimit(resource.RLIMIT_AS)
    assert render("{{ messages[0].content }}!") == "why?!"
    assert resource.getrlimit(resource.RLIMIT_AS) == before


@pytest.mark.parametrize(
    ("template", "said"),
    [
        pytest.param(
            "{{ 'A' * 3 * 10 ** 9 }}",
            "takes more than 1,024 MB",
            marks=pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what a process has"),
        ),
        ("{{ 'A' * 10 ** 7 }}", "a prompt of 10,000,000 characters; the limit is 4,000,000"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "fails: SecurityError"),
        ("{% if %}", "fails: TemplateSyntaxError"),
        ("{{ messages[0].a.b.c }}", "fails: UndefinedError"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages + 1 }}", "fails: TypeError"),
        ("{{ 1 // 0 }}", "fails: ZeroDivisionError"),
    ],
)
def test_a_hostile_template_is_a_sentence(template, said):
    before = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(PmodError, match="chat template") as caught:
        render(template)
    assert said in caught.value.what
    assert resource.getrlimit(resource.RLIMIT_AS) == before
