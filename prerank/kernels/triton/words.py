"""A program's steps in words, for who reads a generated kernel in a profiler."""

from __future__ import annotations

from prerank.kernels.program import Dot, Gather, Linear, Match, Mix, OfUser, Part, Scale, Step


def said(step: Step) -> str:
    """One line: what it writes, and of what."""
    out = _named(step.out)
    if isinstance(step, Gather):
        return f"{out} = gather {step.table!r}"
    if isinstance(step, Match):
        return f"{out} = matches of {step.codes.name!r} in {step.table!r}"
    if isinstance(step, Scale):
        return f"{out} = {_named(step.x)} * {step.by.name!r}"
    if isinstance(step, Dot):
        return f"{out} = {_named(step.x)} . {step.by.name!r} + {_named(step.add)}"
    if isinstance(step, Mix):
        return f"{out} = mix of {', '.join(map(_named, step.experts))} by {_named(step.weights)}"
    if isinstance(step, Linear):
        return f"{out} = {_linear_said(step)}"
    return f"{out} = {type(step).__name__.lower()} of {_named(step.x)}"


def _linear_said(step: Linear) -> str:
    by = f"{step.weight.name!r}" if isinstance(step.weight, OfUser) else "W"
    product = f"{by} {_named(step.x)}" + (" + b" if step.bias is not None else "")
    if step.cross is not None:
        return f"{_named(step.cross[0])} * ({product}) + {_named(step.cross[1])}"
    summed = product + (f" + {_named(step.add)}" if step.add is not None else "")
    return f"gelu({summed})" if step.activation == "gelu" else summed


def _named(part: Part) -> str:
    return f"r{part.register}[{part.start}:{part.start + part.width}]"
