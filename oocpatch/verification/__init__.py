"""Verification: outputs against their checksums, and `predict` against a plain computation in memory."""
