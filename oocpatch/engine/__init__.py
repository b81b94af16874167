"""The two stages of a run: predict sweeps a block, normalize completes the voxels that several blocks share."""
