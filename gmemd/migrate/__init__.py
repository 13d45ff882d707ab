"""The migration itself: wire format and state machine without I/O; source and destination on trio."""
