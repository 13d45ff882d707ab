"""Postcopy live migration of KVM guest memory over userfaultfd."""

__version__ = "0.1.0"
