"""What the tests above the native layer share: peers played in Python, daemons started as processes, bad links."""
