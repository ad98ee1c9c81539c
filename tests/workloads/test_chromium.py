"""Headless Chromium and a page that counts, with its sandbox: user, pid and net namespaces, an empty root, seccomp."""

from __future__ import annotations

import json
from typing import Any

import pytest

from driver import Pod, Podtree, until

HOME = "/tmp/chromium"
PAGE = "data:text/html,<script>n=0;setInterval(()=>document.title=++n,50)</script>"
START = f"""
mkdir -p {HOME}
exec chromium --headless=new --disable-gpu --disable-dev-shm-usage --no-first-run --user-data-dir={HOME}/data \\
    --remote-debugging-port=9222 '{PAGE}' 2>/dev/null
"""
ASK = """
import urllib.request as u
print(u.urlopen(u.Request("http://127.0.0.1:9222/json{path}", method="{method}"), timeout=60).read().decode())
"""


def ask(pod: Pod, path: str = "", method: str = "GET") -> Any:
    """What the browser's debugging port answers."""
    return json.loads(pod.python(ASK.format(path=path, method=method), timeout=90))


def counts(pod: Pod) -> list[int]:
    """How far the open pages have counted."""
    return [int(page["title"]) for page in ask(pod) if page["url"].startswith("data:") and page["title"].isdigit()]


def counts_on(pod: Pod, least: int, pages: int = 1) -> int:
    """Waits until all pages have counted beyond a number; how far the first one has got."""

    def probe() -> list[int]:
        try:
            found = counts(pod)
        except Exception:  # not there yet
            return []
        return found if len(found) == pages and min(found) > least else []

    return int(min(until(probe, f"{pages} pages have counted beyond {least}", 90, 0.3)))


def renderers(pod: Pod) -> list[str]:
    """Pids in all namespaces of what shows pages; it comes and goes with them."""
    script = "for p in /proc/[0-9]*; do grep -qa type=renderer $p/cmdline && grep ^NSpid: $p/status; done; true"
    return pod.sh(script).splitlines()


@pytest.mark.needs("chromium")
@pytest.mark.timeout(300)
def test_chromium(podtree: Podtree) -> None:
    options = ["--nested", "-u", "1234:1234", "-e", f"HOME={HOME}"]
    pod = podtree.run("sh", "-c", START, name="chromium", options=options)
    before = counts_on(pod, 10)
    sandboxed = renderers(pod)
    assert any(len(line.split()) == 4 for line in sandboxed), sandboxed
    checkpoint = pod.checkpoint()
    pod.kill()
    branch = podtree.branch(checkpoint, pod.name)
    after = counts_on(branch, before)
    found = renderers(branch)
    assert [line for line in sandboxed if line in found and len(line.split()) == 4], (sandboxed, found)
    ask(branch, f"/new?{PAGE}", "PUT")
    counts_on(branch, 10, pages=2)
    again = podtree.branch(branch.checkpoint(), pod.name)
    branch.kill()
    counts_on(again, after, pages=2)
