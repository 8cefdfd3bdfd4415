"""From a sentence to cues: short phrases about the referent, from the most general one to the particulars.

    "man in white shirt next to the car"  --LLM-->  a man · the man in the white shirt · the man next to the car

A language model is asked with a prompt of four parts: instruction, rules, examples, question (`prompt.txt`). Its answer
is read strictly. A malformed one is asked for once more, and after that replaced by noun phrases from the parser, which
is counted. Answers are kept on disk as they come, by model and prompt: nothing is asked twice. (A power cut may cost
the file: to wait for the disk takes as long as the toy model takes to answer.)

Source: Yang et al., "Boosting Weakly Supervised Referring Image Segmentation via Progressive Comprehension", NeurIPS
2024, §3.1. The paper asks Mistral-7B for K = 5 cues.
"""

import hashlib
import re
import sqlite3
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from tqdm.auto import tqdm

from wris_lib.backbones.language import Parser
from wris_lib.backbones.llm import Llm
from wris_lib.errors import WrisError
from wris_lib.files import cache_dir

TEMPLATE = (Path(__file__).parent / "prompt.txt").read_text(encoding="utf-8")
CUES = 5
MAX_WORDS = 10  # of a phrase, as the prompt says
AGAIN = "\nAnswer with numbered lines and nothing else, such as:\n1. a dog\n2. the dog on the left\n"
FIRST, SECOND, PARSER = "first answer", "second answer", "parser"
_LINE = re.compile(r"(\d+)[.)]\s+(.+)")
_PHRASE = re.compile(r"[\w'’-]+(,? [\w'’-]+)*")
_FILLERS = {"a", "an", "the", "of", "in", "on", "at", "to", "with", "and", "is", "by", "or"}


@dataclass(frozen=True)
class Cues:
    """What an expression says, piece by piece.

    Attributes:
        phrases: K of them; where fewer were found, they are repeated.
        source: "first answer" or "second answer" of the model, or "parser".
    """

    phrases: tuple[str, ...]
    source: str


def decompose(expressions: Sequence[str], llm: Llm, parser: Parser, count: int = CUES) -> list[Cues]:
    """Cues of expressions, in their order; the last line of the progress bar says where they come from.

    Args:
        expressions: any number; the same one may come again.
        llm: to be asked.
        parser: takes the place of malformed answers.
        count: K.

    Raises:
        WrisError: the model does not answer, or answers cannot be kept. Those that came are kept.
    """
    found: dict[str, Cues] = {}
    lacking = list(dict.fromkeys(expressions))
    template = TEMPLATE if llm.follows_instructions else "{expression}"
    prompts = {text: template.format(expression=_one_line(text), count=count) for text in lacking}
    for source, ending in ((FIRST, ""), (SECOND, AGAIN)):
        answers = remembered(llm, [prompts[text] + ending for text in lacking])
        bar = tqdm(zip(lacking, answers, strict=True), desc=source, total=len(lacking), unit="expr", delay=3)
        read = {text: read_answer(answer, text, count) for text, answer in bar}
        found |= {text: Cues(repeat(phrases, count), source) for text, phrases in read.items() if phrases}
        lacking = [text for text, phrases in read.items() if not phrases]
    for text, parse in zip(lacking, parser.parse(lacking), strict=True):
        found[text] = Cues(repeat(parse.noun_phrases, count), PARSER)
    return [found[text] for text in expressions]


def sources(cues: Sequence[Cues]) -> dict[str, int]:
    """How many of the cues come from where."""
    counted = Counter(each.source for each in cues)
    return {source: counted[source] for source in (FIRST, SECOND, PARSER)}


def read_answer(answer: str, expression: str, count: int) -> list[str] | None:
    """The phrases of a well-formed answer: lines numbered from 1, at most `count`, each a short phrase without markup,
    and not all about something that the expression does not mention. None for anything else."""
    phrases = []
    for line in filter(None, map(str.strip, answer.splitlines())):
        match = _LINE.fullmatch(line)
        if not match or int(match[1]) != len(phrases) + 1:
            return None
        phrase = match[2].strip().rstrip(".")
        if not _PHRASE.fullmatch(phrase) or len(phrase.split()) > MAX_WORDS:
            return None
        phrases.append(phrase)
    if len(phrases) > count or not shares_a_word(" ".join(phrases), expression):
        return None
    return phrases


def remembered(llm: Llm, prompts: Sequence[str], path: Path | None = None) -> Iterator[str]:
    """An answer for each prompt, in order: from the disk, or from the model, and then kept.

    Args:
        llm: to be asked.
        prompts: whole ones.
        path: of the answers; None: in the cache.

    Raises:
        WrisError: the model does not answer, or answers cannot be kept.
    """
    if not prompts:
        return
    path = path or cache_dir() / "cues" / "answers.sqlite"
    path.parent.mkdir(parents=True, exist_ok=True)
    model = getattr(llm, "identity", llm.name)
    keys = [hashlib.sha256(f"{model}\n{prompt}".encode()).hexdigest() for prompt in prompts]
    try:
        with closing(sqlite3.connect(path, timeout=60, isolation_level=None)) as kept:
            kept.execute("PRAGMA journal_mode=WAL")
            kept.execute("PRAGMA synchronous=OFF")  # what is written outlives the process all the same
            kept.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, answer TEXT NOT NULL)")
            find = "SELECT key, answer FROM answers WHERE key = ?"
            known = dict(row for key in keys for row in kept.execute(find, [key]))
            lacking = {key: prompt for key, prompt in zip(keys, prompts, strict=True) if key not in known}
            fresh = zip(lacking, llm.answer(list(lacking.values())), strict=True)
            for key in keys:
                while key not in known:
                    row = next(fresh)
                    kept.execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", row)
                    known |= [row]
                yield known[key]
    except sqlite3.Error as error:
        raise WrisError(
            f"{path} cannot be used: {error}; make room on the disk, or delete the file, and what is needed is asked"
            " anew."
        ) from error


def _one_line(text: str) -> str:
    """Without line breaks, which would end the question; half a surrogate pair, which is no character, becomes "?"."""
    return " ".join(text.encode("utf-8", "replace").decode("utf-8").split())


def shares_a_word(phrase: str, expression: str) -> bool:
    """Whether some word that says something is in both."""
    first, second = (set(re.findall(r"\w+", text.lower())) - _FILLERS for text in (phrase, expression))
    return bool(first & second)


def repeat(phrases: Sequence[str], count: int) -> tuple[str, ...]:
    """The first `count` phrases; where there are fewer, they come again in their order."""
    return tuple(phrases[number % len(phrases)] for number in range(count))
