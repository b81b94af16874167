"""Decisions of a run: grids, blocks, memory and the plan. Integers in, integers out; numpy only."""
