"""Prediction over many pictures: where they come from, and where results go."""
