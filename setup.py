"""The one thing pyproject.toml cannot say: the native kernels, built where there is a C++ compiler, left out where not.

It is no Python extension but a plain library with a C interface, loaded by ctypes: it needs no Python headers, fits any
torch, and one build serves every processor, for each source is compiled for the instructions it names.
"""

from setuptools import Extension, setup

native = Extension(
    "prerank.kernels._native",
    sources=[f"prerank/kernels/native/{name}.cpp" for name in ("processor",)],
    depends=["prerank/kernels/native/export.h"],
    language="c++",
    extra_compile_args=["-std=c++17", "-O3", "-fno-exceptions", "-fno-rtti", "-fvisibility=hidden", "-Wall", "-Wextra"],
    extra_link_args=["-pthread"],
    optional=True,  # without a compiler the torch path serves, and says so
)

setup(ext_modules=[native])
