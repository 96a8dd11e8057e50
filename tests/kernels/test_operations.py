"""Every operation is one node that the compiler and the exporter keep, and gives what it gives eagerly."""

import pytest
import torch

from tests.kernels.operations import asked


class Asked(torch.nn.Module):
    """A module that does something before and after the operation."""

    def __init__(self, operation) -> None:
        super().__init__()
        self.operation = operation

    def forward(self, *tensors):
        first, *rest = tensors
        found = self.operation(first + 0, *rest)
        return tuple(one + 1 for one in (found if isinstance(found, tuple) else (found,)))


NAMES = sorted(asked())


def is_same(found, expected):
    return all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_an_exported_program_has_it_as_one_node(name):
    operation, tensors = asked()[name]
    exported = torch.export.export(Asked(operation), tensors)
    assert [node.target for node in exported.graph.nodes].count(getattr(torch.ops.prerank, name).default) == 1
    assert is_same(exported.module()(*tensors), Asked(operation)(*tensors))


@pytest.mark.parametrize("name", NAMES)
def test_the_compiler_keeps_it_as_one_node_of_one_graph(name):
    operation, tensors = asked()[name]
    graphs = []

    def backend(module, inputs):
        graphs.append([node.target for node in module.graph.nodes])
        return module

    torch._dynamo.reset()
    expected = Asked(operation)(*tensors)
    assert is_same(torch.compile(Asked(operation), backend=backend, fullgraph=True)(*tensors), expected)
    (targets,) = graphs
    wanted = getattr(torch.ops.prerank, name)
    assert sum(target in (wanted, wanted.default) for target in targets) == 1
    torch._dynamo.reset()
    # fake tensors run through it here: what the compiler is told of the answer must be so
    assert is_same(torch.compile(Asked(operation), backend="aot_eager", fullgraph=True)(*tensors), expected)


@pytest.mark.parametrize("name", ["gather_add", "cross_layer"])
def test_the_operation_is_what_the_compiler_is_told_it_is(name):
    _, tensors = asked()[name]
    checked = torch.library.opcheck(getattr(torch.ops.prerank, name).default, tensors)
    assert set(checked.values()) == {"SUCCESS"}
