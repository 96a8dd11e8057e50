"""A training's state in one file, which is the old one or the new one whenever the process is killed."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from prerank.errors import TrainingError

CHECKPOINT = "checkpoint.safetensors"
Told: TypeAlias = dict[str, str | int | float]


def save(folder: Path, tensors: Mapping[str, Tensor], told: Told) -> None:
    """Replace the folder's checkpoint by `tensors`, which are copied, and what is `told` beside them."""
    copies = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
    temporary = folder / f".{CHECKPOINT}"
    save_file(copies, temporary, {"place": json.dumps(told)})
    os.replace(temporary, folder / CHECKPOINT)


def load(folder: Path, identity: str) -> tuple[dict[str, Tensor], Told] | None:
    """What `save` was given, None where there is nothing.

    Raises TrainingError on a damaged file and on one of another training than `identity`.
    """
    path = folder / CHECKPOINT
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            told: Told = json.loads(file.metadata()["place"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - a safetensors handle, no dict
        found = told.pop("identity")
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise TrainingError(f"{path.name} is damaged ({error}); delete its folder to start again") from None
    if found != identity:
        raise TrainingError(
            f"{path.name} is of training {found}, this is {identity}; "
            "train in another folder, or delete it to start again"
        )
    return tensors, told


def named(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under `prefix`, a part of a checkpoint."""
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def part(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The part of a checkpoint that `named` put under `prefix`."""
    start = f"{prefix}."
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}


def optimiser_tensors(optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimiser's state as tensors; SparseAdam's step is a Python int and becomes an int64."""
    states: dict[int, dict[str, Tensor | int]] = optimiser.state_dict()["state"]
    return {f"{number}.{k}": torch.as_tensor(v) for number, state in states.items() for k, v in state.items()}


def restore_optimiser(optimiser: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Give an optimiser the state that `optimiser_tensors` took."""
    states: dict[int, dict[str, Tensor | int]] = {}
    for key, tensor in tensors.items():
        number, _, name = key.partition(".")
        states.setdefault(int(number), {})[name] = tensor if tensor.is_floating_point() else int(tensor)
    optimiser.load_state_dict({"state": states, "param_groups": optimiser.state_dict()["param_groups"]})
