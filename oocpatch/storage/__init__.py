"""Bytes on disk and in object stores that are there whole or not at all: paths, files, locks, checksums, chunks."""
