"""What pyproject.toml cannot say: the cffi module, the reference VMM (a plain C program), and what lies beside the
package, where a distribution looks for it."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_ext import build_ext

# setuptools' own copy of it, which setuptools puts in place and has no other name for
from distutils.command.install_data import install_data  # isort: skip

VMM_SOURCES = sorted(str(path) for path in Path("tools/vmm").glob("*.c"))
VMM_FLAGS = ["-std=c11", "-D_GNU_SOURCE", "-O2", "-g", "-Wall", "-Wextra", "-Wconversion", "-Werror", "-pthread"]


class BuildExtAndVmm(build_ext):
    """Builds `gmemd-vmm` beside its package, for the demo, the tests and the benchmarks."""

    def run(self) -> None:
        super().run()
        root = Path("tools") if self.inplace else Path(self.build_lib, "gmemd_tools")
        objects = self.compiler.compile(VMM_SOURCES, output_dir=self.build_temp, extra_postargs=VMM_FLAGS)
        flags = ["-pthread", *shlex.split(os.environ.get("LDFLAGS", ""))]  # as libraries have them
        self.compiler.link_executable(objects, str(root / "vmm/gmemd-vmm"), extra_postargs=flags)


class InstallData(install_data):
    """Adds man pages and completion, which are made from what was built."""

    def run(self) -> None:
        build = self.get_finalized_command("build")
        made = Path(build.build_temp, "manual")
        lib = os.path.abspath(build.build_lib)
        subprocess.run(
            [sys.executable, "tools/manual/__main__.py", made], env=os.environ | {"PYTHONPATH": lib}, check=True
        )
        for path in sorted(path for path in made.rglob("*") if path.is_file()):
            self.data_files.append((str(path.relative_to(made).parent), [str(path)]))
        super().run()


# Below /usr, /usr/local or a virtual environment; the first two are looked through by systemd, udev and man.
DATA = {
    "lib/systemd/system": "systemd/gmemd*.s*",
    "lib/sysusers.d": "systemd/sysusers.d/*",
    "lib/udev/rules.d": "systemd/udev/*",
    "share/doc/gmemd": "docs/*.md",
    "share/doc/gmemd/grafana": "docs/grafana/*",
}

setup(
    cffi_modules=["gmemd/native/_build.py:ffibuilder"],
    cmdclass={"build_ext": BuildExtAndVmm, "install_data": InstallData},
    data_files=[(place, sorted(str(path) for path in Path().glob(files))) for place, files in DATA.items()],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
