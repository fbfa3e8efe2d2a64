"""`moe-ray chat`: a streaming conversation with a running server, in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console

from moe_ray.commands.chat_client import ChatClient, ServedCard
from moe_ray.commands.chat_commands import END, Leave, completions, run_command
from moe_ray.commands.chat_line import History, LineEditor
from moe_ray.commands.chat_screen import draws_markdown
from moe_ray.commands.chat_session import STOPPED, ChatSession
from moe_ray.commands.chat_settings import SamplingSettings, parse_assignment
from moe_ray.commands.conversation import Conversation

PROMPT = "> "
MORE = ". "


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """What the command line says of a conversation."""

    url: str
    model: str | None
    system: str | None
    settings: Sequence[str]
    """NAME=VALUE each."""
    api_key: str | None
    history: Path | None
    """Where typed lines are kept; None: nowhere."""
    plain: bool
    """Show answers as they come, also in a terminal that could draw Markdown."""


def chat_loop(options: ChatOptions, question: str | None, output: Console, messages: Console) -> bool:
    """Answer one question, or what is typed or piped in until it ends; False where a question had no answer.

    Raises `NotReady` when no server answers, `ConfigError` for a setting that is not allowed.
    """
    with ChatClient(options.url, options.api_key) as client:
        session = ChatSession(
            client,
            client.models(),
            options.model,
            partial(_settings, options.settings),
            Conversation(options.system or None),
            output,
            messages,
            draws_markdown(output) and not options.plain,
        )
        if question is not None:
            session.ask(question)
            if session.last is not None and session.last.finish_reason == STOPPED:
                raise KeyboardInterrupt
        elif sys.stdin.isatty():
            _converse(session, options, messages)
        else:
            for line in sys.stdin:
                if not _take(session, line):
                    break
    return not session.failed


def _settings(assignments: Sequence[str], card: ServedCard) -> SamplingSettings:
    settings = SamplingSettings({}, card.sampling_defaults)
    for assignment in assignments:
        settings = parse_assignment(assignment, settings)
    return settings


def _converse(session: ChatSession, options: ChatOptions, messages: Console) -> None:
    """Read from the terminal until Ctrl-D or /exit; Ctrl-C drops the line."""
    editor = LineEditor(History(options.history) if options.history else None, partial(completions, session))
    # `input` shows its prompt on standard output; where that is a file, answers go there and nothing else.
    read = editor.read if sys.stdout.isatty() else partial(_read_silently, editor, messages)
    session.read_more = partial(_read_more, read, messages)
    messages.print(f"{session.model} at {session.client.url}", style="bold", markup=False, soft_wrap=True)
    messages.print("/help lists the commands; Ctrl-D leaves", style="dim")
    while True:
        try:
            messages.print()
            line = read(PROMPT)
            if line.strip():
                editor.remember(line)
            if not _take(session, line):
                return
        except KeyboardInterrupt:
            continue
        except EOFError:
            messages.print()
            return


def _take(session: ChatSession, line: str) -> bool:
    """Ask, or do what a command says; False where that is to leave."""
    if line.startswith("/"):
        try:
            run_command(session, line.rstrip())
        except Leave:
            return False
    elif question := line.strip():
        session.ask(question)
    return True


def _read_silently(editor: LineEditor, messages: Console, prompt: str) -> str:
    messages.print(prompt, end="")
    return editor.read("")


def _read_more(read: Callable[[str], str], messages: Console) -> list[str]:
    """Lines up to `END` or Ctrl-D; none where Ctrl-C drops them."""
    messages.print(f"{END} on a line of its own sends it, Ctrl-C drops it", style="dim")
    lines: list[str] = []
    try:
        while (line := read(MORE)).rstrip() != END:
            lines.append(line)
    except EOFError:
        messages.print()
    except KeyboardInterrupt:
        return []
    return lines
