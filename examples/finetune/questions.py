"""Questions and answers to train on: what Python's standard library says of its own functions, or those of a file.

>>> from questions import standard_library
>>> standard_library()[0]["question"]
'What does `abs` do in Python?'
"""

from __future__ import annotations

import importlib
import inspect
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

_NAMES: Final = (
    "builtins argparse array ast base64 bisect calendar cmath codecs collections concurrent.futures configparser "
    "contextlib contextvars copy csv dataclasses datetime decimal difflib dis email.message email.utils enum "
    "filecmp fileinput fnmatch fractions functools gc getpass gettext glob gzip hashlib heapq hmac html "
    "http.client http.cookies imaplib inspect io ipaddress itertools json keyword linecache locale logging "
    "mailbox math mimetypes multiprocessing netrc numbers operator os os.path pathlib pdb pickle pkgutil platform "
    "plistlib pprint profile pstats queue random re reprlib runpy sched secrets select selectors shelve shlex "
    "shutil signal smtplib socket stat statistics string struct subprocess symtable sys tarfile tempfile textwrap "
    "threading time timeit token tokenize trace traceback tracemalloc types typing unicodedata urllib.parse "
    "urllib.request uuid warnings wave weakref xml.dom.minidom xml.etree.ElementTree zipfile zipimport zlib"
)
MODULES: Final = _NAMES.split()
SHORTEST: Final = 20
LONGEST: Final = 200
"""Of an answer, in characters. Shorter ones say nothing; longer ones take minutes of a small machine."""


class CannotTrain(Exception):
    """What is asked for does not work here; the message says why and what does."""


def standard_library() -> list[dict[str, str]]:
    """Question and answer for each documented function, class and method of `MODULES`, in a fixed order.

    An answer is the first paragraph of a docstring, unless that is a signature. Each comes once.
    """
    answers: dict[str, str] = {}
    for name, value in _documented():
        paragraph = _first_paragraph(value)
        is_signature = paragraph.startswith(f"{name.rpartition('.')[2]}(")
        if SHORTEST <= len(paragraph) <= LONGEST and not is_signature:
            answers.setdefault(paragraph, f"What does `{name}` do in Python?")
    return [{"question": question, "answer": answer} for answer, question in answers.items()]


def _documented() -> Iterator[tuple[str, Any]]:
    for module_name in MODULES:
        module = importlib.import_module(module_name)
        prefix = "" if module_name == "builtins" else f"{module_name}."
        for name, value in sorted(vars(module).items()):
            if name.startswith("_") or not callable(value):
                continue
            yield f"{prefix}{name}", value
            if inspect.isclass(value):
                for member, method in sorted(vars(value).items()):
                    if not member.startswith("_") and callable(method):
                        yield f"{prefix}{name}.{member}", method


def _first_paragraph(value: Any) -> str:
    text = getattr(value, "__doc__", None)
    return " ".join(inspect.cleandoc(text).split("\n\n")[0].split()) if isinstance(text, str) else ""


def read_questions(path: Path | None) -> list[dict[str, str]]:
    """Questions with their answers; `CannotTrain` names the line that is none."""
    if path is None:
        return standard_library()
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise CannotTrain(f"--data {path}: {error.strerror}") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            rows.append({"question": str(row["question"]), "answer": str(row["answer"])})
        except (ValueError, TypeError, KeyError) as error:
            raise CannotTrain(
                f'--data {path}, line {number}: not an object {{"question": ..., "answer": ...}}'
            ) from error
    return rows


def split(rows: list[dict[str, str]], held_out: int, seed: int) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Shuffled rows to train on, and `held_out` others."""
    if not 0 < held_out < len(rows):
        raise CannotTrain(f"--held-out {held_out}: must be 1 to {len(rows) - 1}, of {len(rows)} questions")
    rows = rows.copy()
    random.Random(seed).shuffle(rows)
    return rows[held_out:], rows[:held_out]


def conversations(rows: list[dict[str, str]]) -> Any:
    """As TRL takes them: it renders the model's chat template, and computes the loss on completions alone."""
    from datasets import Dataset

    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": row["question"]}],
                "completion": [{"role": "assistant", "content": row["answer"]}],
            }
            for row in rows
        ]
    )
