"""The two things that pyproject.toml cannot say: the cffi module, and the reference VMM (a plain C program)."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_ext import build_ext

VMM_SOURCES = sorted(str(path) for path in Path("tools/vmm").glob("*.c"))
VMM_FLAGS = ["-std=c11", "-D_GNU_SOURCE", "-O2", "-g", "-Wall", "-Wextra", "-Wconversion", "-Werror", "-pthread"]


class BuildExtAndVmm(build_ext):
    """Builds `gmemd-vmm` beside its package, for the demo, the tests and the benchmarks."""

    def run(self) -> None:
        super().run()
        root = Path("tools") if self.inplace else Path(self.build_lib, "gmemd_tools")
        objects = self.compiler.compile(VMM_SOURCES, output_dir=self.build_temp, extra_postargs=VMM_FLAGS)
        self.compiler.link_executable(objects, str(root / "vmm/gmemd-vmm"), extra_postargs=["-pthread"])


setup(
    cffi_modules=["gmemd/native/_build.py:ffibuilder"],
    cmdclass={"build_ext": BuildExtAndVmm},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
