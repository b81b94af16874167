"""Options from a TOML file and from the environment. Options on the command line take precedence."""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from oocpatch.cli.types import UserPath


def _read(ctx: click.Context, _parameter: click.Parameter, path: Path | None) -> None:
    """Make the values of a file the defaults of the command."""
    if path is None:
        return
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise click.BadParameter(f"{path} must be TOML: {error}.") from error
    known = {p.name: p for p in ctx.command.params if p.name and p.expose_value}
    if unknown := sorted(values.keys() - known.keys()):
        meant = [match for name in unknown for match in get_close_matches(name, known, n=1)]
        advice = f"did you mean {', '.join(meant)}" if meant else f"these are {', '.join(sorted(known))}"
        raise click.BadParameter(f"{path} must hold parameters of {ctx.info_name}, got {', '.join(unknown)}; {advice}")
    defaults = {name: _repeated(value) if known[name].multiple else value for name, value in values.items()}
    ctx.default_map = {**(ctx.default_map or {}), **defaults}


def _repeated(value: Any) -> list[str]:
    """Return the values of an option that may be repeated.

    >>> _repeated({"depth": 3}), _repeated("net.py:net")
    (['depth=3'], ['net.py:net'])
    """
    if isinstance(value, Mapping):
        return [f"{name}={json.dumps(one)}" for name, one in value.items()]
    return [str(one) for one in value] if isinstance(value, list) else [str(value)]


class CommandContext(click.Context):
    """The context of a command, by which the group of commands knows where its options came from."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.meta["oocpatch"] = self  # contexts share it with those around them


def source_of(ctx: click.Context, message: str) -> str:
    """Return the variables of the environment that options came from which a message names; empty if none did."""
    command: click.Context = ctx.meta.get("oocpatch", ctx)
    sources = {}
    for option in command.command.params:
        spellings = {option.name or "", *option.opts}
        if command.get_parameter_source(option.name or "") is ParameterSource.ENVIRONMENT and any(
            re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", message) for name in spellings
        ):
            sources[option.name] = next(name for name in option.envvar or () if os.environ.get(name))
    return ", ".join(f"{name} is from the variable {variable}" for name, variable in sources.items())


def read_environment(command: click.Command) -> None:
    """Let options come from `OOCPATCH_COMMAND_OPTION`, which is for one command, else from `OOCPATCH_OPTION`.

    >>> option = click.Option(["--max-memory"])
    >>> read_environment(click.Command("plan", params=[option]))
    >>> option.envvar
    ['OOCPATCH_PLAN_MAX_MEMORY', 'OOCPATCH_MAX_MEMORY']
    """
    command.context_class = CommandContext
    for option in command.params:
        if isinstance(option, click.Option):
            name = max(option.opts, key=len).removeprefix("--").replace("-", "_").upper()
            option.envvar = [f"OOCPATCH_{str(command.name).upper()}_{name}", f"OOCPATCH_{name}"]


config_option = click.option(
    "--config",
    type=UserPath(exists=True, dir_okay=False, path_type=Path),
    is_eager=True,
    expose_value=False,
    callback=_read,
    metavar="FILE.toml",
    help="Read options from a TOML file. Command-line options take precedence.",
)
