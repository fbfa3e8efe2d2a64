"""The slash commands of `moe-ray chat`: one literal table, what each does, and how a line is completed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rich.markup import escape
from rich.table import Table

from moe_ray.commands.chat_session import ChatSession
from moe_ray.commands.chat_settings import SETTINGS, parse_assignment
from moe_ray.commands.completion import paths_from
from moe_ray.commands.conversation import from_json, to_json
from moe_ray.errors import ConfigError

END: Final = "/end"
"""Ends what /multi began."""


class Leave(Exception):
    """The user ends the conversation."""


@dataclass(frozen=True, slots=True)
class SlashCommand:
    """One command: what it takes, what it says of itself, what it does with the words behind its name."""

    takes: str
    help: str
    run: Callable[[ChatSession, str], None]
    choices: Callable[[ChatSession, str], list[str]] = lambda session, start: []
    """What the words behind its name may become."""


def run_command(session: ChatSession, line: str) -> None:
    """Do what a line that begins with a slash says; what is wrong with it is told. Raises `Leave`."""
    name, _, rest = line.partition(" ")
    command = COMMANDS.get(ALIASES.get(name, name))
    try:
        if command is None:
            raise ConfigError(
                f"no command {name}; /help lists them. A question that begins with a slash needs a space before it"
            )
        if rest.strip() and not command.takes:
            raise ConfigError(f"{name} takes no words, got {rest.strip()!r}")
        command.run(session, rest.strip())
    except (ConfigError, OSError) as error:
        said = f"{error.strerror} ({error.filename})" if isinstance(error, OSError) else str(error)
        session.messages.print(f"[red]error:[/] {escape(said)}", soft_wrap=True)


def completions(session: ChatSession, line: str) -> list[str]:
    """What a line that begins with a slash may become; nothing for other lines."""
    if not line.startswith("/"):
        return []
    name, space, rest = line.partition(" ")
    if not space:
        return [
            f"{known} " if command.takes else known for known, command in COMMANDS.items() if known.startswith(name)
        ]
    command = COMMANDS.get(ALIASES.get(name, name))
    return [] if command is None else [f"{name} {choice}" for choice in command.choices(session, rest)]


def _help(session: ChatSession, _: str) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, command in COMMANDS.items():
        table.add_row(escape(f"{name} {command.takes}".strip()), command.help)
    session.messages.print(table)
    session.messages.print("Ctrl-C stops an answer and keeps what came; Ctrl-D leaves", style="dim")


def _system(session: ChatSession, text: str) -> None:
    if text:
        session.conversation = session.conversation.with_system(None if text == "-" else text)
    session.messages.print(session.conversation.system or "no system message", markup=False, soft_wrap=True)


def _set(session: ChatSession, text: str) -> None:
    if text in SETTINGS:
        shown = {text}
    elif text:
        session.settings = parse_assignment(text, session.settings)
        shown = {text.replace("=", " ").split()[0]}
    else:
        shown = set(SETTINGS)
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, value, source in session.settings.rows():
        if name in shown:
            table.add_row(name, escape(value), f"[dim]{source}[/]")
    session.messages.print(table)


def _clear(session: ChatSession, _: str) -> None:
    session.conversation = session.conversation.cleared()
    session.messages.print("a new conversation", style="dim")


def _undo(session: ChatSession, _: str) -> None:
    session.messages.print(f"forgotten: {session.undo()}", style="dim", markup=False, soft_wrap=True)


def _retry(session: ChatSession, _: str) -> None:
    session.retry()


def _save(session: ChatSession, text: str) -> None:
    path = _path(text)
    content = to_json(session.conversation, session.model, dict(session.settings.chosen))
    path.write_text(content + "\n", encoding="utf-8")
    session.messages.print(f"saved as {path}", style="dim", markup=False, soft_wrap=True)


def _load(session: ChatSession, text: str) -> None:
    path = _path(text)
    conversation, settings = from_json(path.read_text(encoding="utf-8", errors="replace"), str(path))
    session.settings = session.settings.with_values(settings)
    session.conversation = conversation
    said = f"{len(conversation.turns)} questions and their answers"
    session.messages.print(f"{said} of {path}", style="dim", markup=False, soft_wrap=True)


def _path(text: str) -> Path:
    if not text:
        raise ConfigError("which file?")
    return Path(text).expanduser()


def _model(session: ChatSession, text: str) -> None:
    if text:
        session.choose(text)
    for name, card in session.cards.items():
        mark = "*" if name == session.model else " "
        context = f", {card.context:,} tokens" if card.context else ""
        session.messages.print(f"{mark} {name} at {session.client.url}{context}", markup=False, soft_wrap=True)


def _stats(session: ChatSession, _: str) -> None:
    last = session.last
    if last is None:
        raise ConfigError("nothing was answered yet")
    table = Table(box=None, show_header=False, pad_edge=False)
    shown = {
        "prompt tokens": "-" if last.prompt_tokens is None else f"{last.prompt_tokens:,}",
        "tokens" if last.counted else "pieces": f"{last.tokens:,}",
        "first text (TTFT)": "-" if last.ttft_s is None else f"{last.ttft_s:.3f} s",
        "per second": "-" if last.tokens_per_s is None else f"{last.tokens_per_s:.1f}",
        "whole answer": f"{last.total_s:.3f} s",
        "ended by": last.finish_reason or "-",
    }
    for what, value in shown.items():
        table.add_row(what, value)
    session.messages.print(table)


def _multi(session: ChatSession, _: str) -> None:
    if session.read_more is None:
        raise ConfigError("/multi is for a terminal; `moe-ray chat -` reads one question of several lines")
    question = "\n".join(session.read_more()).strip()
    if question:
        session.ask(question)


def _exit(session: ChatSession, _: str) -> None:
    raise Leave


def _setting_choices(session: ChatSession, start: str) -> list[str]:
    return [f"{name} " for name in SETTINGS if name.startswith(start)]


def _path_choices(session: ChatSession, start: str) -> list[str]:
    return paths_from(start)


def _model_choices(session: ChatSession, start: str) -> list[str]:
    return [name for name in session.cards if name.startswith(start)]


COMMANDS: Final[Mapping[str, SlashCommand]] = {
    "/help": SlashCommand("", "this list", _help),
    "/system": SlashCommand("[TEXT]", "set the system message (`-`: none), or show it", _system),
    "/set": SlashCommand(
        "[NAME VALUE]", "set a sampling parameter (`default` takes it back), or show all", _set, _setting_choices
    ),
    "/clear": SlashCommand("", "a new conversation under the same system message", _clear),
    "/undo": SlashCommand("", "forget the last question and its answer", _undo),
    "/retry": SlashCommand("", "ask the last question again", _retry),
    "/save": SlashCommand("FILE", "write the conversation as JSON", _save, _path_choices),
    "/load": SlashCommand("FILE", "go on with a saved conversation", _load, _path_choices),
    "/model": SlashCommand("[NAME]", "the server's models, or ask another of them", _model, _model_choices),
    "/stats": SlashCommand("", "how fast the last answer came", _stats),
    "/multi": SlashCommand("", f"a question of several lines, up to a line {END}", _multi),
    "/exit": SlashCommand("", "leave", _exit),
}
ALIASES: Final = {"/quit": "/exit", "/reset": "/clear", "/?": "/help"}
