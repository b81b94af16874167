"""Samplers of patches for training: subjects, grids, random samplers, the queue and its loader."""

# The import registers how subjects are collated, so that a plain DataLoader can stack them, too.
from oocpatch.sampling import loader as loader
