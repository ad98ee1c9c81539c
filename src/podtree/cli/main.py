"""podtree's command line: verbs are imported when they are called, errors are printed here and nowhere else."""

from __future__ import annotations

import importlib
import os
import signal
import sys

import click

from podtree.cli import common
from podtree.errors import PodtreeError, UsageError

_VERBS = {
    "run": "Run a command in a new pod.",
    "exec": "Run a command in a running pod.",
    "attach": "Attach this terminal to a pod.",
    "logs": "Show what a pod has written.",
    "ps": "List pods.",
    "top": "Watch pods and their checkpoints.",
    "metrics": "Tell Prometheus of running pods.",
    "stop": "Stop pods: SIGTERM, then SIGKILL.",
    "kill": "Send pods a signal.",
    "wait": "Wait for pods to end; print their exit codes.",
    "rm": "Remove pods.",
    "checkpoint": "Save a pod: its processes and its files, at one instant.",
    "mark": "Save a moment that is worth keeping.",
    "record": "Checkpoint a pod again and again, or no longer.",
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
    "export": "Write a checkpoint to a file.",
    "import": "Take in a checkpoint from a file.",
    "gc": "Free what nothing refers to.",
    "fsck": "Verify everything that is kept.",
    "doctor": "Tell what this machine can do.",
    "pool": "Show the pool, unmount it, make its index again.",
}
_ALIASES = {"fork": "branch"}
_MODULES = {"exec": "exec_", "import": "import_"}
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
    _open_standard_streams()
    wanted = common.Wanted(json="--json" in _own_words(sys.argv[1:]))
    try:
        # Not by cli.main(), which has ways of its own with errors of stdout.
        with cli.make_context("podtree", sys.argv[1:], obj=wanted) as context:
            cli.invoke(context)
        sys.stdout.flush()
        code = 0
    except PodtreeError as error:
        code = _report(error, wanted)
    except click.exceptions.Exit as error:
        code = error.exit_code
    except click.ClickException as error:
        code = _report_usage(error, wanted)
    except (click.Abort, KeyboardInterrupt):
        code = 130
    except BrokenPipeError:
        code = _nobody_reads()
    except OSError as error:
        code = _report(common.as_podtree_error(error), wanted)
    sys.exit(code)


def _open_standard_streams() -> None:
    """/dev/null in the place of 0, 1 and 2 where they are closed.

    Otherwise the index or a socket would be opened there, and what a pod prints would be written to it.
    """
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest that is free: this one
    sys.stdin = sys.stdin or open(0, closefd=False)
    sys.stdout = sys.stdout or open(1, "w", closefd=False)
    sys.stderr = sys.stderr or open(2, "w", closefd=False)


def _own_words(words: list[str]) -> list[str]:
    """Without a program's words behind `--`. Only a guess, for errors that come before options are understood."""
    return words[: words.index("--")] if "--" in words else words


def _nobody_reads() -> int:
    """stdout is a pipe without a reader; as if SIGPIPE had ended this command."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return 128 + signal.SIGPIPE


def _report_usage(error: click.ClickException, wanted: common.Wanted) -> int:
    if not wanted.json:
        error.show()
        return error.exit_code
    context = getattr(error, "ctx", None)
    hint = f"{context.command_path} --help" if context is not None else "podtree --help"
    return _report(UsageError(error.format_message(), hint), wanted)


def _report(error: PodtreeError, wanted: common.Wanted) -> int:
    """To stderr for people; with --json as an object on stdout."""
    if os.environ.get("PODTREE_DEBUG"):
        import traceback

        traceback.print_exception(error)
    try:
        if wanted.json:
            common.print_json(common.error_json(error))
            sys.stdout.flush()
        else:
            common.print_error(error)
    except BrokenPipeError:
        _nobody_reads()
    except OSError:  # a full disk: the exit code is what can still be told
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return error.exit_code
