"""`gmemd-replay report`: one or two runs as a page of pictures."""
