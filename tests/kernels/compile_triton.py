"""Compiles every Triton kernel as its caller launches it, for GPUs that need not be here; a JSON line a kernel and GPU.

`python -m tests.kernels.compile_triton` is for a process of its own: in one where Triton interprets nothing compiles.
"""

import json
import subprocess
from tempfile import NamedTemporaryFile

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from prerank.kernels import cross, device_program, eligible, gather_add, greedy, scan
from prerank.kernels.shapes import FLOATS
from tests.kernels.programs import made_items, made_program, made_user

CAPABILITIES = (80, 90)
GENERATED = "a program"
"""The name of every kernel that was generated from a program."""
NAMES = [str(dtype).removeprefix("torch.") for dtype in FLOATS]


class Absent:
    """What Triton asks of a device's driver before it compiles, said of one that is not here."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


def launch_everything() -> None:
    """Each Triton version on small tensors: aligned and not, of each type that it has."""
    for num_items in (640, 641):
        bitmaps = torch.zeros(3, eligible.num_words(num_items), dtype=torch.int64)
        chosen, starts = torch.tensor([0, 2], dtype=torch.int32), torch.tensor([0, 1, 2])
        eligible.by_triton(bitmaps, chosen, starts, torch.tensor([False, True]), num_items)
    for num, rules, k in ((640, 2, 16), (641, 1, 1)):
        groups = torch.zeros(2, rules, num, dtype=torch.int32)
        rows, at_most = torch.arange(num).expand(2, num), torch.ones(rules, dtype=torch.int64)
        greedy.by_triton(torch.rand(2, num), rows, rows >= 0, groups, at_most, k)
    for dtype in (torch.float32, torch.bfloat16, torch.int8):
        for mask in (None, torch.zeros(640, dtype=torch.bool), torch.arange(640)):
            scales = torch.ones(640) if dtype == torch.int8 else None
            scan.scan_by_triton(torch.zeros(640, 64, dtype=dtype), scales, torch.zeros(2, 64), 5, mask)
    for dtype in FLOATS:
        for width, crossing, rank in ((256, 320, 32), (100, 17, 3), (256, 1, 128)):
            rows = torch.zeros(2, 640, dtype=torch.int64)
            table, user, met = (
                torch.zeros(*size, dtype=dtype) for size in ((9, width), (2, width), (2, 640, crossing))
            )
            gather_add.by_triton(table, rows, user, None, None)
            gather_add.by_triton(table, rows, user, met, torch.zeros(width, crossing, dtype=dtype))
            sizes = ((640, width), (640, width), (rank, width), (width, rank), (width,))
            cross.by_triton(*(torch.zeros(*size, dtype=dtype) for size in sizes))
        for size in ((24, 16, 2, 16), (100, 17, 2, 5)):  # of which one fits into registers
            if size[0] < 100 or dtype == torch.bfloat16:
                launch_program(size, dtype)


def launch_program(size: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    width, _, _, dim = size
    user = {name: tensor.unsqueeze(0) for name, tensor in made_user(width, dim).items()}
    items = {name: table if name == "x" else _as(table, dtype) for name, table in made_items(9, width, dim).items()}
    device_program.by_triton(made_program(*size), items, dtype)(user, torch.zeros(1, 100, dtype=torch.int64))


def _as(table: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return table.to(dtype) if table.is_floating_point() else table


def stack_of(cubin: bytes) -> int:
    """Bytes a thread, as the tool that Triton brings says: registers that were spilled."""
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return int(said.split("STACK:")[1].split()[0])


def main() -> None:
    launched = JITFunction.run

    def compiled(kernel, *args, grid, warmup, **kwargs):
        made = launched(kernel, *args, grid=grid, warmup=True, **kwargs)
        # what it would have written, sizes among them, was never set
        for arg in args:
            if isinstance(arg, torch.Tensor):
                arg.zero_()
        floats = {str(a.dtype).removeprefix("torch.") for a in args if isinstance(a, torch.Tensor)} & set(NAMES)
        is_generated = kernel.fn.__module__.startswith("prerank_program_")
        said = {
            "kernel": GENERATED if is_generated else f"{kernel.fn.__module__}.{kernel.fn.__name__}",
            "floats": "".join(floats - {"float32"} or floats),  # a program's vectors are always float32
            "capability": driver.active.get_current_device(),
            "target": made.asm["ptx"].split(".target ")[1].split()[0],
            "cubin": len(made.asm["cubin"]),
            "shared": made.metadata.shared,
            "stack": stack_of(made.asm["cubin"]),
            "uses_matrix_units": "mma" in made.asm["ptx"],
        }
        print(json.dumps(said))

    JITFunction.run = compiled
    for capability in CAPABILITIES:
        driver.set_active(Absent(capability))
        launch_everything()


if __name__ == "__main__":
    main()
