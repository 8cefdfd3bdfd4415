import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from wris_lib.backbones import llm as module
from wris_lib.backbones.llm import LocalLlm, RemoteLlm, build_toy_t5, local_llm, toy_tokenizer
from wris_lib.errors import WrisError

Reply = Callable[["Server", str], tuple[int, object]]


class Server(ThreadingHTTPServer):
    """An endpoint on this machine that answers as a test wants it to."""

    def __init__(self, reply: Reply) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply, self.asked, self.at_once, self.most = reply, [], 0, 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = body["messages"][0]["content"]
        with self.server.lock:
            self.server.asked.append((time.monotonic(), self.path, self.headers["Authorization"], body))
            self.server.at_once += 1
            self.server.most = max(self.server.most, self.server.at_once)
        status, content = self.server.reply(self.server, prompt)
        with self.server.lock:
            self.server.at_once -= 1
        if isinstance(content, str) and status == 200:
            content = {"choices": [{"index": 0, "message": {"role": "assistant", "content": content}}]}
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        try:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            if status == 429:
                self.send_header("retry-after-ms", "10")
            self.end_headers()
            self.wfile.write(data)
        except BrokenPipeError:
            pass  # nobody waits any more

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def serve() -> Iterator[Callable[[Reply], Server]]:
    running = []

    def start(reply: Reply) -> Server:
        server = Server(reply)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        running.append(server)
        return server

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


def test_answers_come_in_order_from_several_requests_at_once(serve, monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret")

    def later_ones_first(server: Server, prompt: str) -> tuple[int, str]:
        time.sleep(0.3 - 0.05 * int(prompt))
        return 200, f"answer {prompt}"

    server = serve(later_ones_first)
    llm = RemoteLlm(server.url, "some-model", key="MY_KEY", concurrency=3)
    assert list(llm.answer([str(number) for number in range(6)])) == [f"answer {number}" for number in range(6)]
    assert server.most == 3
    _, path, authorization, body = server.asked[0]
    assert (path, authorization, body["model"]) == ("/v1/chat/completions", "Bearer secret", "some-model")
    assert body["temperature"] == 0


def test_requests_begin_no_faster_than_allowed(serve, monkeypatch):
    pauses = []
    clock = SimpleNamespace(monotonic=lambda: 5.0, sleep=pauses.append)  # it stands still
    monkeypatch.setattr("wris_lib.backbones.llm.time", clock)
    list(RemoteLlm(serve(lambda *_: (200, "yes")).url, "m", per_minute=30).answer(["?"] * 4))
    assert sorted(pauses) == [2, 4, 6]


def test_too_many_requests_are_repeated(serve):
    server = serve(lambda server, _: (429, {"error": {"message": "slowly"}}) if len(server.asked) < 3 else (200, "yes"))
    assert list(RemoteLlm(server.url, "m").answer(["?"])) == ["yes"]
    assert len(server.asked) == 3


@pytest.mark.parametrize("answer", [{"choices": []}, {"choices": [{"index": 0, "message": {"content": None}}]}])
def test_an_empty_answer_is_an_empty_text(serve, answer):
    assert list(RemoteLlm(serve(lambda *_: (200, answer)).url, "m").answer(["?"])) == [""]


@pytest.mark.parametrize(
    "status, content, message",
    [
        (401, {"error": {"message": "no"}}, "does not accept the key; set the environment variable OPENAI_API_KEY"),
        (404, {"error": {"message": "no"}}, "is not known there; check the model's name"),
        (429, {"error": {"message": "slowly"}}, "failed: .*slowly.*; try again later, or ask it more slowly"),
        (500, {"error": {"message": "broken"}}, "failed: .*broken.*; try again later"),
        (200, b"<html>", "did not answer as an endpoint of OpenAI's protocol does"),
    ],
)
def test_what_goes_wrong_there_is_said(serve, status, content, message):
    llm = RemoteLlm(serve(lambda *_: (status, content)).url, "m", retries=0)
    with pytest.raises(WrisError, match=message):
        list(llm.answer(["?"]))


def test_an_endpoint_that_is_too_slow(serve):
    def slow(*_: object) -> tuple[int, str]:
        time.sleep(0.5)
        return 200, "late"

    with pytest.raises(WrisError, match="did not answer in 0.1 seconds; allow it more"):
        list(RemoteLlm(serve(slow).url, "m", timeout=0.1, retries=0).answer(["?"]))


def test_an_endpoint_that_is_not_there():
    with pytest.raises(WrisError, match="cannot be reached; check that it runs"):
        list(RemoteLlm("http://127.0.0.1:9/v1", "m", retries=0).answer(["?"]))
    with pytest.raises(WrisError, match="'localhost:11434' is not an endpoint; expected one such as"):
        RemoteLlm("localhost:11434", "m")


# ------------------------------------------------------------------------------------------------ on this machine

MOST = 24  # tokens that a model writes here; one with random weights hardly ever stops by itself


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(module, "MAX_NEW_TOKENS", MOST)


def test_the_toy_tokenizer_reads_and_writes_lines():
    tokenizer = toy_tokenizer()
    ids = tokenizer("1. a dog\n2. the red dog").input_ids
    lines = tokenizer.decode(ids, skip_special_tokens=True).split("\n")
    assert [line.strip() for line in lines] == ["1. a dog", "2. the red dog"]
    assert tokenizer.unk_token_id not in ids and ids[-1] == tokenizer.eos_token_id
    assert tokenizer.unk_token_id in tokenizer("the zebra's").input_ids


def small_causal(template: str | None = None) -> LocalLlm:
    torch.manual_seed(0)
    tokenizer = toy_tokenizer()
    tokenizer.chat_template = template
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=256)
    return LocalLlm("small", GPT2LMHeadModel(config), tokenizer)


@pytest.mark.parametrize("causal", [True, False])
def test_answers_do_not_depend_on_what_else_is_asked(short, causal):
    torch.manual_seed(0)
    llm = small_causal() if causal else LocalLlm("toy", build_toy_t5(), toy_tokenizer())
    for parameter in llm.model.parameters():  # as they are first, a T5 says nothing
        nn.init.normal_(parameter)
    prompts = ["the dog", "the big red car next to the man in the green shirt", "a cat"]
    together = list(llm.answer(prompts))
    assert together == [next(llm.answer([prompt])) for prompt in prompts]
    assert any(together) and not any("<" in text for text in together)


def test_a_causal_model_answers_without_repeating_the_prompt(short):
    llm = small_causal()
    read = llm.tokenizer("the dog", return_tensors="pt").input_ids
    written = llm.model.generate(read, max_new_tokens=MOST, do_sample=False, pad_token_id=llm.tokenizer.pad_token_id)
    expected = llm.tokenizer.decode(written[0, read.shape[1] :], skip_special_tokens=True)
    assert next(llm.answer(["the dog"])) == expected


def test_a_chat_model_gets_its_own_template(short):
    template = "{% for m in messages %}the {{ m.content }} on the left{% endfor %}"
    chat, plain = small_causal(template), small_causal()
    tokens = plain.tokenizer("the dog on the left", add_special_tokens=False, return_tensors="pt").input_ids
    written = chat.model.generate(tokens, max_new_tokens=MOST, do_sample=False, pad_token_id=0)
    assert next(chat.answer(["dog"])) == chat.tokenizer.decode(written[0, tokens.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("causal", [True, False])
def test_a_folder_in_the_hub_s_format_is_loaded(short, tmp_path, causal):
    torch.manual_seed(0)
    llm = small_causal() if causal else LocalLlm("toy", build_toy_t5(), toy_tokenizer())
    llm.model.save_pretrained(tmp_path, safe_serialization=True)
    llm.tokenizer.save_pretrained(tmp_path)
    again = local_llm(str(tmp_path))
    assert again.causal is causal and again.follows_instructions
    assert next(again.answer(["the dog"])) == next(llm.answer(["the dog"]))
    assert again.name == str(tmp_path) and again.identity == local_llm(str(tmp_path)).identity
    os.utime(tmp_path / "model.safetensors", (0, 0))  # other weights have another time, if not another size
    assert again.identity != local_llm(str(tmp_path)).identity


def test_pickled_weights_are_not_opened(tmp_path):
    llm = small_causal()
    llm.model.save_pretrained(tmp_path, safe_serialization=False)
    llm.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(WrisError, match="cannot be loaded from this machine; get it with"):
        local_llm(str(tmp_path))


def test_a_transformers_that_would_open_pickles_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.__version__", "4.26.1")
    with pytest.raises(WrisError, match="transformers 4.26.1 cannot be told to leave pickled weights alone; for"):
        local_llm(str(tmp_path))


def test_nothing_is_downloaded():
    with pytest.raises(WrisError, match="huggingface-cli download nobody/nothing"):
        local_llm("nobody/nothing")
