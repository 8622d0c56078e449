"""The tokenizer: what cannot fit is not counted, other threads run meanwhile, templates get tools or refuse."""

import asyncio
import json
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpumeter_worker.api.conversation import Conversation
from gpumeter_worker.api.errors import Refused
from gpumeter_worker.api.tokenizer import Tokenizer
from rigs.worker import model_path

TOOL_TEMPLATE = """
{%- if tools %}TOOLS {% for tool in tools %}{{ tool | tojson }}{% endfor %}
{% endif %}{% for message in messages %}[{{ message.role }}] {{ message.content }}
{%- for call in message.tool_calls or [] %} CALL {{ call.function.name }} {{ call.function.arguments | tojson }}
{%- endfor %}
{% endfor %}"""
TOOL = {"type": "function", "function": {"name": "weather"}}
CALLED = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}],
}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": "12"}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(model_path())


@pytest.fixture(scope="module")
def with_tools(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model_path() / name, folder / name)
    Path(folder / "chat_template.jinja").write_text(TOOL_TEMPLATE)
    return Tokenizer(folder)


async def test_a_template_that_cannot_be_read_is_refused_for_tools_as_for_anything_else(
    tmp_path: Path,
) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model_path() / name, tmp_path / name)
    (tmp_path / "chat_template.jinja").write_text("{% if tools %}{{ 'unterminated }}")
    broken = Tokenizer(tmp_path)
    for asked in (Conversation([{"role": "user", "content": "x"}], [TOOL]), Conversation([CALLED], [])):
        with pytest.raises(Refused) as refused:
            await broken.conversation(asked, 1000)
        assert (refused.value.status, refused.value.param) == (400, "messages")
        assert "chat template refuses" in refused.value.message


async def test_a_template_that_knows_tools_gets_tools_calls_and_results(with_tools: Tokenizer) -> None:
    asked = Conversation([{"role": "user", "content": "Rain?"}, CALLED, RESULT], [TOOL])
    text = with_tools.decode(await with_tools.conversation(asked, 1000))
    assert text.startswith("TOOLS " + json.dumps(TOOL))
    assert '[assistant]  CALL weather {"city": "Paris"}' in text
    assert "[tool] 12" in text


@pytest.mark.parametrize(
    ("messages", "tools", "param"),
    [
        ([{"role": "user", "content": "Rain?"}], [TOOL], "tools"),
        ([CALLED], [], "messages"),
        ([RESULT], [], "messages"),
    ],
)
async def test_a_template_that_knows_no_tools_refuses_whatever_speaks_of_them(
    tokenizer: Tokenizer, messages: list[dict[str, object]], tools: list[dict[str, object]], param: str
) -> None:
    with pytest.raises(Refused, match="knows no tools") as refused:
        await tokenizer.conversation(Conversation(messages, tools), 1000)
    assert (refused.value.status, refused.value.param) == (400, param)


@pytest.fixture
def pythons_own_limit() -> Iterator[None]:
    """Of recursion, as a worker's process has it, whatever else was imported into this one."""
    here = sys.getrecursionlimit()
    sys.setrecursionlimit(1000)
    yield
    sys.setrecursionlimit(here)


@pytest.mark.usefixtures("pythons_own_limit")
async def test_whatever_a_template_trips_over_is_the_messages_fault(with_tools: Tokenizer) -> None:
    deep: dict[str, object] = {}
    for _ in range(5000):
        deep = {"a": deep}
    for tools in ([{**TOOL, "deep": deep}], [{**TOOL, "half": "\ud800"}]):
        with pytest.raises(Refused) as refused:
            await with_tools.conversation(Conversation([{"role": "user", "content": "x"}], tools), 1000)
        assert refused.value.status == 400


async def test_a_prompt_that_cannot_fit_is_refused_before_it_is_encoded(tokenizer: Tokenizer) -> None:
    text = "word and some, " * 600_000
    begun_s = time.process_time()
    with pytest.raises(Refused, match="at least") as refused:
        await tokenizer.text(text, 1024, "prompt")
    assert refused.value.code == "context_length_exceeded"
    assert time.process_time() - begun_s < 1  # encoding it takes ten


async def test_others_run_while_a_long_prompt_is_encoded(tokenizer: Tokenizer) -> None:
    encoding = asyncio.create_task(tokenizer.text("word and some, " * 40_000, 10**6, "prompt"))
    turns = 0
    while not encoding.done():
        await asyncio.sleep(0.001)
        turns += 1
    assert len(await encoding) > 100_000
    assert turns > 20
