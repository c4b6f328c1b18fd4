"""A chat template is a stranger's program: it runs no code, neither hangs nor eats memory."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from nybble.loaders.templates import TemplateFailedError, TemplateRefusedError, TemplateRenderer

MESSAGES: list[dict[str, Any]] = [{"role": "user", "content": "hello {{ 7 * 7 }}"}]


@pytest.fixture(scope="module")
def renderer() -> Iterator[TemplateRenderer]:
    renderer = TemplateRenderer()
    yield renderer
    renderer.close()


def render(renderer: TemplateRenderer, template: str, **variables: Any) -> str:
    return renderer.render(template, MESSAGES, None, variables)


def test_text_is_rendered_with_the_models_variables_and_content_is_not_a_template(
    renderer: TemplateRenderer,
) -> None:
    template = "{{ bos_token }}{% for m in messages %}{{ m.content | tojson }}{% endfor %}é"
    assert render(renderer, template, bos_token="<s>") == '<s>"hello {{ 7 * 7 }}"é'


def marker(tmp_path: Path) -> Path:
    return tmp_path / "was-here"


ESCAPES = [
    # Attributes that lead from any object to every class, and from there to modules.
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ (messages|attr('__class__')).__base__ }}",
    "{{ ''['__class__']['__mro__'] }}",
    "{{ messages.__init__.__globals__['os'].system(command) }}",
    # Functions and objects the environment has.
    "{{ lipsum.__globals__['os'].system(command) }}",
    "{{ cycler.__init__.__globals__.os.system(command) }}",
    "{{ joiner.__init__.__globals__.os.system(command) }}",
    "{{ namespace.__init__.__globals__['sys'].modules['os'].system(command) }}",
    "{{ raise_exception.__globals__['os'].system(command) }}",
    "{{ strftime_now.__globals__['os'].system(command) }}",
    "{{ raise_exception.__code__.co_consts }}",
    "{{ self.__init__.__globals__.__builtins__.__import__('os').system(command) }}",
    "{{ self._TemplateReference__context.environment.overlay() }}",
    "{{ url_for.__globals__.os.system(command) }}",
    # Format strings that look up attributes: CVE-2016-10745, CVE-2019-10906.
    "{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}",
    "{{ '{x.__class__}'.format_map({'x': messages}) }}",
    # The same through a reference to the method: CVE-2024-56326, and by attr(): CVE-2025-27516.
    "{% set f = '{0.__class__.__mro__}'.format %}{{ [messages] | map(f) | list }}",
    "{{ ('{0.__class__.__mro__}'|attr('format'))(messages) }}",
    "{{ messages | map(attribute='__class__') | list }}",
    "{{ messages | groupby('__class__') | list }}",
    # Statements and files.
    "{% import 'os' as os %}{{ os.system(command) }}",
    "{% include '/etc/passwd' %}",
    "{% extends '/etc/passwd' %}",
    "{{ __import__('os').system(command) }}",
    "{{ open('/etc/passwd').read() }}",
    "{{ eval('1') }}{{ exec('1') }}",
    "{{ range.__self__ }}",
    # Frames of generators.
    "{% set g = messages | map('length') %}{{ g.gi_frame.f_globals }}",
    "{{ (messages | select).gi_frame.f_back.f_globals }}",
    # What it was given stays as it was.
    "{{ messages.append(1) }}{{ messages[0].update(role='system') }}",
]


@pytest.mark.parametrize("template", ESCAPES)
def test_no_template_reaches_python(
    renderer: TemplateRenderer, tmp_path: Path, template: str
) -> None:
    try:
        text = render(renderer, template, command=f"touch {marker(tmp_path)}")
    except TemplateRefusedError:
        text = ""
    assert not marker(tmp_path).exists()
    for secret in ("<class", "<module", "root:", "<function", "<frame", "'__builtins__'"):
        assert secret not in text, text[:200]


LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


MUCH_MEMORY = "needs more than 512 MiB"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (LOOP, "takes too long"),
        pytest.param("{{ 9 ** (9 ** 9) }}", "takes too long", marks=pytest.mark.slow),
        ("{{ 'x' * 10 ** 12 }}", MUCH_MEMORY),
        ("{{ '%999999999999d' % 1 }}", MUCH_MEMORY),
        ("{{ '{:>99999999999}'.format(1) }}", MUCH_MEMORY),
        ("{{ 'x' | center(10 ** 11) }}", MUCH_MEMORY),
        ("{{ messages | tojson(indent=10 ** 10) }}", MUCH_MEMORY),
        (
            "{% set n = namespace(x='x') %}"
            "{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
            MUCH_MEMORY,
        ),
        ("{% for i in range(99999) %}{{ 'x' * 9999 }}{% endfor %}", MUCH_MEMORY),
        ("{{ 'x' * 10 ** 8 }}", MUCH_MEMORY),
        ("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", "recursion"),
        ("{{ range(10 ** 9) | list }}", "Range too big"),
    ],
)
def test_no_template_hangs_or_fills_the_memory_and_the_next_one_works(
    renderer: TemplateRenderer, template: str, reason: str
) -> None:
    with pytest.raises((TemplateRefusedError, TemplateFailedError), match=reason):
        render(renderer, template)
    assert render(renderer, "fine") == "fine"


def test_a_process_that_was_killed_is_replaced() -> None:
    renderer = TemplateRenderer()
    renderer.start()
    first = renderer._short._process
    assert first is not None
    first.kill()
    while first.poll() is None:
        time.sleep(0.01)
    assert render(renderer, "fine") == "fine"
    renderer.close()
    renderer.close()
    assert render(renderer, "again") == "again"
    renderer.close()


def test_to_close_waits_for_no_rendering() -> None:
    renderer = TemplateRenderer()
    for _ in range(2):  # it may be used again
        assert render(renderer, "fine") == "fine"
        waited = [renderer.submit(LOOP, MESSAGES, None, {}) for _ in range(3)]
        while not waited[0].running():
            time.sleep(0.01)
        renderer.close()
        for future in waited:
            with pytest.raises(TemplateFailedError, match="stopped"):
                future.result()


def test_a_long_conversation_holds_up_no_short_one(renderer: TemplateRenderer) -> None:
    template = "{% if messages[0].content | length > 10 ** 5 %}" + LOOP + "{% endif %}fine"
    long = [{"role": "user", "content": "x" * 200_000}]
    renderer.submit("fine", long, None, {}).result()  # its process runs
    waited = renderer.submit(template, long, None, {})
    others = [renderer.submit(template, MESSAGES, None, {}) for _ in range(64)]
    assert [other.result() for other in others] == ["fine"] * 64
    assert not waited.done()  # it goes on until its time is over
    with pytest.raises(TemplateFailedError, match="too long"):
        waited.result()


def test_many_threads_get_their_own_answers(renderer: TemplateRenderer) -> None:
    with ThreadPoolExecutor(8) as pool:
        texts = pool.map(lambda i: render(renderer, "{{ i }}", i=i), range(100))
        assert list(texts) == [str(i) for i in range(100)]
