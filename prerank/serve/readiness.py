"""Whether a server may be sent requests, and what it says of that: a version is loaded, and enough shards answer."""

from __future__ import annotations

from prerank.serve.envelope import Refused
from prerank.serve.hosts import IndexHosts
from prerank.serve.live_version import LiveVersion


def readiness(live: LiveVersion, hosts: IndexHosts | None, is_local: bool) -> dict[str, object]:
    """What /readyz answers; of shards their numbers alone, for hosts' addresses are nothing to tell.

    A server is ready while `hosts.least` shards have a replica that answers: what the others would have found is
    missing from its answers, which say so. Raises Refused where it is not; why no version could be loaded is told to
    this machine alone, for it names files.
    """
    if (error := live.error) is not None:
        why = str(error) if is_local else "the server's log says why"
        raise Refused(503, "NotReady", f"{type(error).__name__}: {why}")
    ready: dict[str, object] = {"status": "ready", "version": live.version}
    if hosts is None:
        return ready
    missing, num = hosts.missing(), len(hosts.shards)
    if num - len(missing) < hosts.least:
        raise Refused(
            503,
            "NotReady",
            f"of {num} shards of the index {num - len(missing)} have a host that answers and holds a version, expected "
            f"at least {hosts.least}; missing: {', '.join(map(str, missing))}",
        )
    return {**ready, "shards": num, "missing_shards": missing}
