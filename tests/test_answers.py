"""Shipped answers: what is read is what was written, and a damaged file says so."""

import gzip
import json

import pytest

from wris_lib import answers
from wris_lib.errors import WrisError

MASK = {"size": [24, 32], "counts": "abc"}


def record(item: int, iou: float, **more) -> dict:
    about = {"item": item, "image": item // 2, "expression": f"the dog “{item}”", "kind": None, "twins": item % 2}
    return about | {"mask": MASK, "intersection": 1, "union": 3, "iou": iou, "hit": None, "outcome": "leak"} | more


FOUND = {
    "one plain": [record(3, 1 / 3), record(4, 0.25, outcome="noise")],
    "two": [record(3, 0.0, hit=True, mask=None), record(4, 1.0, hit=False)],
}


def test_what_is_read_is_what_was_written(tmp_path):
    path = tmp_path / "results" / f"benchmark{answers.SUFFIX}"
    answers.write(path, "fake:val", FOUND)
    spec, found = answers.read(path)
    assert spec == "fake:val" and found == FOUND and list(found) == list(FOUND)
    before = path.read_bytes()
    answers.write(path, "fake:val", FOUND)
    assert path.read_bytes() == before  # no date in it, or git would see a change


def test_questions_are_kept_once(tmp_path):
    path = tmp_path / "a.json.gz"
    answers.write(path, "fake:val", FOUND)
    content = json.loads(gzip.decompress(path.read_bytes()))
    assert content["questions"] == [{key: each[key] for key in answers.QUESTION} for each in FOUND["two"]]
    assert not any(set(answers.QUESTION) & each.keys() for rows in content["answers"].values() for each in rows)


@pytest.mark.parametrize(
    "content",
    [
        b"no gzip",
        gzip.compress(b"no json"),
        gzip.compress(b"[]"),
        gzip.compress(b'{"data": "fake:val"}'),
        gzip.compress(b'{"data": "fake:val", "questions": [], "answers": {"one": [{}]}}'),
        gzip.compress(b'{"data": "fake:val", "questions": [], "answers": []}'),
        gzip.compress(b"{}" * 99)[:-9],
    ],
    # Named, since gzip writes the time into its header, and processes that share the tests compare their names.
    ids=["no gzip", "no JSON", "a list", "nothing else", "questions that are empty", "answers in a list", "cut short"],
)
def test_a_damaged_file_is_refused(tmp_path, content):
    path = tmp_path / "a.json.gz"
    path.write_bytes(content)
    with pytest.raises(WrisError, match="a.json.gz is damaged; restore it with `git checkout -- results`"):
        answers.read(path)


def test_answers_that_are_not_there(tmp_path):
    with pytest.raises(WrisError, match="there are no answers in .*; make them with `python -m wris_lib benchmark --a"):
        answers.read(tmp_path / "a.json.gz")
