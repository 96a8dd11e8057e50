"""What does ranking 10K and 100K candidates of a million items cost on a GPU, and how near is that to what it could?

A cross-feature ranker of about 1.9 MFLOP a candidate, without and with target attention over 100 events, weights as
drawn. First what the device can do at best, in this run; then the way from the straightforward version to what is
served, lever by lever; load, batches, retrieval, whole requests, changes while it serves, and how far off it is.
Without a CUDA device nothing is measured. The whole of it is to take less than ten minutes on an H200 with 16 cores:
what does not fit into the time is left out by name.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass

import torch

from benchmarks.device_agreement import agreement_rows
from benchmarks.device_ceilings import Roofline
from benchmarks.device_ladder import first_line
from benchmarks.device_retrieval import retrieval_rows, whole_rows
from benchmarks.device_rows import Bench, Sizes, batch_rows, change_rows, load_rows, stage_rows
from benchmarks.device_world import KINDS, World
from benchmarks.machine import say
from benchmarks.result import Row
from benchmarks.run import Measured, Options, run
from prerank.serve.device_cuda import cuda_device
from prerank.serve.device_streams import Device

BUDGET_S = 540.0


@dataclass(frozen=True, slots=True)
class Section:
    """A part that may be asked for alone, and about how many seconds it takes; `once` is of the larger ranker alone."""

    rows: Callable[[Bench], Iterator[Row]]
    takes_s: float
    once: bool = True


# what matters most comes first; seconds are a guess until they were seen, compilers' time among them
SECTIONS = {
    "stage": Section(stage_rows, 120, once=False),
    "whole": Section(whole_rows, 40),
    "batch": Section(batch_rows, 30),
    "retrieval": Section(retrieval_rows, 30),
    "load": Section(load_rows, 60),
    "agreement": Section(agreement_rows, 20),
    "changes": Section(change_rows, 50),
}
QUICK = Sizes(items=100_000, small=2_000, large=10_000, calls=20, slow_calls=3, load_s=0.5)


def measure(options: Options, ceilings: Mapping[str, float]) -> Measured:
    """On this machine's first CUDA device."""
    del ceilings  # the processor's, which ranks nothing here
    return measured(cuda_device(), QUICK if options.quick else Sizes(), options.only)


def measured(device: Device, sizes: Sizes, only: tuple[str, ...] = (), *, compiles: bool = True) -> Measured:
    """All sections, or some, on `device`; one that fails is a row that says why, and the others go on."""
    start, rows = time.perf_counter(), list[Row]()
    with torch.random.fork_rng(), torch.inference_mode():
        roofline = Roofline.measured(device)
        say(f"device_ranker: {roofline}")
        for kind, events in KINDS.items():
            is_last = kind == list(KINDS)[-1]
            asked = [name for name, one in SECTIONS.items() if (is_last or not one.once) and name in (only or SECTIONS)]
            if not asked:
                continue
            bench = Bench(kind, World.of(sizes.items, events), device, sizes, roofline, compiles)
            for name in asked:
                left_s = BUDGET_S - (time.perf_counter() - start)
                for row in _section(f"{kind}: {name}", SECTIONS[name], bench, left_s):
                    say(f"{BUDGET_S - left_s:.0f} s: {row}")
                    rows.append(row)
            del bench
        after = Roofline.measured(device)
    config = {**asdict(sizes), "only": list(only), "seconds": round(time.perf_counter() - start)}
    return Measured(rows, config, {**roofline.named("start"), **after.named("end")})


def _section(name: str, section: Section, bench: Bench, left_s: float) -> Iterator[Row]:
    if left_s < section.takes_s:
        yield Row.skipped(name, f"{left_s:.0f} s were left of {BUDGET_S:.0f}, ask for it alone by --only")
        return
    start = time.perf_counter()
    try:
        yield from section.rows(bench)
    except Exception as error:
        say(traceback.format_exc())
        yield Row(f"{name} (failed: {type(error).__name__}: {first_line(error)})", holds=False)
    yield Row.of(f"{name}: took", time.perf_counter() - start, "s")


def accelerator() -> str:
    """The first CUDA device's own name; nothing where there is none."""
    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else ""


if __name__ == "__main__":
    run("device_ranker", __doc__, measure, parts=tuple(SECTIONS), accelerator=accelerator)
