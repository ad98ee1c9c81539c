"""podtree run: a new pod."""

from __future__ import annotations

import sys
from typing import Any

import click

from podtree.cli import common, proxy
from podtree.cli.record import recorder_settings, recording_options
from podtree.objects.external import policy
from podtree.pod import control, rootfs
from podtree.pod import spec as specs
from podtree.pod.spec import PodSpec, StdioMode
from podtree.pool.pool import Pool
from podtree.recorder.settings import Settings


@click.command("run", cls=common.ProgramCommand, context_settings={"allow_interspersed_args": False})
@click.option("--name", help="The pod's name; one is made up if there is none.")
@click.option("-d", "--detach", is_flag=True, help="Leave it running; print its name.")
@click.option("-t", "--tty", is_flag=True, help="Give it a terminal, also with -d.")
@click.option("-i", "--interactive", is_flag=True, help="With -d: keep stdin open for attach.")
@click.option("-e", "--env", multiple=True, metavar="NAME[=VALUE]", help="A variable.")
@click.option("-w", "--workdir", metavar="DIR", help="Where it starts [here, or /].")
@click.option("--hostname", help="[the pod's name]")
@click.option("-u", "--user", default="", metavar="NAME|UID[:GROUP]", help="[root]")
@click.option("-v", "--volume", multiple=True, metavar="SRC:DST[:ro]", help="Show a host directory.")
@click.option("--rootfs", "root", metavar="DIR|TAR|OCI[:NAME]", help="Its root, instead of the host's own.")
@click.option("--memory", metavar="SIZE", help="At most this much memory: 512m.")
@click.option("--cpus", type=float, metavar="N", help="At most this many CPUs: 1.5.")
@click.option("--pids", type=int, metavar="N", help="At most this many tasks [half of the machine's].")
@click.option("--nested", is_flag=True, help="Let programs make user namespaces, and others in them.")
@click.option("--rm", "remove", is_flag=True, help="Remove the pod when it ends, unless it has checkpoints.")
@common.external_option
@click.option("--detach-keys", default=specs.DEFAULT_DETACH_KEYS, show_default=True, metavar="KEYS")
@recording_options
@common.json_option
@click.argument("argv", nargs=-1, type=click.UNPROCESSED, metavar="-- COMMAND [ARGUMENT]...")
def command(
    name: str | None,
    detach: bool,
    tty: bool,
    interactive: bool,
    env: tuple[str, ...],
    workdir: str | None,
    hostname: str | None,
    user: str,
    volume: tuple[str, ...],
    root: str | None,
    memory: str | None,
    cpus: float | None,
    pids: int | None,
    nested: bool,
    remove: bool,
    external: str | None,
    detach_keys: str,
    as_json: bool,
    argv: tuple[str, ...],
    **recording: Any,
) -> None:
    """Run a command in a new pod, over the host's own files (the pod's writes are kept apart).

    In the foreground the exit code is the command's; 126 and 127: the command can't be executed, or isn't
    there; podtree's own failures have the codes that README.md lists.
    """
    keys = specs.parse_detach_keys(detach_keys)
    recorded = recorder_settings(recording)
    terminal = not detach and proxy.is_terminal()
    stdio: StdioMode = "tty" if tty or terminal else "pipes" if interactive or not detach else "log"
    pool = common.open_pool()
    spec = PodSpec(
        argv=argv,
        env=specs.environment(env, host_root=root is None, tty=stdio == "tty"),
        cwd=specs.working_directory(workdir, host_root=root is None),
        hostname=hostname or "",
        user=user,
        stdio=stdio,
        interactive=interactive,
        merged=not detach and proxy.outputs_are_one(),
        volumes=tuple(specs.parse_volume(v) for v in volume),
        rootfs=rootfs.prepare(pool.root, root) if root else None,
        memory=specs.parse_size(memory) if memory else None,
        cpus=cpus,
        pids=pids,
        auto_remove=remove,
        external=policy(external) or "refuse",
        nested=nested,
    )
    size = common.terminal_size() if stdio == "tty" else None
    if detach:
        result = control.run(pool, name, spec, size=size, recorded=recorded)
        common.print_json(result) if as_json else click.echo(result["pod"])
        return
    sys.exit(_foreground(pool, name, spec, size, terminal, keys, recorded))


def _foreground(
    pool: Pool,
    name: str | None,
    spec: PodSpec,
    size: tuple[int, int] | None,
    terminal: bool,
    keys: bytes,
    recorded: Settings | None,
) -> int:
    signals = proxy.Signals(terminal=terminal)
    pod = control.create(pool, name, spec)
    client, _ = control.start_or_remove(pool, pod, attach=True, size=size)
    control.record_from_start(pool, pod, recorded)

    joined = proxy.Proxy(
        client, signals, terminal=terminal, detach_keys=keys, reconnect=lambda: proxy.come_back(pool, pod)
    )
    code = joined.run()
    if code is None:
        proxy.say(f"\ndetached from {pod.name}: podtree attach {pod.name}")
        return 0
    joined.linger()
    return code
