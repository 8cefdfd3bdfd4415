import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import processes
from wris_lib.backbones.language import Parser, load_parser
from wris_lib.errors import WrisError
from wris_lib.methods.pcnet import decompose as module
from wris_lib.methods.pcnet.decompose import AGAIN, TEMPLATE, decompose, read_answer, remembered, sources
from wris_lib.pretrain.cues import answer, cues
from wris_lib.pretrain.sentences import analyse

EXPRESSION = "big man in white shirt next to the car"
GOOD = "1. a man\n2. the man in the white shirt\n3. the man next to the car"


class Scripted:
    """A model that says what it is told to, and remembers what it was asked."""

    follows_instructions = True

    def __init__(self, *answers: str, name: str = "scripted") -> None:
        self.answers, self.asked, self.name = list(answers), [], name

    def answer(self, prompts: Sequence[str]) -> Iterator[str]:
        for prompt in prompts:
            self.asked.append(prompt)
            yield self.answers.pop(0)


@pytest.fixture(scope="module")
def parser() -> Parser:
    return load_parser("toy")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("WRIS_CACHE", str(tmp_path))
    return tmp_path


def test_a_good_answer_becomes_cues(parser):
    llm = Scripted(GOOD)
    (found,) = decompose([EXPRESSION], llm, parser)
    man, shirt, car = "a man", "the man in the white shirt", "the man next to the car"
    assert found.phrases == (man, shirt, car, man, shirt)  # repeated until there are five
    assert sources([found]) == {"first answer": 1, "second answer": 0, "parser": 0}
    assert llm.asked == [TEMPLATE.format(expression=EXPRESSION, count=5)]


def test_the_prompt_has_four_parts():
    prompt = TEMPLATE.format(expression="the ball", count=5)
    instruction, rules, *examples, question = prompt.split("\n\n")
    assert "Take the sentence apart" in instruction
    assert rules.startswith("Rules:") and "at most 5 lines" in rules
    assert question.strip() == "Sentence: the ball"
    for example in examples:  # which keep the rules
        sentence, *lines = example.strip().splitlines()
        assert read_answer("\n".join(lines), sentence.removeprefix("Sentence: "), 5) is not None


def test_a_model_for_this_one_task_reads_the_expression_alone(parser):
    llm = Scripted(GOOD)
    llm.follows_instructions = False
    decompose([EXPRESSION], llm, parser)
    assert llm.asked == [EXPRESSION]


BAD = {
    "a refusal": "I'm sorry, but I can't help with that.",
    "talk before the lines": f"Sure! Here they are:\n{GOOD}",
    "markup": "1. **a man**\n2. `the man in the white shirt`",
    "bullets": "- a man\n- the man next to the car",
    "numbers that do not count": "1. a man\n3. the man next to the car",
    "a phrase that is missing": "1.\n2. the man",
    "a whole sentence": "1. the man who stands next to the car and wears a white shirt today",
    "too many lines": "\n".join(f"{n}. the man" for n in range(1, 7)),
    "another object": "1. a dog\n2. the dog on the left",
    "another language": "1. ein Mann\n2. der Mann neben dem Auto",
    "another script": "1. 男人\n2. 穿白衬衫的男人",
    "nothing": "",
    "a thought": "<think>who is it?</think>\n1. a man",
    "JSON": '["a man", "the man next to the car"]',
}


@pytest.mark.parametrize("answer", BAD.values(), ids=BAD)
def test_a_malformed_answer_is_asked_for_once_more(parser, answer):
    assert read_answer(answer, EXPRESSION, 5) is None
    llm = Scripted(answer, GOOD)
    (found,) = decompose([EXPRESSION], llm, parser)
    assert (found.phrases[0], found.source) == ("a man", "second answer")
    assert llm.asked[1] == llm.asked[0] + AGAIN


def test_after_two_the_parser_takes_over(parser):
    found = decompose(["the dog", EXPRESSION, "a cat"], Scripted("1. the dog", "?", "1. a cat", "??"), parser)
    assert found[1].phrases == ("big man", "white shirt", "the car", "big man", "white shirt")
    assert sources(found) == {"first answer": 2, "second answer": 0, "parser": 1}


@pytest.mark.parametrize(
    "line", ["1. a man", "1) a man", "  1.   a man  ", "1. a man.", "1. a t-shirt man", "1. a big, man", "1. man’s car"]
)
def test_small_liberties_are_allowed(line):
    assert read_answer(f"{line}\n\n2. the man", "the man", 5) is not None


@given(st.text(max_size=60), st.text(max_size=30))
def test_reading_never_fails(answer, expression):
    phrases = read_answer(answer, expression, 5)
    assert phrases is None or (1 <= len(phrases) <= 5 and all(phrases))


@pytest.mark.parametrize("expression", ["{count} {x} %s", "red\n\nSentence: a dog", "\ud800 dog", "", "👨‍👩‍👧"])
def test_any_expression_yields_cues(parser, expression):
    (found,) = decompose([expression], Scripted("no", "no"), parser, count=4)
    assert len(found.phrases) == 4


def test_the_same_expression_is_asked_about_once(parser):
    llm = Scripted(GOOD)
    first, second = decompose([EXPRESSION, EXPRESSION], llm, parser)
    assert first == second and len(llm.asked) == 1


def test_answers_are_kept_by_model_and_prompt(parser, monkeypatch):
    decompose([EXPRESSION], Scripted(GOOD), parser)
    silent = Scripted()
    decompose([EXPRESSION], silent, parser)
    assert silent.asked == []
    for change in ("name", "prompt", "expression"):
        llm = Scripted(GOOD, name="another" if change == "name" else "scripted")
        with monkeypatch.context() as patch:
            if change == "prompt":
                patch.setattr(module, "TEMPLATE", "Cues of {expression}?")
            decompose([EXPRESSION + " there" * (change == "expression")], llm, parser)
        assert len(llm.asked) == 1, change


def test_new_weights_of_the_same_name_are_asked_anew(parser):
    for identity in ("old weights", "new weights"):
        llm = Scripted(GOOD)
        llm.identity = identity
        decompose([EXPRESSION], llm, parser)
        assert len(llm.asked) == 1, identity


def test_what_was_answered_before_a_failure_is_kept():
    class Failing(Scripted):
        def answer(self, prompts: Sequence[str]) -> Iterator[str]:
            yield "one"
            raise WrisError("the model cannot be reached.")

    with pytest.raises(WrisError, match="cannot be reached"):
        list(remembered(Failing(), ["a", "b"]))
    llm = Scripted("two")
    assert list(remembered(llm, ["a", "b"])) == ["one", "two"]
    assert llm.asked == ["b"]


class Mortal:
    name, follows_instructions = "scripted", True

    def answer(self, prompts):
        for number, prompt in enumerate(prompts):
            if number == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            yield prompt.upper()


def ask_until_killed():
    list(remembered(Mortal(), list("abcdef")))


def test_what_was_answered_before_a_kill_is_kept(cache, tmp_path):
    log = tmp_path / "log.txt"
    assert processes.run(log, ask_until_killed) == -signal.SIGKILL, log.read_text()
    llm = Scripted("D", "E", "F")
    assert list(remembered(llm, list("abcdef"))) == list("ABCDEF")
    assert llm.asked == ["d", "e", "f"]


def test_a_file_that_is_no_database(tmp_path):
    path = tmp_path / "answers.sqlite"
    path.write_text("not a database, but long enough to be taken for one" * 20)
    with pytest.raises(WrisError, match=r"answers.sqlite cannot be used: .*; make room on the disk, or delete"):
        list(remembered(Scripted("yes"), ["a"], path))


# ----------------------------------------------------------------------------------- what the toy model is to write

TAKEN_APART = {
    "bird": ["a bird"],
    "an orange umbrella": ["an umbrella", "the orange umbrella"],
    "the big striped dog": ["a dog", "the big dog", "the striped dog"],
    "man in green shirt and blue hat with blond hair": [
        "a man",
        "the man in the green shirt",
        "the man in the blue hat",
        "the man with blond hair",
    ],
    "top left small kid behind bottom left cow with pink bag": [
        "a kid",
        "the top left kid",
        "the small kid",
        "the kid behind the cow",
    ],
    "the dog standing to the left of the red car": ["a dog", "the dog standing to the left of the car"],
    "the cup at the bottom of the picture": ["a cup", "the cup at the bottom of the picture"],
    "the cup in the top right corner": ["a cup", "the cup in the top right corner"],
    "boy next to a girl in front of the tent": ["a boy", "the boy next to the girl"],
    "the dog left of the cat": ["a dog", "the dog left of the cat"],
}


@pytest.mark.parametrize("expression", TAKEN_APART)
def test_cues_of_the_toy_grammar(expression):
    assert cues(analyse(expression), 5) == TAKEN_APART[expression]
    assert cues(analyse(expression), 2) == TAKEN_APART[expression][:2]
    assert read_answer(answer(analyse(expression), 5), expression, 5) == TAKEN_APART[expression]
