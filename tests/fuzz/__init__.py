"""Fuzzing of what reads foreign bytes."""
