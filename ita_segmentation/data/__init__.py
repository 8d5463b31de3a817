"""Data: benchmarks, augmentation and the Scenes world."""
