"""podtree doctor: what this machine can do."""

from __future__ import annotations

import sys

import click

from podtree.cli import common
from podtree.errors import Unsupported


@click.command("doctor")
@common.json_flag("Print a list of objects.")
def command(as_json: bool) -> None:
    """Try every feature that podtree uses, and say what is done without those that are missing.

    Exit status 7 if one is missing that can't be done without.
    """
    from podtree.doctor import examine

    probes = examine()
    if as_json:
        common.print_json(probes)
        sys.exit(Unsupported.exit_code if any(probe.needed and not probe.ok for probe in probes) else 0)
    else:
        width = max(len(probe.name) for probe in probes)
        for probe in probes:
            mark = "ok" if probe.ok else "MISSING" if probe.needed else "no"
            otherwise = f"; instead: {probe.otherwise}" if not probe.ok and probe.otherwise else ""
            click.echo(f"{mark:<7}  {probe.name:<{width}}  {probe.detail}{otherwise}")
    missing = [probe.name for probe in probes if probe.needed and not probe.ok]
    if missing and as_json:
        sys.exit(Unsupported.exit_code)
    if missing:
        raise Unsupported(f"this machine lacks: {', '.join(missing)}")
