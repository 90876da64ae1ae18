"""Judges of open-ended answers: a model that says whether an answer means what the gold answer means."""
