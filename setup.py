"""The one thing pyproject.toml cannot say: the native kernels, built where there is a C++ compiler, left out where not.

It is no Python extension but a plain library with a C interface, loaded by ctypes: it needs no Python headers, fits any
torch, and one build serves every processor, for each source is compiled for the instructions it names.
"""

from setuptools import Extension, setup

SOURCES = (
    "processor",
    "greedy",
    "eligible",
    "program_engine",
    *("program_portable", "program_avx2", "program_avx512", "program_amx"),
    *("scan", "scan_portable", "scan_avx2", "scan_avx512"),
    "walk",
    "turns",
    "lookup",
)
HEADERS = (
    *("export.h", "program.h", "program_block.inc", "program_int8.inc"),
    *("scan.h", "scan_rows.inc", "stop.h", "turns.h"),
)
FLAGS = (
    *("-std=c++17", "-O3", "-fno-exceptions", "-fno-rtti", "-fvisibility=hidden"),
    *("-fno-math-errno", "-fno-trapping-math"),  # neither is looked at, and both keep loops from becoming vectors
    *("-Wall", "-Wextra", "-Wno-psabi", "-Wno-maybe-uninitialized", "-Wno-uninitialized"),
)

native = Extension(
    "prerank.kernels._native",
    sources=[f"prerank/kernels/native/{name}.cpp" for name in SOURCES],
    depends=[f"prerank/kernels/native/{name}" for name in HEADERS],
    language="c++",
    extra_compile_args=list(FLAGS),
    extra_link_args=["-pthread"],
    optional=True,  # without a compiler the torch path serves, and says so
)

setup(ext_modules=[native])
