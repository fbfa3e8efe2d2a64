"""The parts of `moe-ray chat`: conversations as files, settings, history, completion, and answers drawn as Markdown."""

from __future__ import annotations

import io
import json
import re
import stat
from pathlib import Path

import pytest
from rich.console import Console
from rich.markdown import Markdown
from terminal import ESCAPES

from moe_ray.api.openai.parse import parse_chat
from moe_ray.commands.chat_line import MOST_LINES, History
from moe_ray.commands.chat_screen import answer_screen, draws_markdown, settled_length
from moe_ray.commands.chat_settings import SETTINGS, SamplingSettings, parse_assignment
from moe_ray.commands.completion import paths_from
from moe_ray.commands.conversation import Conversation, from_json, to_json
from moe_ray.errors import ConfigError

ANSWER = """# Rivers

Some **rivers** of Europe:

- the Rhine
- the Danube, which is
  long

| name | km |
|---|---|
| Rhine | 1230 |

```python
print("one")

print("two")
```

That is *all*."""


def test_a_conversation_comes_back_from_its_file() -> None:
    said = Conversation("Be brief.").with_turn("Hi", "Hello.").with_turn("And?", "No.\nMore.")
    assert from_json(to_json(said, "m", {"top_k": 3}), "x") == (said, {"top_k": 3})
    assert said.without_last().messages() == said.messages()[:-2]
    assert said.cleared() == Conversation("Be brief.")
    assert Conversation().without_last() == Conversation()
    assert Conversation("").messages("Hi") == [{"role": "user", "content": "Hi"}], "an empty system message is none"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "no JSON"),
        ("[]", "`messages`"),
        ({"messages": [{"role": "user", "content": "x"}]}, "no answer"),
        ({"messages": [{"role": "tool", "content": "x"}]}, r"messages\[0\]"),
        ({"messages": [{"role": "assistant", "content": "x"}, {"role": "user", "content": "x"}]}, "alternate"),
        ({"messages": [], "settings": []}, "`settings`"),
    ],
)
def test_other_files_are_refused(content: object, told: str) -> None:
    text = content if isinstance(content, str) else json.dumps(content)
    with pytest.raises(ConfigError, match=f"^talk.json: .*{told}"):
        from_json(text, "talk.json")


EXAMPLES = {
    "max_tokens": 3,
    "min_tokens": 2,
    "top_k": 5,
    "seed": 3,
    "stop": "###",
    "stop_token_ids": [7],
    "allowed_token_ids": [7, 8],
    "bad_words": ["no"],
    "logit_bias": {"5": 1.5},
    "ignore_eos": True,
    "skip_special_tokens": False,
    "priority": 1,
}


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_is_a_field_of_the_chat_api(name: str) -> None:
    value = EXAMPLES.get(name, 0.5)
    settings = parse_assignment(f"{name}={value if isinstance(value, str) else json.dumps(value)}", SamplingSettings())
    assert name in settings.body
    parse_chat(json.dumps({"model": "m", "messages": [{"role": "user", "content": "x"}], **settings.body}).encode())
    assert name not in settings.having(name, "default").chosen


def test_what_the_model_recommends_is_left_to_the_server() -> None:
    settings = SamplingSettings({}, {"temperature": 0.2, "top_k": 40})
    assert settings.body == {"max_tokens": 512}
    assert settings.having("top_k", "3").body == {"max_tokens": 512, "top_k": 3}
    assert SamplingSettings().body == {"max_tokens": 512, "temperature": 0.7}
    rows = {name: (value, source) for name, value, source in settings.having("seed", "4").rows()}
    assert rows["temperature"] == ("0.2", "the model recommends it")
    assert rows["seed"] == ("4", "set")
    assert rows["max_tokens"] == ("512", "")
    for wrong, told in [
        ("top_p=2", "`top_p` must be"),
        ("topp 2", "no setting 'topp'"),
        ("top_p", "a name and a value"),
    ]:
        with pytest.raises(ConfigError, match=told):
            parse_assignment(wrong, settings)


def test_the_history_is_its_users_alone_and_bounded(tmp_path: Path) -> None:
    path = tmp_path / "cache" / "chat_history"
    history = History(path)
    assert history.load() == []
    history.add("one")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o644)
    assert history.load() == ["one"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.write_text("".join(f"line {i}\n" for i in range(2 * MOST_LINES + 1)))
    assert history.load() == [f"line {i}" for i in range(MOST_LINES + 1, 2 * MOST_LINES + 1)]
    assert len(path.read_text().splitlines()) == MOST_LINES
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(path.parent.iterdir()) == [path]
    History(tmp_path / "chat_history" / "no").add("x")
    History(Path("/proc/none/chat_history")).add("nobody minds")


def test_paths_are_completed(tmp_path: Path) -> None:
    (tmp_path / "talks").mkdir()
    (tmp_path / "talk.json").touch()
    (tmp_path / ".hidden").touch()
    assert paths_from(f"{tmp_path}/ta") == [f"{tmp_path}/talk.json", f"{tmp_path}/talks/"]
    assert f"{tmp_path}/.hidden" not in paths_from(f"{tmp_path}/")
    assert paths_from("/no/such/") == []


def test_settled_blocks_stay_as_they_are() -> None:
    """Wherever an answer is cut into pieces, blocks that are printed early look as in the whole."""
    console = Console(width=40)
    whole = shown(console, ANSWER)
    for cut in range(1, len(ANSWER)):
        settled = settled_length(ANSWER[:cut])
        head = shown(console, ANSWER[:settled]).strip()
        assert whole.strip().startswith(head), (cut, ANSWER[:settled])
    assert settled_length("One.\n\nTwo.\n") == 6
    assert settled_length("```\nx\n\ny\n") == 0, "an open block of code"


def shown(console: Console, text: str) -> str:
    with console.capture() as captured:
        console.print(Markdown(text))
    return captured.get()


@pytest.mark.parametrize("size", [1, 7, 1000])
@pytest.mark.parametrize("height", [4, 50])
def test_an_answer_is_drawn_in_pieces_and_stays_whole(size: int, height: int) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=40, height=height)
    with answer_screen(console, markdown=True) as write:
        for start in range(0, len(ANSWER), size):
            write(ANSWER[start : start + size])
    stays = ESCAPES.sub("", screen(out.getvalue()))
    for line in ("Rivers", "Some rivers of Europe:", " • the Rhine", "Rhine", "1230", 'print("one")', "That is all."):
        assert sum(line in row for row in stays.splitlines()) >= 1, (line, stays)
    assert stays.count("the Danube") == 1
    assert stays.count('print("two")') == 1


def screen(written: str) -> str:
    """What a terminal shows in the end, of text and of the escapes that rich moves its cursor with."""
    rows, row = [""], 0
    for part in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|\n|\r|[^\x1b\n\r]+", written):
        if part == "\n":
            row += 1
            rows += [""] * (row + 1 - len(rows))
        elif part.endswith("A") and part.startswith("\x1b"):
            row = max(row - int(part[2:-1] or 1), 0)
        elif part == "\x1b[2K":
            rows[row] = ""
        elif not part.startswith("\x1b") and part != "\r":
            rows[row] += part
    return "\n".join(rows)


def test_an_answer_does_not_command_the_terminal() -> None:
    evil = "one\x1b]0;title\x07\x1b[2J\x9b31mtwo\u2028three\n"
    for markdown in (False, True):
        out = io.StringIO()
        console = Console(file=out, force_terminal=True, width=40)
        with answer_screen(console, markdown) as write:
            write(evil)
        assert "\x1b]" not in out.getvalue()
        assert "\x9b" not in out.getvalue()
        assert "\x1b[2J" not in out.getvalue()
    out = io.StringIO()
    with answer_screen(Console(file=out), markdown=False) as write:
        write(evil)
    assert out.getvalue() == f"{evil}\n", "a file gets what the model said"


def test_markdown_is_for_terminals_that_can_draw_it() -> None:
    assert not draws_markdown(Console(file=io.StringIO()))
    assert draws_markdown(Console(file=io.StringIO(), force_terminal=True))
    assert not draws_markdown(Console(file=io.TextIOWrapper(io.BytesIO(), "ascii"), force_terminal=True))
