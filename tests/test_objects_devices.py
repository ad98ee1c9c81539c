"""Device nodes without state, and the refusal of those with state."""

from __future__ import annotations

import os
from typing import Any

import pytest

from holder import World, world
from podtree.errors import RestoreFailed
from podtree.objects.devices import Device, restore

__all__ = ["world"]


def test_devices(world: World) -> None:
    outside = os.open("/dev/null", os.O_RDWR | os.O_APPEND)

    def hold() -> dict[str, Any]:
        names = {n: os.open(f"/dev/{n}", os.O_RDWR) for n in ("null", "zero", "full", "random", "urandom")}
        return {**names, "outside": outside}

    def check(names: dict[str, Any]) -> None:
        assert os.read(names["null"], 5) == b""
        assert os.read(names["zero"], 5) == bytes(5)
        with pytest.raises(OSError, match="No space"):
            os.write(names["full"], b"x")
        assert len(set(os.read(names["urandom"], 50))) > 5
        assert len(os.read(names["random"], 50)) == 50
        assert os.write(names["outside"], b"x") == 1

    pid = world.hold(hold, keep=(outside,))
    saved = world.collect([pid])
    assert saved.problems == []
    assert saved.of("outside").what == Device("/dev/null", 1, 3)
    world.end(pid)
    world.finish(world.restore(saved, check))
    os.close(outside)


def test_device_with_state_is_refused(world: World) -> None:
    kmsg = os.open("/dev/kmsg", os.O_RDONLY)
    pid = world.hold(lambda: {"fd": kmsg}, keep=(kmsg,))
    os.close(kmsg)
    saved = world.collect([pid])
    assert len(saved.problems) == 1
    assert "character device 1:11" in saved.problems[0]


def test_hostile_image_opens_no_other_device() -> None:
    with pytest.raises(RestoreFailed, match="not allowed"):
        restore(Device("/dev/mem", 1, 1), os.O_RDWR)
    with pytest.raises(RestoreFailed):
        restore(Device("/etc/passwd", 1, 99), os.O_RDWR)
