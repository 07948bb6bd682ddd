"""What a run tells about itself: figures, the console, trackers."""
