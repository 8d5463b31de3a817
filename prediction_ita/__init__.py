"""The prediction room: many pictures, videos and data sets through one checkpoint, results written as they come."""
