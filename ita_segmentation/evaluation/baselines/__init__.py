"""Other transformers models, scored on the same images by the same metrics."""
