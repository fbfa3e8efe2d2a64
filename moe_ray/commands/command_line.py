"""Runs a command: an error is one line, never a traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from rich.markup import escape

from moe_ray.commands.options import error_console
from moe_ray.console import accept_every_character
from moe_ray.errors import MoeRayError


def run_command(command: Callable[[], None]) -> None:
    """Run `command`; a known error is printed as one line and ends the process with status 1."""
    accept_every_character()
    try:
        command()
    except MoeRayError as error:
        error_console().print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        sys.exit(1)
    except BrokenPipeError:  # whoever read our output has gone: there is no one to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        named = f" ({error.filename})" if error.filename else ""
        error_console().print(f"[bold red]error:[/] {escape(f'{error.strerror or error}{named}')}", soft_wrap=True)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
