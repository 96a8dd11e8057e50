"""Who runs the Triton versions, and that each kernel compiles for GPUs that are not here."""

import json
import os
import pkgutil
import subprocess
import sys
from importlib import import_module

import pytest
import torch

from prerank.kernels import cross, eligible, gather_add, greedy, triton
from tests.conftest import ROOT
from tests.kernels.operations import asked

MODULES = {"eligible_rows": eligible, "greedy_top_k": greedy, "gather_add": gather_add, "cross_layer": cross}

needs_triton = pytest.mark.skipif(not triton.is_here(), reason="Triton is not installed")


@pytest.fixture
def not_installed(monkeypatch: pytest.MonkeyPatch):
    triton.is_here.cache_clear()
    monkeypatch.setitem(sys.modules, "triton", None)
    yield
    triton.is_here.cache_clear()


@needs_triton
def test_it_serves_cuda_devices_and_no_others():
    assert triton.serves(torch.device("cuda", 1))
    assert not triton.serves(torch.device("cpu"))


@pytest.mark.usefixtures("not_installed")
def test_it_serves_no_device_where_it_is_not_installed():
    assert not triton.serves(torch.device("cuda", 1))


@pytest.mark.parametrize("name", sorted(MODULES))
def test_what_it_serves_is_given_to_it(name, monkeypatch: pytest.MonkeyPatch):
    function, tensors = asked()[name]
    told = []
    monkeypatch.setattr(MODULES[name], "by_triton", lambda *arguments: told.append(arguments) or "answered")
    assert isinstance(function(*tensors), torch.Tensor)
    monkeypatch.setattr(triton, "serves", lambda device: device == tensors[0].device)
    assert function(*tensors) == "answered"
    assert len(told) == 1
    assert all(given is tensor for given, tensor in zip(told[0], tensors, strict=False))


def test_a_machine_without_it_imports_everything_that_serves():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import prerank.bundle.scorer, prerank.kernels.cross, prerank.kernels.gather_add\n"
        "assert not [name for name in sys.modules if name.startswith('prerank.kernels.triton.')]"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, cwd=ROOT)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """A line a kernel, its types and a GPU, of a process in which Triton compiles."""
    told = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("compiled"))}
    told.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-W", "error", "-m", "tests.kernels.compile_triton"]
    done = subprocess.run(command, cwd=ROOT, env=told, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def kernels():
    """Every function that Triton launches; one that gives something is called by those, and steps by programs."""
    found = {"a program"}
    for module in pkgutil.iter_modules(triton.__path__, f"{triton.__name__}."):
        if module.name.endswith(".steps"):
            continue
        for name, value in vars(import_module(module.name)).items():
            # the interpreter leaves names of its own in a module
            function = getattr(value, "fn", None)
            if getattr(function, "__module__", None) == module.name and function.__annotations__["return"] is None:
                found.add(f"{module.name}.{name}")
    return found


@needs_triton
@pytest.mark.parametrize(("capability", "target"), [(80, "sm_80"), (90, "sm_90a")])
def test_every_kernel_compiles_to_machine_code(compiled, capability, target):
    lines = [line for line in compiled if line["capability"] == capability]
    assert {line["kernel"] for line in lines} == kernels()
    assert {line["target"] for line in lines} == {target}
    assert all(line["cubin"] for line in lines)
    of_floats = {kernel: {line["floats"] for line in lines if line["kernel"] == kernel} for kernel in kernels()}
    assert {len(floats) for floats in of_floats.values()} == {1, 2, 3}
    assert set().union(*of_floats.values()) == {"", "float32", "float16", "bfloat16"}


@needs_triton
def test_no_kernel_wants_more_than_a_multiprocessor_has(compiled):
    # of shared memory an A100 gives a program 163 KiB; a stack is registers that did not suffice
    assert max(line["shared"] for line in compiled) <= 163 << 10
    assert max(line["stack"] for line in compiled) <= 128


@needs_triton
def test_what_is_multiplied_in_half_precision_is_so_by_the_matrix_units(compiled):
    # a scan multiplies a row by one query at a time, in float32
    products = [line for line in compiled if line["shared"] and line["floats"] and not line["kernel"].endswith(".scan")]
    assert len(products) >= 2 * 2 * 3
    for line in products:
        assert line["uses_matrix_units"] == (line["floats"] != "float32"), line
