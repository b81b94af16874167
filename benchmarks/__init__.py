"""How fast a run is, how much memory it adds, and where its time goes. Run by hand: `python -m benchmarks --help`.

Every figure comes from a fresh process; contenders take turns, so that a slow minute of the machine hits all of them; a
figure is the median of its rounds.
"""
