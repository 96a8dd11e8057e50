"""Do the numbers in README.md and docs/ still say what the newest results say? Rewrites them; `--check` only tells.

A number stands between two comments, and the first one names it:

    measured:QUESTION:ROW             the row's value, three significant digits
    measured:QUESTION:ROW:FIELD       another field of it, such as p99_ms or ratio
    measured:QUESTION:ROW:FIELD:.2f   in a Python number format
    measured:QUESTION                 a table of its rows, with the date, the commit and the machine
    measured:QUESTION@HARDWARE...     the newest result whose hardware's file name holds HARDWARE

TABLES names tables of some rows only. Quick results do not count. What is between the comments is replaced, the
comments stay.
"""

from __future__ import annotations

import re
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from benchmarks.machine import REPOSITORY
from benchmarks.result import RESULTS, Result, Row, read_results, shown, table

_MARKED = re.compile(r"(<!-- measured:(?P<name>[^>]*?) -->)(?P<said>.*?)(<!-- /measured -->)", re.DOTALL)
_OPENED = re.compile(r"<!-- /?measured")
_NUMBERS = tuple(f.name for f in fields(Row) if f.name not in ("name", "unit", "against", "holds"))


# table: (question, the rows wanted); every other question's table is all its rows
TABLES = {
    "retrieval_quality": (
        "retrieval_quality",
        r"training.*|[^,]+, test, recall@\d+|two towers, test, recall@100: (deviation|standard error).*",
    ),
    "retrieval_ablation": ("retrieval_quality", "ablation, .*"),
    "retrieval_negatives": ("retrieval_negatives", "[^:]+|log-Q.*: less full softmax"),
    "market_sizes": ("market", "generate .*"),
    "market_oracles": ("market", "(AUC|log loss), knows .*"),
    "market_ranks": ("market", "best rank error .*"),
    "market_rankers": ("ranking_market", "(?!.* over )[^:]+, impressions, (KL|AUC|log loss)"),
    "market_rankers_parts": ("ranking_market", "(?!.* over )[^:]+, impressions of [a-z ]+, KL"),
    "market_rankers_candidates": ("ranking_market", "(?!.* over )[^:]+, candidates, [^:]+|best rank error .*"),
    "market_rankers_paired": ("ranking_market", ".* over .*, (impressions|candidates), .*"),
    "market_segments": ("ranking_market", ".* a surface, all surfaces, [^:]*, KL(: (low|high))?"),
    "market_versions": ("market_serving", "publish.*|validate.*|start serving.*|serve: .*"),
    "scorer_ranker": (
        "scorer_cpu",
        r"(native(?!: (overlap|captured)| over)|eager(?! bfloat16:)|torch\.compile|AOTInductor|ONNX|ranker).*",
    ),
    "scorer_over_peers": ("scorer_cpu", "native over .*"),
    "scorer_eligibility": ("scorer_cpu", "eligib.*"),
    "scorer_whole": ("scorer_cpu", "(Scorer|straightforward|greedy|the same).*"),
    "scorer_bars": (
        "scorer_cpu",
        r"native, 10,000 candidates(: .*)?|"
        r"native over (eager float32|eager bfloat16|the best of .*), 100?,000 candidates|"
        r"native: (100,000|requests).*|eligibility(, six .*| over .*)|greedy (top|over).*|"
        r"Scorer.*: (whole.*|over that|p50 .*|resident .*)|Scorer over .*|native: .*float64.*",
    ),
    "scorer_agreement": ("scorer_cpu", ".* of float64's top 1,000.*"),
    "request_path_whole": ("request_path", "(naive|request|stage|retrieval|bytes|expansions).*"),
    "request_path_bars": ("request_path", "(request|retrieval|bytes).*"),
    "request_path_servers": ("request_path", "empty model.*"),
    "retrieval_whole": ("retrieval", "(HNSWIndex, [a-z0-9]+|ExactIndex, [a-z0-9]+|matmul.*)(, all eligible.*|:.*)"),
    "retrieval_filtered": ("retrieval", "(HNSWIndex|ExactIndex), [0-9.]+% eligible.*"),
    "retrieval_curves": ("retrieval", "(graph of HNSWIndex|hnswlib|usearch).*"),
    "index_parts": ("serving_parts", "(ExactIndex|matmul).*"),
    "scorer_parts": ("serving_parts", "Scorer.*"),
    "store_parts": ("serving_parts", "(UserStore|MetadataTable|JSON of|rows of).*"),
    "request_parts": ("serving_parts", "(RequestGraph|ExpandUser|HTTP).*"),
}


class Stale(Exception):
    """A marker that names nothing measured."""


def main(words: Sequence[str] | None = None) -> int:
    """The exit code: 1 where a marker names nothing, or, with `--check`, where a number is stale."""
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 where a number is stale")
    parser.add_argument("--root", type=Path, default=REPOSITORY, help="the folder of README.md and docs/")
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args(words)
    results = read_results(given.results)
    problems = []
    for page in [given.root / "README.md", *sorted((given.root / "docs").rglob("*.md"))]:
        if page.is_file():
            problems += _page(page, given.root, results, check=given.check)
    for problem in problems:
        print(problem, file=sys.stderr)
    return int(bool(problems))


def _page(page: Path, root: Path, results: Sequence[Result], check: bool) -> list[str]:
    """The problems of one page, which is rewritten unless only checked."""
    name = page.relative_to(root)
    text = page.read_text(encoding="utf-8")
    new, problems = rewritten(text, results)
    if new != text and check:
        problems += [f"stale: {change}; run `python -m benchmarks.readme`" for change in changes(text, new)]
    elif new != text:
        page.write_text(new, encoding="utf-8")
        print(f"{name}: {len(changes(text, new))} rewritten")
    return [f"{name}: {problem}" for problem in problems]


def rewritten(text: str, results: Sequence[Result]) -> tuple[str, list[str]]:
    """The text with every marked number as last measured, and a sentence on each marker that names nothing."""
    problems = []
    if len(_OPENED.findall(text)) != 2 * len(_MARKED.findall(text)):
        problems.append("a measured marker is not closed, or closed twice")

    def replaced(found: re.Match[str]) -> str:
        try:
            return found[1] + said(found["name"], results) + found[4]
        except Stale as error:
            problems.append(f"measured:{found['name']}: {error}")
            return found[0]

    return _MARKED.sub(replaced, text), problems


def changes(old: str, new: str) -> list[str]:
    """Which marked numbers differ between two versions of a page."""
    pairs = zip(_MARKED.finditer(old), _MARKED.finditer(new), strict=True)
    return [
        f"measured:{a['name']} says {_brief(a['said'])}, measured {_brief(b['said'])}"
        for a, b in pairs
        if a["said"] != b["said"]
    ]


def said(name: str, results: Sequence[Result]) -> str:
    """What stands for a marker's name. Raises Stale where nothing of that name was measured."""
    question, _, rest = name.partition(":")
    if not rest:
        return _table(question, results)
    result = _newest(question, results)
    # only the last words of a name can be a field and a format: a row's own name may hold colons
    parts = rest.split(":")
    form = parts.pop() if len(parts) > 2 and parts[-2] in _NUMBERS else ""
    column = parts.pop() if len(parts) > 1 and parts[-1] in _NUMBERS else "value"
    try:
        number: float | None = getattr(result.row(":".join(parts)), column)
    except KeyError as error:
        raise Stale(str(error.args[0])) from None
    if number is None:
        raise Stale(f"the newest result, of {result.date[:10]}, has no {column} there")
    try:
        return format(number, form) if form else shown(number)
    except ValueError as error:
        raise Stale(f"{form!r} is no number format: {error}") from None


def _table(name: str, results: Sequence[Result]) -> str:
    base, at, hardware = name.partition("@")
    question, wanted = TABLES.get(base, (base, ".*"))
    result = _newest(question + at + hardware, results, wanted)
    rows = [row for row in result.rows if re.fullmatch(wanted, row.name)]
    machine = f"{result.hardware.cpu}, {result.hardware.cores} cores"
    return f"\n\n{table(rows)}\n\n{result.date[:10]}, commit {result.commit}, {machine}.\n\n"


def _newest(question: str, results: Sequence[Result], rows: str = ".*") -> Result:
    """The newest whole result of a question that has such a row."""
    wanted, _, hardware = question.partition("@")
    found = [r for r in results if r.question == wanted and hardware in r.hardware.slug and not r.is_quick]
    found = [r for r in found if any(re.fullmatch(rows, row.name) for row in r.rows)]
    if not found:
        which = "" if rows == ".*" else f" with rows {rows!r}"
        raise Stale(f"no result of {question!r}{which}; run `python -m benchmarks.{wanted}`")
    return max(found, key=lambda result: result.date)


def _brief(text: str) -> str:
    words = " ".join(text.split())
    return repr(words if len(words) <= 60 else words[:57] + "...")


if __name__ == "__main__":
    sys.exit(main())
