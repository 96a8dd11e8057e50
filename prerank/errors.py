"""Everything prerank raises on purpose: each says what was expected, what came, where, and what to do."""


class PrerankError(Exception):
    """The root of every error meant for a user; its text is safe to show to one."""


class ConfigError(PrerankError):
    """The funnel file cannot be used as written: an unknown, missing or mistyped key, or names that do not meet."""


class DataError(PrerankError):
    """The tables cannot be used as they are: a missing file or column, a wrong type, a value out of range."""


class StoreFailed(DataError):
    """A store that serving looks things up in did not answer, not in time, or not with what was asked for."""


class CircuitOpen(StoreFailed):
    """A store was not asked: it failed too often just now."""


class DeviceFailed(DataError):
    """The device that ranks did not: what it failed with, or that it was lost."""


class DeviceFull(DeviceFailed):
    """The device has not the memory: what needs how much of it, and what to shrink."""


class DeviceBusy(DeviceFailed):
    """A request was refused because the device would not be done with it in time."""


class NotOnDevice(ConfigError):
    """A device was to do for a version what it cannot: why, and what to do."""


class SchemaMismatch(PrerankError):
    """Two things built from different features met; the text names the first difference."""


class BundleError(PrerankError):
    """A version on disk is damaged, tampered with, of another format, or does not reproduce its golden answers."""


class RegistryError(PrerankError):
    """A version cannot be promoted, rolled back or found."""


class GateFailed(RegistryError):
    """A version did not hold every validation gate and stays unpointed."""


class AlreadyRunning(PrerankError):
    """Another process does this for the same funnel now; the text names it."""


class TrainingError(PrerankError):
    """Training cannot start, resume or go on: no positives, a checkpoint of another run, a loss that is not finite."""


class GraphError(PrerankError):
    """The request graph cannot work as wired: a name nobody writes, two writers, a cycle."""


class RequestError(PrerankError):
    """One request is wrong: the text names the field, what it must be, and what came."""


class NoRoom(PrerankError):
    """More items came than the version that serves has rows for; the next one that is published has them all."""


class DeadlineExceeded(PrerankError):
    """The request's time ran out before an answer of any kind existed."""


class Cancelled(PrerankError):
    """Nobody waits for the answer any more."""
