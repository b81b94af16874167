"""Settings from a file and from the environment; what is typed goes before them.

`--config run.toml` gives defaults to a command. `OOCPATCH_MAX_MEMORY` gives an option to all commands that have it, and
`OOCPATCH_PREDICT_MAX_MEMORY`, which goes before it, to one.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

AS_JSON = frozenset({"preprocess", "augment"})
"""Options that take tables and lists as JSON."""


def _read(ctx: click.Context, _parameter: click.Parameter, path: Path | None) -> None:
    """Make what a file says the defaults of the command."""
    if path is None:
        return
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise click.BadParameter(f"{path} must be TOML: {error}.") from error
    known = {p.name: p for p in ctx.command.params if p.name and p.expose_value}
    unknown = sorted(found.keys() - known.keys())
    if unknown:
        raise click.BadParameter(
            f"{path} must hold parameters of {ctx.info_name} ({', '.join(sorted(known))}), got {', '.join(unknown)}."
        )
    values = {name: typed(name, value, several=known[name].multiple) for name, value in found.items()}
    ctx.default_map = {**(ctx.default_map or {}), **values}


def typed(name: str, value: Any, *, several: bool) -> Any:
    """A value of TOML as somebody would type it.

    >>> typed("patch_size", [32, 96, 96], several=False), typed("model_args", {"depth": 3}, several=True)
    ('32,96,96', ['depth=3'])
    >>> typed("overlap_mode", {"scores": "hann"}, several=False), typed("augment", ["z"], several=False)
    ('scores=hann', '["z"]')
    """
    if several:
        if isinstance(value, Mapping):
            return [f"{k}={json.dumps(v)}" for k, v in value.items()]
        return [str(v) for v in value] if isinstance(value, list) else [str(value)]
    if name in AS_JSON and isinstance(value, (Mapping, list)):
        return json.dumps(value)
    if isinstance(value, Mapping):
        return ",".join(f"{k}={v}" for k, v in value.items())
    if isinstance(value, list):
        return ",".join(map(str, value))
    return value if isinstance(value, bool) else str(value)


def from_environment(group: click.Group, prefix: str) -> None:
    """Let the options of all commands of a group come from the environment.

    >>> group = click.Group(commands={"fit": click.Command("fit", params=[click.Option(["--max-memory"])])})
    >>> from_environment(group, "PATCH")
    >>> group.commands["fit"].params[0].envvar
    ['PATCH_FIT_MAX_MEMORY', 'PATCH_MAX_MEMORY']
    """
    for name, command in group.commands.items():
        for option in command.params:
            if isinstance(option, click.Option):
                long = max(option.opts, key=len).removeprefix("--").replace("-", "_").upper()
                option.envvar = [f"{prefix}_{name.upper()}_{long}", f"{prefix}_{long}"]


config_option = click.option(
    "--config",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    is_eager=True,
    expose_value=False,
    callback=_read,
    metavar="FILE.toml",
    help="Take settings from this file, by the names of the parameters; what is typed goes before.",
)
