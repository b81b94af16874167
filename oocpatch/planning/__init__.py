"""Floor 0, decide: integers in, integers out. Imports the standard library and numpy only."""
