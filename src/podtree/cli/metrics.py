"""podtree metrics: for Prometheus."""

from __future__ import annotations

from typing import Any

import click

from podtree.cli import common
from podtree.errors import UsageError
from podtree.pod import control
from podtree.pool.pool import Pool


@click.command("metrics")
@click.option("--listen", metavar="[HOST:]PORT", help="Serve them by HTTP to scrapers until ^C.")
@common.json_flag("Print a list of objects: what each supervisor counts.")
@click.argument("refs", nargs=-1, metavar="[POD...]")
def command(listen: str | None, as_json: bool, refs: tuple[str, ...]) -> None:
    """Print metrics of running pods (all, or those given), as their supervisors count them, in Prometheus' format."""
    pool = common.open_pool()
    for ref in refs:
        pool.pod(ref)
    if as_json:
        common.print_json(control.metrics(pool, refs))
    elif listen is None:
        click.echo(control.metrics_text(pool, refs), nl=False)
    else:
        _serve(pool, refs, *_address(listen))


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not port.isascii() or not port.isdigit() or not 0 < int(port) < 1 << 16:
        raise UsageError(f"--listen {text}: not a port", "--listen 9464, --listen 127.0.0.1:9464")
    return host.strip("[]") or "127.0.0.1", int(port)


def _serve(pool: Pool, refs: tuple[str, ...], host: str, port: int) -> None:
    from http.server import BaseHTTPRequestHandler, HTTPServer

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = control.metrics_text(pool, refs)
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_args: Any) -> None:
            pass

    with HTTPServer((host, port), Handler) as server:
        server.serve_forever()
