"""podtree attach: this terminal, or this stdin and stdout, joined to a pod's."""

from __future__ import annotations

import sys

import click

from podtree.cli import common, logs, proxy
from podtree.errors import PodtreeError
from podtree.pod import control
from podtree.pod import spec as specs
from podtree.pod.spec import PodSpec
from podtree.pool.pool import Pool
from podtree.pool.records import PodRecord


@click.command("attach")
@click.option("--no-stdin", is_flag=True, help="Only watch.")
@click.option("--detach-keys", default=specs.DEFAULT_DETACH_KEYS, show_default=True, metavar="KEYS")
@common.json_flag("Print errors as JSON.")
@click.argument("ref", metavar="POD")
def command(no_stdin: bool, detach_keys: str, as_json: bool, ref: str) -> None:
    """Attach to a pod's stdin, stdout and stderr; its exit code is passed on.

    The detach keys leave it running. A pod that was started with -d and no terminal only writes to its
    log: attaching follows that.
    """
    keys = specs.parse_detach_keys(detach_keys)
    pool = common.open_pool()
    pod = pool.pod(ref)
    mode = PodSpec.from_dict(pod.spec).stdio
    if mode not in ("tty", "pipes"):
        sys.exit(_follow_log(pool, pod))
    terminal = mode == "tty" and proxy.is_terminal()
    client = control.connect(pool, pod)
    client.call("attach", size=common.terminal_size() if terminal else None)
    signals = proxy.Signals(terminal=terminal)
    joined = proxy.Proxy(
        client, signals, terminal=terminal, stdin=not no_stdin, detach_keys=keys,
        reconnect=lambda: proxy.come_back(pool, pod),
    )  # fmt: skip
    code = joined.run()
    if code is None:
        proxy.say(f"\ndetached from {pod.name}")
    sys.exit(code or 0)


def _follow_log(pool: Pool, pod: PodRecord) -> int:
    """Print what is added to the log; the exit code, once the pod has ended."""
    with control.connect(pool, pod) as client:  # the one who knows the code, also when the pod then is removed
        client.send({"do": "wait"})
        logs.follow(pool, pod, tail=0)
        try:
            return int(client.reply()["code"])
        except PodtreeError:  # the supervisor was replaced meanwhile
            return control.exit_code(pool, pod)
