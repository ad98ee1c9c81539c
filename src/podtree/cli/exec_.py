"""podtree exec: another process in a running pod."""

from __future__ import annotations

import sys

import click

from podtree.cli import common, proxy
from podtree.pod import control
from podtree.pod import spec as specs
from podtree.pod.spec import StdioMode


@click.command("exec", cls=common.ProgramCommand, context_settings={"allow_interspersed_args": False})
@click.option("-i", "--interactive", is_flag=True, help="Pass stdin on (with a terminal it always is).")
@click.option("-t", "--tty", is_flag=True, help="Give it a terminal of its own.")
@click.option("-d", "--detach", is_flag=True, help="Don't wait for it; its output goes nowhere.")
@click.option("-e", "--env", multiple=True, metavar="NAME[=VALUE]", help="A variable.")
@click.option("-w", "--workdir", metavar="DIR", help="Where it starts [as the pod's own command did].")
@click.option("-u", "--user", metavar="NAME|UID[:GROUP]", help="[as the pod's own command]")
@click.option("--detach-keys", default=specs.DEFAULT_DETACH_KEYS, show_default=True, metavar="KEYS")
@common.json_option
@click.argument("ref", metavar="POD")
@click.argument("argv", nargs=-1, type=click.UNPROCESSED, metavar="-- COMMAND [ARGUMENT]...")
def command(
    interactive: bool,
    tty: bool,
    detach: bool,
    env: tuple[str, ...],
    workdir: str | None,
    user: str | None,
    detach_keys: str,
    as_json: bool,
    ref: str,
    argv: tuple[str, ...],
) -> None:
    """Run a command in a running pod: same namespaces, limits and privileges. Its exit code is passed on."""
    if argv[:1] == ("--",):
        argv = argv[1:]
    keys = specs.parse_detach_keys(detach_keys)
    pool = common.open_pool()
    pod = pool.pod(ref)
    stdio: StdioMode = "null" if detach else "tty" if tty else "pipes"
    terminal = tty and not detach and proxy.is_terminal()
    signals = proxy.Signals(terminal=terminal)
    client, result = control.execute(
        pool, pod, argv, stdio=stdio, env=env, cwd=workdir, user=user,
        size=common.terminal_size() if tty else None, attach=not detach, merged=proxy.outputs_are_one(),
    )  # fmt: skip
    if detach:
        common.print_json({"pod": pod.name, "pid": result["pid"]}) if as_json else None
        return
    stdin = interactive or terminal
    joined = proxy.Proxy(
        client, signals, terminal=terminal, stdin=stdin, end_stdin=not stdin, detach_keys=keys,
        reconnect=lambda: proxy.come_back(pool, pod, result["name"]),
    )  # fmt: skip
    code = joined.run()
    if code is None:
        proxy.say(f"\ndetached; it runs on in {pod.name}")
    sys.exit(code or 0)
