"""Models: loading, fingerprint, preprocessing, augmentation, compilation, and the predictor that calls them."""
