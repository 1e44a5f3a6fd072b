"""Where frame pairs come from: procedural scenes, video files, frame folders, TFDS; and truth."""
