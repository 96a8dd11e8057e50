import dataclasses

import torch

from benchmarks import retrieval_scan
from benchmarks.result import Hardware, Result

TINY = retrieval_scan.Sizes(items=3_000, calls=2, queries=2)


def test_every_storage_is_timed_beside_what_it_replaces_and_its_recall_is_told(monkeypatch):
    threads = torch.get_num_threads()
    used = []
    monkeypatch.setattr(
        retrieval_scan, "machine_ceilings", lambda: used.append(torch.get_num_threads()) or {"copy_gb_s": 30.0}
    )
    measured = retrieval_scan.scans(TINY)
    assert (used, torch.get_num_threads()) == (list(retrieval_scan.THREADS), threads)
    hardware = Hardware("Some CPU", 2, 24.0)
    told = (measured.config, measured.ceilings, tuple(measured.rows))
    result = Result("retrieval_scan", "2026-01-05T10:00:00Z", "0123456789ab", hardware, {}, *told)
    assert Result.from_json(result.to_json()) == result
    for storage in ("float32", "bfloat16", "int8"):
        for share in ("100%", "50%", "6%", "1%"):
            assert result.row(f"{storage}, {share} eligible, threads = 2").p99_ms > 0
    assert result.row("bfloat16: recall@1,000 of float32").value > 0.9
    assert not any(row.holds is not None for row in measured.rows), "only the whole question has bars"


def test_the_whole_question_has_a_bar_for_the_ceiling_and_one_for_the_plain_version(monkeypatch):
    whole = dataclasses.replace(TINY)
    monkeypatch.setattr(retrieval_scan, "Sizes", lambda: whole)
    monkeypatch.setattr(retrieval_scan, "machine_ceilings", lambda: {"copy_gb_s": 30.0})
    bars = [row for row in retrieval_scan.scans(whole).rows if row.bar is not None]
    assert [row.bar for row in bars] == [2.0, 5.0] * 3
    assert all("100% eligible, threads = 2" in row.name and row.holds is not None for row in bars)
