"""Who looks: `podtree top` and `podtree metrics`, at pods that are recorded, that are not, and at none."""

from __future__ import annotations

import re
import socket
import subprocess
import urllib.request

from prometheus_client.parser import text_string_to_metric_families

from driver import SYSTEM_PYTHON, Podtree, until

COUNTER = "import time\nn = 0\nwhile True:\n    n += 1; time.sleep(0.02)"

UNSAVED = """
import fcntl, os, time
fcntl.fcntl(os.open("/tmp", os.O_RDONLY), fcntl.F_NOTIFY, fcntl.DN_DELETE)
time.sleep(1000)
"""


def samples(text: str, pod: str) -> dict[str, float]:
    """By name, of one pod; of histograms without buckets."""
    return {
        sample.name: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.labels.get("pod") == pod and "le" not in sample.labels
    }


def test_top(podtree: Podtree) -> None:
    assert podtree.json("top", "--once")["pods"] == []
    idle = podtree.run("sleep", "1000")
    pod = podtree.run(SYSTEM_PYTHON, "-c", COUNTER, options=["--every", "200ms"])
    until(lambda: podtree.json("record", pod.name)["taken"] >= 3, "three checkpoints")
    rest, busy = podtree.json("top", "--once")["pods"]
    assert (rest["name"], rest["checkpoints"], rest["pause_ms"], rest["last_durable_s"]) == (idle.name, 0, None, None)
    assert busy["checkpoints"] >= 3 and busy["per_second"] > 0 and busy["pause_ms"] > 0
    assert busy["bytes_per_second"] > 0 and busy["last_durable_s"] >= 0 and busy["lost"] == 0
    shown = podtree("top", "--once").out
    assert re.search(rf"^{pod.name} +running +\d+ +[\d.]+ +[\d.]+ ms ", shown, re.MULTILINE), shown
    idle.kill()
    idle.wait()
    assert [one["name"] for one in podtree.json("top", "--once")["pods"]] == [pod.name]
    assert len(podtree.json("top", "--once", "--all")["pods"]) == 2
    podtree("top", "--delay", "1ms", code=2)
    process = subprocess.Popen(
        [podtree.program, "top", "-d", "100ms"], env=podtree.env, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    with process, process.stdout:
        seen = 0
        while seen < 3:
            seen += process.stdout.readline().startswith(pod.name)
        process.terminate()


def test_metrics(podtree: Podtree) -> None:
    pod = podtree.run(SYSTEM_PYTHON, "-c", COUNTER)
    before = samples(podtree("metrics").out, pod.name)
    assert before["podtree_checkpoints_total"] == before["podtree_pause_seconds_count"] == 0
    pod.checkpoint()
    podtree("exec", "-d", pod.name, "--", SYSTEM_PYTHON, "-c", UNSAVED)
    until(lambda: podtree("checkpoint", pod.name, code=None).code == 3, "it can't be saved")
    podtree("record", pod.name, "--every", "2h")
    found = samples(podtree("metrics", pod.name).out, pod.name)
    assert found["podtree_checkpoints_total"] >= 1 and found["podtree_checkpoints_failed_total"] >= 1
    assert found["podtree_pause_seconds_count"] == found["podtree_checkpoints_total"]
    assert 0 < found["podtree_pause_seconds_sum"] < found["podtree_lag_seconds_sum"] + 60
    assert found["podtree_processes"] >= 2 and found["podtree_recorder_interval_seconds"] == 7200
    assert found["podtree_supervisor_resident_bytes"] > 1 << 20 and found["podtree_supervisor_descriptors"] > 3
    assert podtree.json("metrics", pod.name)[0]["tally"]["failed"] >= 1
    podtree("metrics", "no-such-pod", code=4)
    podtree("metrics", "--listen", "x", code=2)


def test_metrics_by_http(podtree: Podtree) -> None:
    pod = podtree.run("sleep", "1000")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with subprocess.Popen([podtree.program, "metrics", "--listen", str(port)], env=podtree.env) as server:
        try:

            def scrape() -> str:
                try:
                    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
                        return str(answer.read().decode())
                except OSError:
                    return ""

            assert samples(until(scrape, "it is served"), pod.name)["podtree_checkpoints_total"] == 0
        finally:
            server.terminate()
