"""Language models that take sentences apart: the toy one, any that transformers can load, any behind an endpoint.

All have one small interface, `Llm`. What to ask, and what to make of the answer, is the caller's business.
"""

import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol, runtime_checkable
from urllib.parse import urlsplit

import torch

from wris_lib.backbones.checkpoints import Checkpoint, expected_sha256, get_stack
from wris_lib.backbones.loading import load_weights
from wris_lib.data.toyworld import wording
from wris_lib.errors import WrisError

MAX_NEW_TOKENS = 120
BATCH = 32
LINE, PAD, END, UNKNOWN = "<line>", "<pad>", "</s>", "<unk>"


@runtime_checkable
class Llm(Protocol):
    """Something that answers.

    Its answers are kept by its name, or, where it has one, by its `identity`: a text that also changes with what the
    name does not say, such as new weights.

    Attributes:
        name: for people.
        follows_instructions: False: it was trained for one task, and reads the bare question.
    """

    name: str
    follows_instructions: bool

    def answer(self, prompts: Sequence[str]) -> Iterator[str]:
        """One answer for each prompt, in order, as they come.

        Raises:
            WrisError: the model cannot be reached, or does not answer.
        """


class LocalLlm:
    """A model of transformers on this machine, sequence to sequence (T5) or causal (chat models), decoded greedily.

    Args:
        name: for people.
        model: it.
        tokenizer: its.
        follows_instructions: see `Llm`.
        identity: see `Llm`; None: the name.
    """

    def __init__(
        self,
        name: str,
        model: "transformers.PreTrainedModel",
        tokenizer: "transformers.PreTrainedTokenizerBase",
        follows_instructions: bool = True,
        identity: str | None = None,
    ) -> None:
        self.name, self.model, self.tokenizer = name, model.eval(), tokenizer
        self.identity = identity or name
        self.follows_instructions = follows_instructions
        self.causal = not model.config.is_encoder_decoder
        tokenizer.padding_side = "left" if self.causal else "right"  # a causal model goes on where the prompt ends
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

    def answer(self, prompts: Sequence[str]) -> Iterator[str]:
        for first in range(0, len(prompts), BATCH):
            yield from self._answer(list(prompts[first : first + BATCH]))

    @torch.no_grad()
    def _answer(self, prompts: list[str]) -> list[str]:
        template = self.causal and getattr(self.tokenizer, "chat_template", None)
        if template:
            chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
            prompts = self.tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
        encoded = self.tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=not template)
        encoded = encoded.to(self.model.device)
        tokens = self.model.generate(
            encoded.input_ids,
            attention_mask=encoded.attention_mask,
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=False,
            num_beams=1,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        if self.causal:
            tokens = tokens[:, encoded.input_ids.shape[1] :]
        return self.tokenizer.batch_decode(tokens, skip_special_tokens=True)


def load_llm(stack: str | None = None) -> LocalLlm:
    """The stack's language model.

    Args:
        stack: "toy" or "paper"; None: the default stack.

    Raises:
        WrisError: no such stack; its model is not on this machine, damaged, or another one.
    """
    llm = get_stack(stack).llm
    return _load_toy(llm) if isinstance(llm, Checkpoint) else local_llm(llm)


def local_llm(name: str) -> LocalLlm:
    """Any instruction-tuned model of transformers that is on this machine.

    Args:
        name: on the Hugging Face hub, such as "google/flan-t5-base"; or a folder.

    Raises:
        WrisError: it is not on this machine, or transformers cannot load it, or is too old. Nothing is downloaded here.
    """
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer
    from transformers.utils import cached_file

    if tuple(map(int, transformers.__version__.split(".")[:2])) < (4, 27):
        raise WrisError(
            f"transformers {transformers.__version__} cannot be told to leave pickled weights alone; for language"
            " models of your own use the environment of `make setup`, or an endpoint."
        )
    try:
        config = AutoConfig.from_pretrained(name, local_files_only=True)
        kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        # Weights in the old format are pickles, which can execute anything.
        model = kind.from_pretrained(name, local_files_only=True, use_safetensors=True)
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=True)
        folder = Path(cached_file(name, "config.json", local_files_only=True)).parent
    except (OSError, ValueError, ImportError) as error:
        raise WrisError(
            f"the language model {name} cannot be loaded from this machine; get it with `huggingface-cli download"
            f" {name}`, or name a folder with its config.json, tokenizer and safetensors."
        ) from error
    return LocalLlm(name, model, tokenizer, identity=f"{name} {_state(folder)}")


def _state(folder: Path) -> str:
    """Names, sizes and times of a folder's files: gigabytes of weights take too long to hash at every start."""
    files = [(path.name, path.stat()) for path in sorted(folder.iterdir())]
    return " ".join(f"{name} {about.st_size} {about.st_mtime_ns}" for name, about in files)


def _load_toy(checkpoint: Checkpoint) -> LocalLlm:
    """The toy stack's T5. It was trained for this one task, so it reads the bare expression.

    Raises:
        WrisError: its weights are missing, damaged, or made for another model.
    """
    model = build_toy_t5()
    load_weights(model, checkpoint)
    identity = f"{checkpoint.file} {expected_sha256(checkpoint)}"
    return LocalLlm(checkpoint.file, model, toy_tokenizer(), follows_instructions=False, identity=identity)


def build_toy_t5() -> "transformers.T5ForConditionalGeneration":
    """The toy language model, untrained."""
    from transformers import T5Config, T5ForConditionalGeneration

    tokenizer = toy_tokenizer()
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=96,
            d_kv=24,
            d_ff=256,
            num_layers=3,
            num_decoder_layers=3,
            num_heads=4,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            decoder_start_token_id=tokenizer.pad_token_id,
        )
    )


def toy_tokenizer() -> "transformers.PreTrainedTokenizerFast":
    """A token for every word of the toy world, for numbers of lines, and for the end of a line."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokens = [PAD, END, UNKNOWN, LINE, *(f"{number}." for number in range(1, 10)), *wording.vocabulary()]
    numbers = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordLevel(numbers, UNKNOWN))
    tokenizer.add_special_tokens([PAD, END, UNKNOWN])  # transformers 4.26 does not, and would write them out
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace("\n", f" {LINE} ")])
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(f"$A {END}", special_tokens=[(END, numbers[END])])
    # Joined by spaces, as word pieces are of which none continues the last.
    tokenizer.decoder = decoders.Sequence([decoders.Replace(LINE, "\n"), decoders.WordPiece(cleanup=False)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, unk_token=UNKNOWN)


class RemoteLlm:
    """Any endpoint that speaks OpenAI's protocol: Ollama, vLLM, llama.cpp, a hosted service.

    Failed requests (no connection, no answer in time, "too many requests", errors of the server) are repeated by the
    client, with growing pauses, or those the server asks for.

    Args:
        base_url: such as "http://localhost:11434/v1".
        model: its name there.
        key: name of the environment variable with the API key; where it is not set, none is sent.
        timeout: seconds to wait for an answer.
        retries: of a failed request.
        concurrency: requests at once.
        per_minute: requests at most; None: as many as are answered.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        key: str = "OPENAI_API_KEY",
        timeout: float = 60.0,
        retries: int = 4,
        concurrency: int = 4,
        per_minute: int | None = None,
    ) -> None:
        from openai import OpenAI

        address = urlsplit(base_url)
        if address.scheme not in ("http", "https") or not address.netloc:
            raise WrisError(f"{base_url!r} is not an endpoint; expected one such as http://localhost:11434/v1.")
        self.name, self.follows_instructions = f"{model} at {address.netloc}", True
        self.model, self.key, self.concurrency = model, key, concurrency
        self.client = OpenAI(
            base_url=base_url, api_key=os.environ.get(key) or "none", timeout=timeout, max_retries=retries
        )
        self.pause = 60 / per_minute if per_minute else 0.0
        self._turn, self._next = threading.Lock(), 0.0

    def answer(self, prompts: Sequence[str]) -> Iterator[str]:
        pool = ThreadPoolExecutor(self.concurrency)
        try:
            yield from pool.map(self._ask, prompts)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _ask(self, prompt: str) -> str:
        import openai

        self._wait()
        try:
            completion = self.client.chat.completions.create(
                model=self.model, messages=[{"role": "user", "content": prompt}], temperature=0.0, max_tokens=200
            )
            answer = completion.choices[0].message.content if completion.choices else None
        except openai.AuthenticationError as error:
            raise WrisError(f"{self.name} does not accept the key; set the environment variable {self.key}.") from error
        except openai.NotFoundError as error:
            raise WrisError(f"{self.name} is not known there; check the model's name and the address.") from error
        except openai.APITimeoutError as error:
            raise WrisError(f"{self.name} did not answer in {self.client.timeout:g} seconds; allow it more.") from error
        except openai.APIConnectionError as error:
            raise WrisError(f"{self.name} cannot be reached; check that it runs, and the address.") from error
        except openai.OpenAIError as error:
            raise WrisError(
                f"{self.name} failed: {str(error)[:200]}; try again later, or ask it more slowly."
            ) from error
        except (ValueError, TypeError, AttributeError) as error:  # what the client makes of a page, say
            raise WrisError(
                f"{self.name} did not answer as an endpoint of OpenAI's protocol does; check the address, which often"
                " ends with /v1."
            ) from error
        return answer or ""

    def _wait(self) -> None:
        """Let requests begin `pause` seconds apart."""
        with self._turn:
            delay = self._next - time.monotonic()
            self._next = max(time.monotonic(), self._next) + self.pause
        if delay > 0:
            time.sleep(delay)
