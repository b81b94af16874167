"""Floor 2', feed: subjects, samplers, the queue and their loader. Owns torch, and dask in one file."""

# Imported for what it does: whoever has a subject can stack it with a plain DataLoader.
from oocpatch.sampling import loader as loader
