"""One call of `predict`: plan, refuse or resume, run the stages, record success."""
