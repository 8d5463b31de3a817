"""The prediction room: many images, videos and data sets through one checkpoint, results written as they come."""
