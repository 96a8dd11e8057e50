"""A program with every kind of step, its tables and a user, of any sizes."""

import torch

from prerank.kernels.program import Builder, Dot, Gather, Linear, Match, Mix, Norm, OfUser, Program, Scale, Softmax


def made_program(
    width: int, hidden: int, experts: int, dim: int, tasks: int = 2, seed: int = 0, is_coarse: bool = False
) -> Program:
    """`is_coarse` is whether eight bits are said to be enough for the experts and the gates."""
    made = torch.Generator().manual_seed(seed)

    def weight(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=made) / shape[-1] ** 0.5

    builder, length = Builder(), 5
    item = builder.add(Gather(builder.register(width), "x"))
    met = builder.register(width + 2 * dim + 2 + 2)
    builder.add(Scale(met.columns(0, width), item, OfUser("u")))
    query = builder.add(Gather(builder.register(2 * dim), "q"))
    for head in range(2):
        key, bias = OfUser("key", (head,), factor=0.5), OfUser("bias", (head, 0))
        logits = builder.add(Linear(builder.register(length), query.columns(head * dim, dim), key, bias))
        weights = builder.register(length)
        builder.add(Softmax(weights, logits, met.columns(width + 2 * dim + head, 1)))
        value = OfUser("value", (head,), transposed=True)
        builder.add(Linear(met.columns(width + head * dim, dim), weights, value))
    builder.add(Match(met.columns(width + 2 * dim + 2, 1), "code", OfUser("codes")))
    builder.add(Match(met.columns(width + 2 * dim + 3, 1), "bag", OfUser("codes")))
    summed = builder.add(Linear(builder.register(width), met, weight(width, met.width), OfUser("u"), add=item))
    x = builder.add(Norm(builder.register(width), summed, weight(width), weight(width), 1e-5))
    found = []
    for _ in range(experts):
        crossed = builder.linear(x, weight(width, width), weight(width), cross=(x, x), is_coarse=is_coarse)
        narrow = builder.linear(crossed, weight(3, width), None, is_coarse=is_coarse)
        wide = builder.linear(narrow, weight(width, 3), weight(width), cross=(x, crossed), is_coarse=is_coarse)
        found.append(wide)
    gate = builder.linear(x, weight(hidden, width), weight(hidden), "gelu", is_coarse=is_coarse)
    gate = builder.linear(gate, weight(experts, hidden), None)
    mixed = builder.add(Softmax(builder.register(experts), gate))
    mix = builder.add(Mix(builder.register(width), mixed, tuple(found)))
    out = builder.register(tasks)
    for task in range(tasks):
        deep = builder.linear(mix, weight(hidden, width), weight(hidden), "gelu")
        deep = builder.linear(deep, weight(1, hidden), weight(1))
        own = OfUser("u", columns=(task, 1), factor=0.1)
        builder.add(Dot(out.columns(task, 1), item, OfUser("u", factor=0.2), own, deep))
    return builder.program(out)


def made_items(num: int, width: int, dim: int, seed: int = 1) -> dict[str, torch.Tensor]:
    made = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randn(num, width, generator=made),
        "q": torch.randn(num, 2 * dim, generator=made),
        "code": torch.randint(-1, 5, (num,), generator=made, dtype=torch.int8),
        "bag": torch.randint(-1, 5, (num, 3), generator=made, dtype=torch.int16),
    }


def made_user(width: int, dim: int, seed: int = 2) -> dict[str, torch.Tensor]:
    made = torch.Generator().manual_seed(seed)
    bias = torch.zeros(2, 1, 5)
    bias[:, :, 2] = -torch.inf
    return {
        "u": torch.randn(width, generator=made),
        "key": torch.randn(2, 5, dim, generator=made),
        "value": torch.randn(2, 5, dim, generator=made),
        "bias": bias,
        "codes": torch.randint(-1, 5, (21,), generator=made),
    }
