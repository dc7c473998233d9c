"""One run: trainers, scores, the result."""
