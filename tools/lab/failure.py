"""How the lab fails. Each failure carries the exit status that says it."""

import os


class LabError(Exception):
    """The caller named something that is not there, or makes no sense."""

    status = os.EX_NOINPUT


class Unavailable(LabError):
    """This machine lacks what the lab needs: a program, a kernel."""

    status = os.EX_UNAVAILABLE
