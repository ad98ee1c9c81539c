"""Volume backends: how a pool keeps file trees that can be snapshotted at an instant and cloned."""
