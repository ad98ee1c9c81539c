"""Kernel objects that a task can hold: one module each, with state, collect and restore in one file."""
