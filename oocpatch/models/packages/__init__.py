"""Model packages: models with what they say of their patches, preprocessing and outputs."""
