"""The option by which a user lets files of somebody else run commands."""

from typing import Annotated

import typer

ALLOW_VARIABLE = "OMNIVL_ALLOW_COMMANDS"

AllowCommands = Annotated[
    bool,
    typer.Option(
        "--allow-commands",
        envvar=ALLOW_VARIABLE,
        show_envvar=False,
        help="Let files of another user run commands (pipe:, setup), fetch addresses and expand globs.",
    ),
]
