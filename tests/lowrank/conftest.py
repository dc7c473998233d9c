"""Property tests here run on machines that are busy with others: a slow example is no failure."""

from hypothesis import settings

settings.register_profile("busy machine", deadline=None)
settings.load_profile("busy machine")
