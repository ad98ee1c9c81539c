"""podtree's command line: verbs are imported when they are called, errors are printed here and nowhere else."""

from __future__ import annotations

import errno
import importlib
import os
import sys
from typing import Any

import click

from podtree.errors import PodtreeError, UsageError, printable

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
_HINTS = {
    errno.EROFS: "set PODTREE_HOME to a place that can be written to",
    errno.ENOSPC: "podtree discard what isn't needed, then podtree gc; or free space on the disk",
    errno.EACCES: "podtree needs to be root",
    errno.EPERM: "podtree needs to be root, with the right to make namespaces, mounts and loop devices",
    errno.EIO: "the disk is failing, or what is kept is damaged: podtree fsck",
}


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
        _check_words()
        code = cli.main(standalone_mode=False)
        sys.stdout.flush()
    except PodtreeError as error:
        code = _report(error)
    except click.exceptions.Exit as error:
        code = error.exit_code
    except click.ClickException as error:
        code = _report_usage(error)
    except (click.Abort, KeyboardInterrupt):
        code = 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        code = 141
    except OSError as error:
        code = _report(_as_error(error))
    sys.exit(code if isinstance(code, int) else 0)


def _check_words() -> None:
    """Names, messages and programs go into JSON and the index, which hold text."""
    for word in sys.argv[1:]:
        if not word.isascii() and word != word.encode(errors="replace").decode():
            raise UsageError(f"not valid UTF-8: {os.fsencode(word)!r}")


def _as_error(error: OSError) -> PodtreeError:
    """What the system refused, without the way there."""
    what = error.strerror or str(error) or type(error).__name__
    place = f": {os.fsdecode(error.filename)}" if isinstance(error.filename, str | bytes) else ""
    return PodtreeError(what + place, _HINTS.get(error.errno or 0, ""))


def _wants_json() -> bool:
    words = sys.argv[1:]
    return "--json" in words[: words.index("--") if "--" in words else len(words)]


def _report(error: PodtreeError) -> int:
    """To stderr for people; with --json as an object on stdout."""
    if _wants_json():
        import msgspec

        problems = [msgspec.to_builtins(p) for p in getattr(error, "problems", [])]
        data: dict[str, Any] = {
            "error": printable(error.message), "hint": printable(error.hint), "problems": problems,
        }  # fmt: skip
        click.echo(msgspec.json.encode(data).decode())
    else:
        click.echo(f"podtree: {_printable(error.message)}", err=True)
        if error.hint:
            click.echo(f"  {_printable(error.hint)}", err=True)
    return error.exit_code


def _printable(text: str) -> str:
    """Names come from pods, and must not drive the terminal; line ends are the message's own."""
    return "\n".join(printable(line) for line in text.split("\n"))


def _report_usage(error: click.ClickException) -> int:
    """A word that click doesn't understand."""
    if _wants_json():
        return _report(UsageError(error.format_message(), "podtree VERB --help"))
    error.show()
    return error.exit_code
