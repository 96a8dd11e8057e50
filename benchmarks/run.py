"""How every question is run: its arguments, the machine's ceilings first, then the measuring, a table, and the file."""

from __future__ import annotations

import os
from argparse import ArgumentParser
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

from benchmarks import machine
from benchmarks.result import RESULTS, Result, Row, table

KUAIRAND = machine.REPOSITORY.parent / "shared" / "data" / "kuairand_pure"


@dataclass(frozen=True, slots=True)
class Options:
    """How much to measure, and the folder of KuaiRand-Pure where there is one.

    `work` is a folder where what was trained is kept, so that a run that was cut short goes on; `only` names what to
    train or measure and `seeds` with which, all and the question's own where they are empty.
    """

    quick: bool = False
    ablate: bool = False
    data: Path | None = None
    work: Path | None = None
    only: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Measured:
    """What a question found: its rows, what it was run with, and ceilings of its own beside the machine's."""

    rows: list[Row]
    config: Mapping[str, object]
    ceilings: Mapping[str, float] = field(default_factory=dict)


Measure = Callable[[Options, Mapping[str, float]], Measured]
"""The options and the machine's ceilings -> what was measured."""


def arguments(description: str) -> ArgumentParser:
    """What every command here takes."""
    parser = ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="a smaller version in under a minute; writes no file")
    parser.add_argument("--data", type=Path, help="the folder of KuaiRand-Pure; also PRERANK_DATA")
    parser.add_argument("--results", type=Path, help="where to write instead of benchmarks/results")
    return parser


def run(
    question: str,
    description: str,
    measure: Measure,
    *,
    ablations: bool = False,
    trainings: Sequence[str] = (),
    parts: Sequence[str] = (),
    keeps: bool = False,
    accelerator: Callable[[], str] | None = None,
) -> None:
    """The whole command of one question; the last line printed is the result as one line of JSON.

    `trainings` or `parts` are what may be asked for alone. Where it `keeps` what it trains, or has `trainings`, a
    folder for that and other seeds may be named. A question about an `accelerator` gives its name, and where there is
    none it measures nothing, says so in a row without a number, and writes no file.
    """
    parser = arguments(description.partition("\n")[0])
    if ablations:
        parser.add_argument("--ablate", action="store_true", help="also one changed option at a time, one seed each")
    if trainings or parts:
        parser.add_argument(
            "--only", nargs="+", default=(), choices=[*trainings, *parts], help="these alone; writes no file"
        )
    if trainings or keeps:
        parser.add_argument("--work", type=Path, help="keep what was trained there; the same command goes on from it")
        parser.add_argument("--seeds", nargs="+", type=int, default=(), help="instead of its own")
    given = parser.parse_args()
    options = Options(given.quick, ablations and given.ablate, data_folder(given.data))
    if trainings or parts:
        options = replace(options, only=tuple(given.only))
    if trainings or keeps:
        options = replace(options, work=given.work, seeds=tuple(given.seeds))
    device = accelerator() if accelerator else ""
    if accelerator and not device:
        machine.say(f"{question}: no GPU here, so nothing is measured and nothing written")
        nothing = Measured([Row.skipped(question, "no GPU here")], {})
        print(_result(question, options, nothing, {}, machine.commit(), "").to_json())
        return
    machine.say(f"{question}: measuring the machine's ceilings")
    ceilings, commit = machine.ceilings(), machine.commit()  # of what is measured, whatever is committed meanwhile
    result = _result(question, options, measure(options, ceilings), ceilings, commit, device)
    print(table(result.rows))
    if given.results or not (options.quick or options.only):
        machine.say(f"written: {result.write(given.results or RESULTS).name}")
    print(result.to_json())


def _result(
    question: str, options: Options, measured: Measured, ceilings: Mapping[str, float], commit: str, device: str
) -> Result:
    return Result(
        question=question,
        date=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        commit=commit,
        hardware=replace(machine.hardware(), accelerator=device),
        versions=machine.versions(),
        config={"quick": options.quick, **measured.config},
        ceilings={**ceilings, **measured.ceilings},
        rows=tuple(measured.rows),
    )


def data_folder(given: Path | None) -> Path | None:
    """The folder of KuaiRand-Pure that was named, else PRERANK_DATA, else the development machine's; None if none is.

    A folder that was named must be there: FileNotFoundError.
    """
    named = given or (Path(os.environ["PRERANK_DATA"]) if os.environ.get("PRERANK_DATA") else None)
    if named and not named.is_dir():
        raise FileNotFoundError(f"{named} is not a folder; name that of KuaiRand-Pure by --data or PRERANK_DATA")
    return named or (KUAIRAND if KUAIRAND.is_dir() else None)
