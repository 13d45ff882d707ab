"""`gmemd demo`: the whole main job on one machine."""
