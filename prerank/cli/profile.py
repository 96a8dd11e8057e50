"""`prerank profile`: where a request's time goes, as a table beside the floors and as a Chrome trace."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from prerank.bundle.registry import Registry
from prerank.cli.device import DeviceDtype, DeviceNames, DeviceWhole, Dtype, placed
from prerank.cli.options import (
    STORE,
    FunnelName,
    StoreFolder,
    TailUrl,
    UsersUrl,
    err,
    found_in,
    live_of,
    out,
    resolved,
)
from prerank.cli.progress import progress
from prerank.errors import ConfigError

if TYPE_CHECKING:
    from prerank.evaluate.profile import Line, Profile

profiling = typer.Typer()


@profiling.command("profile")
def profile(
    num: Annotated[int, typer.Option("--num", "-n", min=1, help="How many requests.")] = 50,
    trace: Annotated[
        Path, typer.Option("--out", "-o", help="Where to write the Chrome trace; one that ends in .gz is compressed.")
    ] = Path("trace.json"),
    requests: Annotated[
        Path | None,
        typer.Option(help="A folder that `prerank serve --log-requests` wrote; by default the golden requests."),
    ] = None,
    version: Annotated[str, typer.Option("--version", help="The version to ask; by default the live one.")] = "",
    workers: Annotated[
        int | None, typer.Option(min=0, help="Native threads that rank; one a core by default, 0 lets torch rank.")
    ] = None,
    device: DeviceNames = [],  # noqa: B006 - typer reads the default
    device_dtype: DeviceDtype = Dtype.BFLOAT16,
    device_whole: DeviceWhole = False,
    most: Annotated[int, typer.Option("--most", min=0, help="Of what runs in a stage, at most so many lines.")] = 6,
    measure: Annotated[bool, typer.Option(help="Measure what the machine can do at best, for the floors.")] = True,
    store: StoreFolder = STORE,
    funnel: FunnelName = "",
    tail: TailUrl = None,
    users: UsersUrl = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Ask a version requests one after another, and tell where their time goes.

    Each stage and each kernel, how often, how long, and beside the least it could take on this machine. The trace is
    for chrome://tracing or https://ui.perfetto.dev. Without --requests no user is looked up: golden ones are features.
    """
    from prerank.evaluate.profile import profile_requests  # as heavy as a server
    from prerank.serve.asking import GoldenRequests, LoggedRequests
    from prerank.serve.funnel import Funnel
    from prerank.serve.profiling import Asking, check_trace
    from prerank.stores.request_files import read_requests, request_files

    home = found_in(store, funnel)
    registry = Registry(home)
    chosen = resolved(registry, version) if version else live_of(registry)
    files = [] if requests is None else request_files(requests)
    check_trace(trace)
    if device_whole and requests is None:
        raise ConfigError(
            "--device-whole: expected --requests too; golden requests are of every item that is on, and a device finds "
            "those that targeting lets"
        )
    with (
        placed(device, dtype=device_dtype, whole=device_whole) as on_device,
        Funnel.open(home, chosen, workers, tail, users=users, device=on_device) as opened,
        progress(err) as report,
    ):
        asking: Asking
        if requests is None:
            asking = GoldenRequests(opened, registry.path(chosen))
        else:
            asking = LoggedRequests(opened, read_requests(files), num)
        told, ranks_by = profile_requests(asking, num, trace, report, measure), opened.ranks_by
    about = {"version": chosen, "requests": "golden" if requests is None else str(requests), "ranks_by": ranks_by}
    if as_json:
        from prerank.cli.render import plain

        print(json.dumps({**about, "trace": str(trace), **plain(told)}, indent=1))
    else:
        out.print(_shown(told, about, most), highlight=False)
        out.print(f"trace: {trace}, for chrome://tracing or https://ui.perfetto.dev", highlight=False, soft_wrap=True)


def _shown(told: Profile, about: dict[str, str], most: int) -> RenderableType:
    kind = "golden requests" if about["requests"] == "golden" else f"requests of {about['requests']}"
    words = [f"{about['version']}, ranked by {about['ranks_by']}"]
    words += [f"{told.num_requests:,} requests, one at a time: {told.num_different:,} {kind}, asked in turn"]
    for what, times in (("as served", told.served_ms), ("under the profiler", told.profiled_ms)):
        words.append(f"{what}: " + ", ".join(f"{name} {ms:.2f}" for name, ms in times.items()) + " ms")
    for device, found in told.ceilings.items():
        rates = ", ".join(f"{found[f'{name}_matmul_gflop_s']:,.0f} GFLOP/s {name}" for name in ("bf16", "fp32"))
        words.append(f"{device} at best: {found['copy_gb_s']:,.0f} GB/s copied, {rates}")
    if "cuda" not in told.ceilings and told.ceilings:
        words.append("no GPU here: nothing below is a GPU's")
    notes = []
    if told.num_degraded:
        notes.append(Text(f"{told.num_degraded:,} answers were degraded: a stage failed or was late", style="yellow"))
    return Group(Text("\n".join(words)), _table(told.lines, most), *notes)


def _table(lines: tuple[Line, ...], most: int) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("a request", no_wrap=True, overflow="ellipsis", max_width=38)
    for name in ("calls", "served ms", "ms", "self ms", "share", "MFLOP", "MB", "floor ms", "over"):
        table.add_column(name, justify="right", no_wrap=True)
    inside = 0
    for one in lines:
        is_stage, is_on_device = one.kind == "stage", one.kind == "device"
        inside = 0 if is_stage else inside + 1
        if inside > most:
            continue
        table.add_row(
            Text(one.stage if is_stage else f"  {'GPU: ' * is_on_device}{one.kernel}"),
            f"{one.calls:,.4g}",
            _ms(one.served_ms),
            _ms(one.ms),
            _ms(one.self_ms),
            f"{one.share:.1%}",
            f"{one.flops / 1e6:,.2f}" if one.flops else "",
            f"{one.num_bytes / 1e6:,.2f}" if one.num_bytes else "",
            _ms(one.floor_ms),
            f"{one.over_floor:,.1f}x" if one.over_floor is not None else "",
            style="bold" if is_stage else "",
        )
    return table


def _ms(ms: float | None) -> str:
    return "" if ms is None else f"{ms:.3f}"
