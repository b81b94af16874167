"""Samplers of patches for training: subjects, grids, random samplers, the queue and its loader."""

# Registers the collation of subjects: a plain DataLoader can stack them, too.
from oocpatch.sampling import loader as loader
