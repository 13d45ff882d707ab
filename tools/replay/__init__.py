"""`gmemd-replay`: plays recorded faults against a daemon and a source."""
