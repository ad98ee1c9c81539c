"""podtree's command line: verbs are imported when they are called, errors are printed here and nowhere else."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

import click

from podtree.errors import PodtreeError

_VERBS = {
    "run": "Run a command in a new pod.",
    "exec": "Run a command in a running pod.",
    "attach": "Attach this terminal to a pod.",
    "logs": "Show what a pod has written.",
    "ps": "List pods.",
    "stop": "Stop pods: SIGTERM, then SIGKILL.",
    "kill": "Send pods a signal.",
    "wait": "Wait for pods to end; print their exit codes.",
    "rm": "Remove pods.",
    "checkpoint": "Save a pod: its processes and its files, at one instant.",
    "branch": "Make a new running pod from a checkpoint.",
    "rewind": "Put a pod back to one of its checkpoints, in place.",
    "log": "Show checkpoints and branches.",
    "show": "Show one checkpoint.",
    "diff": "Compare two checkpoints or pods.",
    "check": "Tell whether a checkpoint would work now.",
    "commit": "Let a branch take the place of its origin.",
    "discard": "Remove a checkpoint, or a pod with all that only it used.",
    "tag": "Name a checkpoint.",
    "untag": "Remove such names.",
    "gc": "Free what nothing refers to.",
    "fsck": "Verify everything that is kept.",
    "doctor": "Tell what this machine can do.",
    "pool": "Show the pool, grow it, unmount it.",
}
_ALIASES = {"fork": "branch"}
_MODULES = {"exec": "exec_"}


class Verbs(click.Group):
    """A group whose commands are the modules of this package."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        name = _ALIASES.get(cmd_name, cmd_name)
        if name not in _VERBS:
            return None
        module = importlib.import_module(f"podtree.cli.{_MODULES.get(name, name)}")
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """By the list above: `podtree --help` imports nothing."""
        with formatter.section("Verbs"):
            formatter.write_dl(list(_VERBS.items()))


@click.command(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="podtree")
def cli() -> None:
    """Run any program in a pod, save its processes and its files at one instant, branch off any past one.

    PODTREE_HOME names the place where everything is kept (/var/lib/podtree).
    """


def main() -> None:
    """The program `podtree`."""
    try:
        code = cli.main(standalone_mode=False)
        sys.stdout.flush()
    except PodtreeError as error:
        code = _report(error)
    except click.exceptions.Exit as error:
        code = error.exit_code
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except (click.Abort, KeyboardInterrupt):
        code = 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        code = 141
    sys.exit(code if isinstance(code, int) else 0)


def _report(error: PodtreeError) -> int:
    """To stderr for people; with --json as an object on stdout."""
    words = sys.argv[1:]
    if "--json" in words[: words.index("--") if "--" in words else len(words)]:
        import msgspec

        problems = [msgspec.to_builtins(p) for p in getattr(error, "problems", [])]
        data: dict[str, Any] = {"error": error.message, "hint": error.hint, "problems": problems}
        click.echo(msgspec.json.encode(data).decode())
    else:
        click.echo(f"podtree: {error.message}", err=True)
        if error.hint:
            click.echo(f"  {error.hint}", err=True)
    return error.exit_code
