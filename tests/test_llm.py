"""``nybble.LLM``: the engine's own results, without a server."""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from tokenizers.processors import TemplateProcessing

import nybble
from nybble import LLM, Completion, SamplingParams
from nybble.engine import (
    AdapterUnavailableError,
    Engine,
    EngineConfig,
    EngineStoppedError,
    ParameterError,
    Request,
    RequestOutput,
)
from nybble.engine.memory import gib
from nybble.kernels.cpu.library import library
from nybble.loaders import AdapterError, ModelNotFoundError, open_checkpoint
from nybble.loaders.footprint import weight_bytes
from nybble.quantizers import packed_cache, prepare, quantize_checkpoint
from nybble.server.lifecycle.launch import load_engine
from nybble.server.lifecycle.options import (
    AdapterOptions,
    MemoryOptions,
    ModelOptions,
    ServeOptions,
)
from nybble.server.lifecycle.startup import Startup

SMALL: dict[str, Any] = {
    "device": "cpu",
    "kv_cache_bytes": 4 << 20,
    "max_num_seqs": 4,
    "progress": False,
}
GREEDY = SamplingParams(max_tokens=6, temperature=0, logprobs=2)
PROMPTS = ["the quick brown", "def add(", [5, 6, 7], "日本"]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def llm(tiny_model: Callable[..., Path]) -> Iterator[LLM]:
    with LLM(tiny_model(), enable_lora=True, max_loras=2, max_lora_rank=8, **SMALL) as llm:
        yield llm


@pytest.fixture
def unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No model has been packed, whatever earlier tests did, and packing one fails."""

    def packed(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a model was packed")

    monkeypatch.setattr(packed_cache, "packed_folder", lambda: tmp_path / "packed")
    monkeypatch.setattr(prepare, "save_packed", packed)


def by_the_engine(
    folder: Path, prompts: list[list[int]], params: SamplingParams, adapter: Path | None = None
) -> list[list[RequestOutput]]:
    """What an engine with the same settings says to one prompt after the other."""
    from nybble.engine import AdapterConfig

    config = EngineConfig(kv_cache_bytes=4 << 20, adapters=AdapterConfig(2, 8))
    engine = Engine.load(open_checkpoint(folder), config, progress=False)
    engine.start()
    if adapter is not None:
        engine.load_adapter("it", str(adapter))

    async def ask(prompt: list[int]) -> list[RequestOutput]:
        name = None if adapter is None else "it"
        request = Request(repr(prompt), tuple(prompt), params, adapter=name)
        return [output async for output in engine.generate(request)]

    async def ask_all() -> list[list[RequestOutput]]:
        return [await ask(prompt) for prompt in prompts]

    try:
        return asyncio.run(ask_all())
    finally:
        engine.stop()


def assert_same(found: list[Completion], expected: list[list[RequestOutput]]) -> None:
    assert len(found) == len(expected)
    for completion, outputs in zip(found, expected, strict=True):
        assert completion.text == "".join(output.text for output in outputs)
        assert completion.token_ids == tuple(t for output in outputs for t in output.token_ids)
        assert completion.finish_reason == outputs[-1].finish_reason
        assert completion.logprobs == tuple(one for output in outputs for one in output.logprobs)


def test_a_batch_gets_what_the_engine_says_to_each_prompt_alone(
    llm: LLM, tiny_model: Callable[..., Path]
) -> None:
    found = llm.generate(PROMPTS, GREEDY)
    prompts = [list(completion.prompt_token_ids) for completion in found]
    assert prompts[2] == [5, 6, 7]
    assert prompts[0] == llm.tokenizer(PROMPTS[0])["input_ids"]
    assert all(len(completion.logprobs) == 6 for completion in found)
    assert_same(found, by_the_engine(tiny_model(), prompts, GREEDY))


def test_more_prompts_than_the_engine_takes_at_once_keep_their_order(llm: LLM) -> None:
    prompts = [[3 + n, 4 + n] for n in range(20)]  # at most eight are in flight
    alone = [llm.generate(prompt, GREEDY)[0] for prompt in prompts]
    assert llm.generate(prompts, GREEDY) == alone


def test_an_adapter_is_asked_for_by_its_folder_for_all_prompts_or_for_one(
    llm: LLM, tiny_model: Callable[..., Path], tiny_adapter: Callable[..., Path]
) -> None:
    adapter = tiny_adapter(seed=1)
    prompts = [[5, 6, 7], [8, 9]]
    expected = by_the_engine(tiny_model(), prompts, GREEDY, adapter)
    base = llm.generate(prompts, GREEDY)
    found = llm.generate(prompts, GREEDY, adapter=adapter)
    assert_same(found, expected)
    assert found != base
    assert llm.generate(prompts, GREEDY, adapter=[str(adapter), None]) == [found[0], base[1]]


def test_an_adapter_whose_files_have_changed_is_read_again(
    llm: LLM, tiny_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    """As of a checkpoint that training writes over the last one."""
    folder = tmp_path / "adapter"
    found = []
    for seed in (1, 2):
        shutil.copytree(tiny_adapter(seed=seed), folder, dirs_exist_ok=True)
        found.append(llm.generate([[5, 6, 7]], GREEDY, adapter=folder))
        assert found[-1] == llm.generate([[5, 6, 7]], GREEDY, adapter=tiny_adapter(seed=seed))
    assert found[0] != found[1]


def test_an_adapters_settings_that_have_changed_are_read_again(
    llm: LLM, tiny_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_adapter(seed=1), tmp_path / "adapter"))
    template, generation = folder / "chat_template.jinja", folder / "generation_config.json"

    def prompt() -> str:
        (found,) = llm.chat([{"role": "user", "content": "hi"}], GREEDY, adapter=folder)
        return str(llm.tokenizer.decode(found.prompt_token_ids))

    before = prompt()
    template.write_text("{{ messages[0]['content'] }}:")
    assert prompt() == "hi:"
    generation.write_text('{"do_sample": true, "temperature": 0.25}')
    assert prompt() == "hi:"
    assert llm._default_params(str(folder)).temperature == 0.25
    template.unlink()
    assert prompt() == before


def test_an_adapter_that_is_no_longer_what_was_read_is_read_again_by_the_next_call(
    llm: LLM,
    tiny_model: Callable[..., Path],
    tiny_adapter: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """Not even the time of its files tells; memory has room for one adapter."""
    folder = Path(shutil.copytree(tiny_adapter(seed=1), tmp_path / "adapter"))
    llm.generate([[5, 6, 7]], GREEDY, adapter=folder)
    info = llm._engine.adapter(str(folder))
    assert info is not None
    options = {"enable_lora": True, "max_loras": 1, "max_lora_rank": 8}
    with LLM(tiny_model(), lora_host_bytes=info.nbytes, **options, **SMALL) as small:
        before = small.generate([[5, 6, 7]], GREEDY, adapter=folder)
        small.generate([[5, 6, 7]], GREEDY, adapter=tiny_adapter(seed=2))
        file = folder / "adapter_config.json"
        times = file.stat().st_atime_ns, file.stat().st_mtime_ns
        file.write_text(file.read_text().replace('"lora_alpha": 8', '"lora_alpha": 1'))
        os.utime(file, ns=times)
        with pytest.raises(AdapterUnavailableError, match="has changed since"):
            small.generate([[5, 6, 7]], GREEDY, adapter=folder)
        found = small.generate([[5, 6, 7]], GREEDY, adapter=folder)
    assert found == llm.generate([[5, 6, 7]], GREEDY, adapter=folder.rename(tmp_path / "b"))
    assert found != before


def test_every_prompt_may_have_parameters_of_its_own(llm: LLM) -> None:
    lengths = [1, 4, 2]
    params = [SamplingParams(max_tokens=n, temperature=0, ignore_eos=True) for n in lengths]
    found = llm.generate([[5, 6]] * 3, params)
    assert [len(completion.token_ids) for completion in found] == lengths
    assert [completion.finish_reason for completion in found] == ["length"] * 3


def test_a_single_prompt_is_a_list_of_one_and_none_are_none(llm: LLM) -> None:
    (text,) = llm.generate("hello", GREEDY)
    (ids,) = llm.generate(list(text.prompt_token_ids), GREEDY)
    assert text == ids
    assert llm.generate([], GREEDY) == []
    assert llm.chat([], GREEDY) == []


def test_a_prompts_own_log_probabilities(llm: LLM) -> None:
    params = SamplingParams(max_tokens=0, prompt_logprobs=0)
    (found,) = llm.generate([[5, 6, 7]], params)
    assert found.token_ids == ()
    assert found.prompt_logprobs is not None
    assert len(found.prompt_logprobs.logprobs) == 2


def test_chat_is_the_models_template(llm: LLM) -> None:
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "hello"}]},
    ]
    text = (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    )
    expected = llm.tokenizer(text, add_special_tokens=False)["input_ids"]
    (found,) = llm.chat(messages, GREEDY)
    assert list(found.prompt_token_ids) == expected
    assert llm.chat([messages, messages], GREEDY) == [found, found]
    assert llm.generate(expected, GREEDY) == [found]


def test_a_marker_that_a_message_spells_is_text_as_it_is_behind_the_server(llm: LLM) -> None:
    (found,) = llm.chat([{"role": "user", "content": "a<|im_end|>b"}], GREEDY)
    markers = llm.tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    written = [token for token in found.prompt_token_ids if token in markers]
    assert len(written) == 3  # the turn's two and the assistant's first, which the template writes
    assert "a<|im_end|>b" in llm.tokenizer.decode(found.prompt_token_ids)


def test_a_template_that_reads_parts_gets_parts_and_one_that_drops_a_text_is_refused(
    llm: LLM,
) -> None:
    before = llm.tokenizer.chat_template
    message = [{"role": "user", "content": "hello"}]
    try:
        llm.tokenizer.chat_template = (
            "{% for m in messages %}{% if m.content is not string %}"
            "{% for part in m.content %}<{{ part.text }}>{% endfor %}{% endif %}{% endfor %}"
        )
        (found,) = llm.chat(message, GREEDY)
        assert llm.tokenizer.decode(found.prompt_token_ids) == "<hello>"
        llm.tokenizer.chat_template = "{{ messages | length }} messages"
        with pytest.raises(ParameterError, match=r"the text of message 0 \(of role user\) is not"):
            llm.chat(message, GREEDY)
    finally:
        llm.tokenizer.chat_template = before


def test_tools_and_calls_are_in_the_form_that_the_template_takes(llm: LLM) -> None:
    """In the system's message, and with short ids, as behind the server."""
    before = llm.tokenizer.chat_template
    function = {"name": "look", "arguments": "{}"}
    call = {"id": "call_0123456789", "type": "function", "function": function}
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "tool_calls": [call]}]
    tools = [{"type": "function", "function": {"name": "look"}}]
    try:
        llm.tokenizer.chat_template = (
            "{% for m in messages %}{{ m.role }}:{{ m.content }}{{ m.tools }}"
            "{% for c in m.tool_calls or [] %}[TOOL_CALLS]{{ c.id }}{% endfor %};{% endfor %}"
        )
        (found,) = llm.chat(messages, GREEDY, tools=tools)
        assert llm.tokenizer.decode(found.prompt_token_ids) == (
            'system:[{"name": "look"}];user:hi;assistant:[TOOL_CALLS]123456789;'
        )
    finally:
        llm.tokenizer.chat_template = before


def test_a_text_that_begins_with_bos_gets_no_second(tiny_model: Callable[..., Path]) -> None:
    with LLM(tiny_model(), **SMALL) as llm:
        bos = llm.tokenizer.convert_tokens_to_ids("<|endoftext|>")
        llm.tokenizer.bos_token = "<|endoftext|>"
        llm.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", bos)]
        )
        once, added = llm.generate(["<|endoftext|>the dog", "the dog"], GREEDY)
        assert once.prompt_token_ids == added.prompt_token_ids
        assert once.prompt_token_ids.count(bos) == 1


def test_the_models_recommendation_is_the_default(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model(), folder)
    recommended = {"do_sample": True, "temperature": 0.5, "top_k": 3}
    (folder / "generation_config.json").write_text(json.dumps(recommended))
    with LLM(folder, max_model_len=16, **SMALL) as llm:
        assert llm.default_params == SamplingParams(temperature=0.5, top_k=3)
        assert llm.max_model_len == 16
        (found,) = llm.generate([[5, 6]])
        assert found.finish_reason == "stop" or len(found.token_ids) == 14


def test_a_model_with_sentencepieces_file_alone_answers(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

    folder = tmp_path / "model"
    shutil.copytree(tiny_model(), folder)
    (folder / "tokenizer.json").unlink()
    SentencePieceTrainer.train(
        sentence_iterator=iter(["the quick brown fox jumps over the lazy dog"] * 9),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=300,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (folder / "tokenizer_config.json").write_text('{"legacy": true}')
    with LLM(folder, **SMALL) as llm:
        (found,) = llm.generate(["the dog 🙂"], GREEDY)
    original = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    assert list(found.prompt_token_ids[-7:]) == original.encode("the dog 🙂")[-7:]
    assert len(found.token_ids) == 6
    assert found.text


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[5], [5, 99999]], {}, "prompt 1: token id 99999 is outside the vocabulary"),
        ([[]], {}, "prompt is empty"),
        ([[5], ["a", 3]], {}, r"prompt 1 is \['a', 3\], expected text or a list of token ids"),
        (["a", "b\ud800"], {}, "prompt 1 is not valid text: .* surrogates not allowed"),
        ([[5], [6]], {"params": [GREEDY]}, "params has 1 entries for 2 prompts"),
        ([[5]], {"params": SamplingParams(max_tokens=10**6)}, "asks for 1000000 more"),
    ],
    ids=ascii,
)
def test_a_prompt_that_cannot_be_served_is_named(
    llm: LLM, prompts: list[Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ParameterError, match=message):
        llm.generate(prompts, **({"params": GREEDY} | options))
    assert len(llm.generate([[5]], GREEDY)) == 1


def test_what_is_of_another_type_is_named(llm: LLM) -> None:
    wrong: Any
    for wrong in (None, 5):
        with pytest.raises(ParameterError, match=f"prompts is {wrong}, expected texts or lists"):
            llm.generate(wrong)
    for wrong in ({"max_tokens": 2}, [{"max_tokens": 2}]):
        with pytest.raises(ParameterError, match="in params, expected SamplingParams"):
            llm.generate(["a"], wrong)
    for wrong, message in (
        ("hi", "messages is 'hi', expected a list"),
        (None, "messages is None, expected a list"),
        (["hi"], "'hi' in messages, expected a list"),
        ([["hi"]], "'hi' in messages, expected a dict"),
    ):
        with pytest.raises(ParameterError, match=message):
            llm.chat(wrong)


def test_messages_that_cannot_be_rendered_are_refused(llm: LLM) -> None:
    for messages, message in (
        ([{"role": "pirate", "content": "arr"}], "unknown role pirate"),
        ([{"content": "x"}], "needs a role"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "expected text"),
        ([{"role": "user", "content": "a\ud800"}], "message 0 is not valid text"),
        ([{"role": "assistant", "tool_calls": [{"name": "f"}]}], "a tool call is .* a function"),
        ([{"role": "assistant", "tool_calls": "abc"}], "a tool call is 'a', expected a function"),
    ):
        with pytest.raises(ParameterError, match=message):
            llm.chat(messages, GREEDY)
    template, llm.tokenizer.chat_template = llm.tokenizer.chat_template, None
    try:
        with pytest.raises(ParameterError, match="no chat template"):
            llm.chat([{"role": "user", "content": "x"}], GREEDY)
    finally:
        llm.tokenizer.chat_template = template


def test_an_adapter_that_cannot_be_had_is_named(
    llm: LLM, tiny_model: Callable[..., Path], tiny_adapter: Callable[..., Path]
) -> None:
    wide = tiny_adapter(r=16)
    with pytest.raises(AdapterError, match=r"up to rank 8: raise max_lora_rank$"):
        llm.generate("x", adapter=wide)
    with pytest.raises(ValueError, match=r"^max_lora_rank is 0, expected at least 1$"):
        LLM("demo", enable_lora=True, max_lora_rank=0)
    with pytest.raises(AdapterError, match="no-such-adapter"):
        llm.generate([[5]], GREEDY, adapter="no-such-adapter")
    with (
        LLM(tiny_model(), **SMALL) as plain,
        pytest.raises(ParameterError, match="enable_lora=True"),
    ):
        plain.generate([[5]], GREEDY, adapter=tiny_adapter())


def test_a_model_that_cannot_be_had_is_named() -> None:
    with pytest.raises(ModelNotFoundError, match="no-such-model"):
        LLM("no-such-model", **SMALL)


def test_a_running_event_loop_is_no_hindrance(llm: LLM) -> None:
    async def notebook() -> list[Completion]:
        return llm.generate([[5, 6]], GREEDY)

    assert asyncio.run(notebook()) == llm.generate([[5, 6]], GREEDY)


@pytest.mark.slow
def test_several_ranks_say_the_same_one_model_at_a_time(tiny_model: Callable[..., Path]) -> None:
    said = []
    prompts = [list(range(3, 20)), list(range(5, 9))]
    params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    for ranks in (1, 2, 2):
        options = {"device": "cpu", "progress": False, "tensor_parallel_size": ranks}
        with LLM(tiny_model(), **options) as llm:
            said.append([each.token_ids for each in llm.generate(prompts, params)])
            if ranks > 1:
                with pytest.raises(ValueError, match="for another model of this process"):
                    LLM(tiny_model(), **options)
    assert said[0] == said[1] == said[2]


def test_closing_ends_who_waits_and_refuses_who_comes(tiny_model: Callable[..., Path]) -> None:
    before = set(threading.enumerate())
    llm = LLM(tiny_model(), **SMALL)
    own = {each for each in set(threading.enumerate()) - before if each.name.startswith("nybble")}
    assert len(own) >= 2  # the engine's and the event loop's
    failures: list[Exception] = []

    def wait() -> None:
        endless = SamplingParams(temperature=0, ignore_eos=True)
        try:
            llm.generate([[5]] * 20, endless)
        except Exception as error:
            failures.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    llm.close()
    waiting.join(30)
    assert not waiting.is_alive()
    assert [type(failure) for failure in failures] == [EngineStoppedError]
    with pytest.raises(EngineStoppedError, match="closed"):
        llm.generate([[5]], GREEDY)
    llm.close()
    for thread in own:
        thread.join(10)
        assert not thread.is_alive()


def run_python(code: str) -> None:
    subprocess.run([sys.executable, "-P", "-c", code], check=True)


def test_importing_nybble_loads_nothing_heavy() -> None:
    run_python(
        "import sys, nybble\n"
        "assert not {'torch', 'transformers', 'numpy', 'aiohttp'} & sys.modules.keys()\n"
        "assert 'LLM' in dir(nybble)\n"
    )


def test_a_draft_model_changes_no_output(llm: LLM, tiny_model: Callable[..., Path]) -> None:
    draft = tiny_model(seed=1)
    with LLM(tiny_model(), draft_model=draft, speculate="draft", **SMALL) as drafting:
        assert drafting.generate(PROMPTS, GREEDY) == llm.generate(PROMPTS, GREEDY)
        assert drafting._engine.draft_method == "draft"
        assert drafting._engine.stats().draft_tokens > 0
    with LLM(tiny_model(), draft_model=draft, draft_quantize="nf4", **SMALL) as drafting:
        assert drafting.generate(PROMPTS, GREEDY) == llm.generate(PROMPTS, GREEDY)


@pytest.mark.usefixtures("unpacked")
def test_a_draft_model_that_does_not_fit_is_refused_before_the_model_is_packed(
    tiny_model: Callable[..., Path],
) -> None:
    options = {"quantize": "nf4", "draft_model": tiny_model(family="lfm2", layers=3)}
    with pytest.raises(ValueError, match=r"the draft model .* cannot be taken back"):
        LLM(tiny_model(), **SMALL | options)


@pytest.mark.usefixtures("unpacked")
@pytest.mark.parametrize(
    ("size", "options", "said"),
    [
        (3, {}, r"is 3, which does not divide the model's 4 attention heads .*these do: 2, 4"),
        (3, {"draft_quantize": "nf4"}, "is 3, which does not divide the model's 4 attention"),
    ],
)
def test_ranks_that_cannot_be_are_refused_before_any_model_is_packed(
    tiny_model: Callable[..., Path],
    size: int,
    options: dict[str, Any],
    said: str,
) -> None:
    if options:
        options = options | {"draft_model": tiny_model(seed=1)}
    with pytest.raises(ValueError, match=f"tensor_parallel_size {said}"):
        LLM(tiny_model(), quantize="nf4", tensor_parallel_size=size, **SMALL | options)


@pytest.mark.usefixtures("unpacked")
@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_weights_that_a_gpu_cannot_hold_are_refused_before_they_are_packed(
    tiny_model: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    quantize: Literal["nf4"] | None,
) -> None:
    folder = tiny_model()
    if quantize is None:
        quantize_checkpoint(folder, tmp_path / "gptq", format="gptq", progress=False)
        folder = tmp_path / "gptq"
    need = weight_bytes(folder, torch.bfloat16, layers="4bit" if quantize else None)

    monkeypatch.setattr("nybble.llm.resolve_device", torch.device)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, need))
    own: dict[str, Any] = {"quantize": quantize, "head": "16bit"}
    options = SMALL | {"device": "cuda"} | own
    ways = lambda: LLM(folder, **options), lambda: served(folder, "cuda", **own)
    for load in ways:
        free = need - 4096
        with pytest.raises(ValueError, match=rf"take {gib(need)}, {gib(4096)} more than the"):
            load()
        free = need
        with pytest.raises(AssertionError, match="was packed"):
            load()


@pytest.mark.usefixtures("unpacked")
@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_a_draft_model_that_a_gpu_cannot_hold_is_refused_before_anything_is_packed(
    tiny_model: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    quantize: Literal["nf4"] | None,
) -> None:
    folder, draft = tiny_model(), tiny_model(seed=1)
    need = weight_bytes(folder, torch.bfloat16, layers="4bit")
    need += weight_bytes(draft, torch.bfloat16, layers="4bit" if quantize else None)
    monkeypatch.setattr("nybble.llm.resolve_device", torch.device)
    monkeypatch.setattr("nybble.engine.draft_model.resolve_device", torch.device)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, need))
    options = {"draft_model": str(draft), "draft_quantize": quantize}
    options |= {"quantize": "nf4", "head": "16bit"}
    ways = (
        lambda: LLM(folder, **SMALL | options | {"device": "cuda"}),  # type: ignore[arg-type]
        lambda: served(folder, "cuda", speculate="draft", **options),  # type: ignore[arg-type]
    )
    for load in ways:
        free = need - 4096
        with pytest.raises(ValueError, match=rf"take {gib(need)}, {gib(4096)} more than the"):
            load()
        free = need
        with pytest.raises(AssertionError, match="was packed"):
            load()


@pytest.mark.usefixtures("unpacked")
def test_a_kv_cache_that_does_not_fit_is_refused_before_the_model_is_packed(
    tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nybble.engine.memory.available_bytes", lambda device: free)
    folder = tiny_model()
    ways = (
        lambda: LLM(folder, **SMALL | {"device": "cpu", "quantize": "nf4"}),
        lambda: served(folder, "cpu", quantize="nf4"),
    )
    for load in ways:
        free = 1 << 16
        with pytest.raises(ValueError, match=r"the KV cache of .* does not fit: 0.1 MiB are free"):
            load()
        free = 1 << 40
        with pytest.raises(AssertionError, match="was packed"):
            load()


def served(folder: Path, device: str, *, speculate: str = "off", **options: Any) -> None:
    """The model as ``nybble serve`` loads it."""
    config = EngineConfig(device=device, kv_cache_bytes=1 << 20, speculate=speculate)  # type: ignore[arg-type]
    own = ModelOptions(model=str(folder), **options)
    load_engine(ServeOptions(model=own), config, {}, Startup(bars=False))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'LLMs'"):
        nybble.LLMs  # noqa: B018


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"speculate": "maybe"},
            "speculate is 'maybe', expected one of off, ngram, draft, mtp, auto",
        ),
        ({"kv_cache_dtype": "int4"}, "kv_cache_dtype is 'int4', expected one of auto, int8, fp8"),
        ({"dtype": "float8"}, "dtype is 'float8', expected one of auto, bfloat16"),
        ({"quantize": "awq"}, "quantize is 'awq', expected one of None, nf4"),
        ({"tensor_parallel_size": "2"}, "tensor_parallel_size is '2', expected a whole number"),
        ({"max_num_seqs": "4"}, "max_num_seqs is '4', expected a whole number"),
        ({"max_model_len": 0}, "max_model_len is 0, expected at least 1"),
        ({"enable_lora": True, "max_loras": "8"}, "max_loras is '8', expected a whole number"),
        ({"enable_lora": True, "lora_host_bytes": 0}, "lora_host_bytes is 0, expected at least 1"),
        ({"enable_lora": True, "lora_device_bytes": 0}, "lora_device_bytes is 0, expected at"),
        ({"lora_own_settings": "no"}, "lora_own_settings is 'no', expected True or False"),
        ({"enable_lora": 1}, "enable_lora is 1, expected True or False"),
        ({"threads": 0}, "threads is 0, expected at least 1"),
        ({"threads": "2"}, "threads is '2', expected a whole number"),
        ({"max_batched_tokens": 2}, "max_batched_tokens 2 is below max_num_seqs 4"),
        ({"max_batched_tokens": 0}, "max_batched_tokens is 0, expected at least 1"),
        ({"chat_template": "own.jinja"}, "chat_template is 'own.jinja': for a file, give its Path"),
    ],
)
def test_options_with_wrong_values_are_named_before_a_model_is_read(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        LLM("no-such-model", **SMALL | options)


def test_unknown_options_are_refused_by_name_with_what_to_use_instead() -> None:
    wrong: dict[str, Any]
    for wrong, says in (
        (
            {"gpu_memory_utilization": 0.9},
            "LLM has no 'gpu_memory_utilization': use kv_cache_bytes",
        ),
        ({"trust_remote_code": True}, "LLM has no 'trust_remote_code': code in a model's folder"),
        ({"max_lora": 3}, r"LLM has no 'max_lora': did you mean max_loras\?"),
        ({"zzz": 3}, r"LLM has no 'zzz'\. It has: model, "),
    ):
        with pytest.raises(TypeError, match=says):
            LLM("no-such-model", **wrong)


def test_every_option_of_the_server_about_the_model_is_an_option_here_or_named() -> None:
    """So that a new flag is not forgotten."""
    own = set(inspect.signature(LLM).parameters)
    flags = {
        each.name
        for kind in (ModelOptions, MemoryOptions, AdapterOptions)
        for each in dataclasses.fields(kind)
    }
    # What only a server has: names, tenants' queues, embeddings, and adapters by name.
    servers = {"max_waiting", "max_queue_seconds", "matryoshka", "lora_root"}
    servers |= {"lora_state", "lora_watch", "lora_source", "lora_registry", "lora_cache_dir"}
    servers |= {"lora_cache_size", "lora_refresh_seconds"}
    for name in flags - own - servers:
        with pytest.raises(TypeError, match=f"LLM has no {name!r}: "):
            LLM("no-such-model", **{name: 1})


@pytest.mark.slow
def test_threads_are_those_of_the_kernels(tiny_model: Callable[..., Path]) -> None:
    program = (
        "import torch; from nybble import LLM; "
        f"llm = LLM({str(tiny_model())!r}, progress=False, kv_cache_bytes=1 << 20, threads=3); "
        "runner, counts = llm._engine._runner, []; run = runner.run; "
        "runner.run = lambda batch: counts.append(torch.get_num_threads()) or run(batch); "
        "llm.generate('x'); print(sorted(set(counts)), torch.get_num_threads())"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120
    )
    assert result.stdout.split("\n")[0] == "[3] 3", result.stderr


def test_a_chat_template_of_ones_own(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    file = tmp_path / "own.jinja"
    file.write_text("{{ messages[0].content }}!")
    message = [{"role": "user", "content": "hello"}]
    for template in (file, file.read_text()):
        with LLM(tiny_model(), chat_template=template, **SMALL) as llm:
            (found,) = llm.chat(message, GREEDY)
            assert llm.tokenizer.decode(found.prompt_token_ids) == "hello!"


def test_an_adapters_own_settings_can_be_left_alone(
    tiny_model: Callable[..., Path], tiny_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_adapter(), tmp_path / "adapter"))
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}:")
    options = {"enable_lora": True, "lora_own_settings": False, "lora_host_bytes": 1 << 20}
    with LLM(tiny_model(), **options, **SMALL) as llm:
        (found,) = llm.chat([{"role": "user", "content": "hi"}], GREEDY, adapter=folder)
        assert llm.tokenizer.decode(found.prompt_token_ids).startswith("<|im_start|>user")


def test_several_answers_to_a_prompt_are_beside_its_first(llm: LLM) -> None:
    params = [SamplingParams(max_tokens=4, seed=3, n=n, temperature=2) for n in (1, 3)]
    one, three = llm.generate([[5, 6, 7]] * 2, params)
    assert (one.others, len(three.others)) == ((), 2)
    assert replace(three, others=()) == one
    seeds = [SamplingParams(max_tokens=4, seed=3 + i, temperature=2) for i in range(3)]
    assert [one, *three.others] == llm.generate([[5, 6, 7]] * 3, seeds)
    with pytest.raises(ParameterError, match="prompt 1: token id 99999 is outside"):
        llm.generate([[5], [99999]], SamplingParams(n=2))


def test_a_chat_with_an_adapter_is_in_the_adapters_own_template(
    tiny_model: Callable[..., Path], tiny_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_adapter(), tmp_path / "adapter"))
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}:")
    settings = {"do_sample": True, "temperature": 0.25, "eos_token_id": [2, 300]}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    messages = [{"role": "user", "content": "hi"}]
    with LLM(tiny_model(), enable_lora=True, max_loras=1, **SMALL) as llm:
        own, base = (
            llm.chat([messages], SamplingParams(max_tokens=1), adapter=adapter)[0]
            for adapter in (folder, None)
        )
        assert llm.tokenizer.decode(own.prompt_token_ids) == "hi:"
        assert llm.tokenizer.decode(base.prompt_token_ids).startswith("<|im_start|>user")
        assert llm._default_params(str(folder)).temperature == 0.25


def test_with_activations_in_8_bits_a_request_answers_alike_in_any_company(
    tiny_model: Callable[..., Path],
) -> None:
    """``activations="int8"`` reaches the kernels, and refuses what they do not compute."""
    if library() is None:
        pytest.skip("needs the C++ kernels")
    options: dict[str, Any] = {**SMALL, "quantize": "nf4", "head": "int8"}
    with LLM(tiny_model(), activations="int8", **options) as llm:
        assert llm._engine._runner.decoder.backend._bits == 8  # type: ignore[attr-defined]
        alone = [llm.generate(prompt, GREEDY) for prompt in PROMPTS]
        assert [[one] for one in llm.generate(PROMPTS, GREEDY)] == alone
    with pytest.raises(ValueError, match=r"activations are int8: .* the dtype float32"):
        LLM(tiny_model(), activations="int8", dtype="float32", **options)


@pytest.mark.slow
def test_a_program_that_ends_while_it_generates_ends_the_engine_first(
    tiny_model: Callable[..., Path],
) -> None:
    """Python would end the engine's thread while it computes, which may abort the program."""
    program = (
        "import atexit, sys, threading, time; "
        "atexit.register(lambda: print([thread.name for thread in threading.enumerate()])); "
        "from nybble import LLM, SamplingParams; "
        f"llm = LLM({str(tiny_model())!r}, progress=False, kv_cache_bytes=1 << 20); "
        "params = SamplingParams(max_tokens=3000, ignore_eos=True); "
        "ask = lambda: [llm.generate(['x'], params) for _ in range(100)]; "
        "threading.Thread(target=ask, daemon=True).start(); time.sleep(0.5); sys.exit(3)"
    )
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 3, result.stderr
    assert "engine" not in result.stdout, result.stdout


def test_a_program_may_end_without_closing_what_it_made(tiny_model: Callable[..., Path]) -> None:
    program = (
        "from nybble import LLM, SamplingParams; "
        f"llm = LLM({str(tiny_model())!r}, progress=False, kv_cache_bytes=1 << 20); "
        "llm.chat([{'role': 'user', 'content': 'hi'}], SamplingParams(max_tokens=2)); "
        "print(llm._templates._short._process.pid)"
    )
    command = [sys.executable, "-W", "ignore", "-c", program]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stderr) == (0, "")
    assert not Path(f"/proc/{int(result.stdout)}").exists()


def test_one_stop_string_is_not_its_letters() -> None:
    assert SamplingParams(stop="turn").stop == ("turn",)
    with pytest.raises(ValueError, match="stop is"):
        SamplingParams(stop="")
