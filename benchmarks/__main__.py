"""Every question, one process each, ending in one table: `python -m benchmarks [--quick] [--data FOLDER]`."""

from __future__ import annotations

import subprocess
import sys

from benchmarks.machine import REPOSITORY, say
from benchmarks.result import Result, Row, table
from benchmarks.run import arguments

QUESTIONS = (
    "market",
    "data",
    "retrieval_quality",
    "retrieval_negatives",
    "retrieval_scan",
    "retrieval",
    "ranking_teacher",
    "ranking_quality",
    "ranking_market",
    "training_throughput",
    "scorer_cpu",
    "device_ranker",
    "market_serving",
    "serving_parts",
    "rollout",
    "inventory",
    "request_path",
    "request_load",
    "soak",
)


def main() -> int:
    """The exit code: 1 where a question failed or a bar does not hold."""
    parser = arguments(__doc__)
    parser.parse_args()
    rows: list[tuple[str, Row]] = []
    failed = []
    for question in QUESTIONS:
        result = _ask(question, sys.argv[1:])
        if result is None:
            failed.append(question)
        else:
            rows += [(question, row) for row in result.rows]
    if rows:
        print(table(rows))
    for question in failed:
        say(f"{question} failed; see above")
    return int(bool(failed) or any(row.holds is False for _, row in rows))


def _ask(question: str, words: list[str]) -> Result | None:
    command = [sys.executable, "-m", f"benchmarks.{question}", *words]
    done = subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    lines = done.stdout.splitlines()
    return Result.from_json(lines[-1]) if done.returncode == 0 and lines else None


if __name__ == "__main__":
    sys.exit(main())
