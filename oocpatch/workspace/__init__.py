"""The workspace of a run: its plan, its partial sums and the ledger of what is done."""
