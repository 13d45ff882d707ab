"""Has libFuzzer drive a target of targets.py. usage: python -m fuzz.drive TARGET LIBFUZZER-OPTION… FOLDER…"""

import importlib
import logging
import sys
from typing import Any

atheris: Any = importlib.import_module("atheris")  # only where something is fuzzed
with atheris.instrument_imports(include=["gmemd", "fuzz"], exclude=["gmemd.native"], enable_loader_override=False):
    from fuzz import targets

if __name__ == "__main__":
    logging.disable()  # each damaged block of a trace is a warning
    name = sys.argv.pop(1)
    sys.argv[0] = f"{sys.executable} -m fuzz.drive {name}"  # what it runs again to merge corpora
    atheris.Setup(sys.argv, targets.TARGETS[name])
    atheris.Fuzz()
