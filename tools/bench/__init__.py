"""Measurements: gmemd beside the floor of the machine and beside its peers."""
