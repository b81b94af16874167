"""Objects in volumes of labels or scores: connected components over blocks, merged exactly at any size."""
