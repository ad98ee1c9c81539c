"""Measurements of podtree on this machine: `make bench`."""
