"""The Debian package: how it is built, and its life under systemd."""
