"""The importer against exports that somebody has made up: whatever is in them, an error with a name, or the same trees.

PODTREE_FUZZ sets the number of examples (`make torture`: many); a failure prints what reproduces it.
"""

from __future__ import annotations

import io
import json
import os
import random
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from podtree.errors import Damaged, PodtreeError
from podtree.pool import Pool
from podtree.pool.fsck import fsck
from podtree.transfer import ocitar, schema
from podtree.transfer.load import load
from pool_fixtures import fill, pool, pool_home, take  # noqa: F401
from test_pool_crash import assert_sound, every_death
from test_transfer import other, spec, strange_tree, untouched, write  # noqa: F401

# ruff: noqa: F811

EXAMPLES = int(os.environ.get("PODTREE_FUZZ", "60"))
FUZZ = settings(
    max_examples=EXAMPLES, deadline=None, print_blob=True, suppress_health_check=list(HealthCheck), database=None
)
NUMBERS = st.one_of(
    st.integers(-3, 3), st.sampled_from([1 << n for n in (16, 31, 32, 40, 62, 63)]), st.integers(-(1 << 63), 1 << 63)
)
WORDS = st.one_of(
    st.text(max_size=20),
    st.sampled_from(["", ".", "..", "../x", "/", "/etc/passwd", "a/../../b", "\0", "\0zz", "x" * 300, "upper/file"]),
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, WORDS, st.binary(max_size=40)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(WORDS, inner, max_size=3)),
    max_leaves=4,
)


class Parts:
    """An export taken apart, to be sealed again with other contents and all digests of blobs right."""

    def __init__(self, raw: bytes) -> None:
        self.files = {member.name: member.read(1 << 30) for member in ocitar.members(io.BytesIO(raw))}
        self.manifest = json.loads(self._blob(json.loads(self.files["index.json"])["manifests"][0]))
        self.config = json.loads(self._blob(self.manifest["config"]))
        self.layers = [(layer["mediaType"], self._blob(layer)) for layer in self.manifest["layers"]]
        (trees,) = (raw for kind, raw in self.layers if kind == schema.TREES_TYPE)
        self.trees = msgspec.msgpack.decode(schema.decompress(trees, schema.MAX_TREES, "trees"))

    def _blob(self, descriptor: dict[str, Any]) -> bytes:
        return self.files[f"blobs/{descriptor['digest'].replace(':', '/')}"]

    def seal(self, config: Any, trees: Any, layers: list[tuple[str, bytes]] | None = None) -> bytes:
        out = io.BytesIO()
        writer = ocitar.Writer(out)
        table = schema.compress(msgspec.msgpack.encode(trees))
        made = [
            writer.blob(kind, table if kind == schema.TREES_TYPE and layers is None else raw)
            for kind, raw in layers or self.layers
        ]
        manifest = {**self.manifest, "config": msgspec.to_builtins(writer.blob(schema.CONFIG_TYPE, _json(config)))}
        manifest["layers"] = [msgspec.to_builtins(layer) for layer in made]
        top = msgspec.to_builtins(writer.blob(schema.MANIFEST_TYPE, _json(manifest)))
        writer.finish(_json({"schemaVersion": 2, "mediaType": schema.INDEX_TYPE, "manifests": [top]}))
        return out.getvalue()


def _json(value: Any) -> bytes:
    return json.dumps(value, default=lambda raw: raw.hex()).encode()


def mutated(value: Any, data: st.DataObject) -> Any:
    """The value with one thing in it, however deep, replaced, removed or doubled."""
    if isinstance(value, dict) and value and data.draw(st.integers(0, 9)):
        key = data.draw(st.sampled_from(sorted(value)))
        how = data.draw(st.integers(0, 9))
        rest = {name: entry for name, entry in value.items() if name != key}
        return rest if how == 0 else {**value, key: mutated(value[key], data)}
    if isinstance(value, list) and value and data.draw(st.integers(0, 9)):
        at = data.draw(st.integers(0, len(value) - 1))
        how = data.draw(st.integers(0, 9))
        if how == 0:
            return value[:at] + value[at + 1 :]
        if how == 1:
            return [*value, value[at]]
        return [*value[:at], mutated(value[at], data), *value[at + 1 :]]
    if isinstance(value, int) and data.draw(st.booleans()):
        return value + data.draw(st.sampled_from([-1, 1, 4096, 65536]))
    return data.draw(VALUES)


@pytest.fixture
def parts(pool: Pool) -> Parts:
    web = pool.create_pod("web", spec())
    strange_tree(pool.vol_dir(web.id) / "upper")
    return Parts(write(pool, take(pool, web, "a")))


def test_any_mutation(parts: Parts, other: Pool) -> None:
    """Also where the digest over the table is right, as who makes up an export will see to."""
    lenient = parts.seal(parts.config, parts.trees)
    assert load(other, io.BytesIO(lenient)).id == parts.config["id"]
    forget(other)

    @FUZZ
    @given(st.data())
    def run(data: st.DataObject) -> None:
        config, trees = parts.config, parts.trees
        if data.draw(st.booleans()):
            config = mutated(config, data)
        else:
            trees = mutated(trees, data)
            config = resealed(config, trees, parts)
        try:
            raw = parts.seal(config, trees)
        except (ValueError, OverflowError, TypeError):
            return
        try:
            load(other, io.BytesIO(raw))
        except PodtreeError:
            untouched(other)
        except OSError as error:
            assert error.errno is not None
            untouched(other)
        else:
            assert fsck(other).damage == ()
            forget(other)

    run()


def resealed(config: dict[str, Any], trees: Any, parts: Parts) -> dict[str, Any]:
    """As an attacker does it: the digests are those of the table."""
    from podtree.transfer.chunks import ChunkTable
    from podtree.transfer.load import _table_digest

    (raw,) = (raw for kind, raw in parts.layers if kind == schema.CHUNKS_TYPE)
    try:
        typed = msgspec.convert(trees, schema.Trees, strict=False)
        table = ChunkTable(raw, config["own"], config["foreign"])
        found = {name: _table_digest(name, getattr(typed, name), table) for name in ("vol", "img", "base")}
    except Exception:
        return config
    below = {**config["below"], "carried": found["base"] if typed.base else ""}
    return {**config, "digest": schema.content_digest(found["vol"], found["img"]), "below": below}


def forget(pool: Pool) -> None:
    """As if nothing had been imported."""
    for tag in pool.tags():
        pool.untag(tag)
    for record in pool.checkpoints():
        pool.discard(record)
    pool.gc(timeout=0)


def test_other_blobs(parts: Parts, other: Pool) -> None:
    """Blobs cut, exchanged, emptied, doubled, left out; packs with other chunks in them."""
    chance = random.Random(7)
    for number, (kind, raw) in enumerate(parts.layers):
        plain = schema.decompress(raw, 1 << 30, "x")
        flipped = bytearray(plain)
        flipped[chance.randrange(len(plain))] ^= 4
        for bad in (raw[:-1], raw[: len(raw) // 2], b"", schema.compress(plain[:-1]), schema.compress(plain + b"\0"),
                    schema.compress(bytes(flipped)), schema.compress(b""), raw + raw):  # fmt: skip
            layers = [*parts.layers[:number], (kind, bad), *parts.layers[number + 1 :]]
            with pytest.raises(Damaged):
                load(other, io.BytesIO(parts.seal(parts.config, parts.trees, layers)))
        for layers in ([*parts.layers, (kind, raw)], parts.layers[:number] + parts.layers[number + 1 :]):
            with pytest.raises(Damaged):
                load(other, io.BytesIO(parts.seal(parts.config, parts.trees, layers)))
    untouched(other)


@FUZZ
@given(st.binary(max_size=2000), st.integers(0, 2))
def test_any_bytes_as_an_archive(raw: bytes, head: int) -> None:
    prefix = (b"", bytes(257) + b"ustar\x0000", b"oci-layout".ljust(100, b"\0"))[head]
    try:
        for member in ocitar.members(io.BytesIO(prefix + raw)):
            member.read(1 << 16)
    except PodtreeError:
        pass


def test_killed_anywhere(pool: Pool, other: Pool) -> None:
    """An import that dies at any point has happened or not; the next one works."""
    web = pool.create_pod("web", spec())
    fill(pool, web, "b")
    raw = write(pool, take(pool, web, "b"))

    def check(_number: int) -> None:
        known = other.checkpoints()
        other.gc(timeout=0)
        assert [one.id for one in other.checkpoints()] == [one.id for one in known]
        assert_sound(other)
        forget(other)

    assert every_death(other, lambda to: load(to, io.BytesIO(raw)), check) >= 3
    assert not load(other, io.BytesIO(raw)).known
