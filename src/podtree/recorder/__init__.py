"""Checkpoints that a pod takes of itself, at a rate, and the thinning of the old ones."""
