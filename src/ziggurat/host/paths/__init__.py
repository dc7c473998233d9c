"""Low-rank paths around transformer layers, and the hand-over of a span's input to its last layer."""
