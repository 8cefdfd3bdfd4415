"""All answers to one split's questions, in a file so small that it can be shipped.

Whoever wants to look at answers (a notebook, a page) then needs no model and no hours. The records are those of
`wris_lib.benchmark.records`, masks included.
"""

import gzip
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from wris_lib.errors import WrisError
from wris_lib.evaluate import Record
from wris_lib.files import atomic_write

SUFFIX = ".answers.json.gz"
QUESTION = ("item", "image", "expression", "kind", "twins")  # what the records of all methods share


def write(path: Path, spec: str, found: Mapping[str, Sequence[Record]]) -> None:
    """Write a split's answers.

    Args:
        path: of the file.
        spec: name of the split.
        found: by a row's name, records of the same expressions in the same order.

    Raises:
        WrisError: the folder cannot be written.
    """
    asked = next(iter(found.values()))
    content = {
        "data": spec,
        "questions": [{key: record[key] for key in QUESTION} for record in asked],
        "answers": {
            name: [{key: value for key, value in record.items() if key not in QUESTION} for record in records]
            for name, records in found.items()
        },
    }
    text = json.dumps(content, separators=(",", ":")).encode()
    with atomic_write(path) as file:
        file.write(gzip.compress(text, mtime=0))  # the same answers make the same file


def read(path: Path) -> tuple[str, dict[str, list[Record]]]:
    """A split's name, and by a row's name its records.

    Raises:
        WrisError: there is no such file, or it is damaged.
    """
    path = Path(path)
    try:
        content = json.loads(gzip.decompress(path.read_bytes()))
        found = {
            name: [question | answer for question, answer in zip(content["questions"], answers, strict=True)]
            for name, answers in content["answers"].items()
        }
        return content["data"], found
    except FileNotFoundError as error:
        raise WrisError(
            f"there are no answers in {path}; make them with `python -m wris_lib benchmark --all`."
        ) from error
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WrisError(f"{path} is damaged; restore it with `git checkout -- results`.") from error
