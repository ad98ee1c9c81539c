"""Checkpoints in files: one self-contained, checksummed stream for each, and the way back into a pool.

`export` writes, `load` reads; `schema` is the format of both, `ocitar` the archive around it, `tree` and `build` are
file trees to and from it, `chunks` where their contents are, `below` the files below the pod. See docs/format.md.
"""
