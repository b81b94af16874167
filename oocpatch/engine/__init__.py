"""The two stages of a run: predict sweeps a block, normalize finishes the voxels that several blocks share."""
