"""Pages that are dropped between two checkpoints aren't taken for what they were."""

from __future__ import annotations

from driver import PROGRAMS, SYSTEM_PYTHON, Podtree


def test_dropped_pages(podtree: Podtree) -> None:
    pod = podtree.run(SYSTEM_PYTHON, PROGRAMS / "dropped_pages.py")
    pod.wait_log("filled")
    pod.checkpoint()
    pod.sh("touch /tmp/filled")
    pod.wait_log("dropped")
    pod.checkpoint()
    second = podtree.branch(f"{pod.name}@2")
    second.checkpoint()
    pods = [pod, second, podtree.branch(f"{second.name}@1")]
    for one in pods:
        one.sh("touch /tmp/dropped")
        assert one.wait() == 0, one.logs()
        assert one.logs().endswith("OK\n")
