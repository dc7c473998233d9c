"""Low-rank paths around transformer layers, and how the input of a span reaches its last layer."""
