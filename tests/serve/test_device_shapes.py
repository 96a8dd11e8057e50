import torch

from prerank.serve.device_batches import Job
from prerank.serve.device_buckets import Shape
from prerank.serve.device_replica import Replica
from prerank.serve.device_shapes import Shapes
from prerank.serve.device_streams import CpuDevice
from prerank.types import CandidateSet
from tests.bundle.test_scorer import scorer


def job(user, *rows, **values):
    ids = torch.tensor([rows])
    own = {name: torch.tensor([numbers]) for name, numbers in values.items()}
    return Job({"u": torch.tensor([user])}, CandidateSet(ids, ids.float(), ids > 0, values=own), 1, "line")


def filled(*jobs):
    shapes = Shapes(Replica(scorer([0.0] * 9), CpuDevice()), {"u": torch.zeros(1)}, 3)
    layout = shapes.inputs(Shape(4, 3))
    views = layout.views(torch.full((layout.num_bytes,), 0x7B, dtype=torch.uint8))  # of other shapes
    return views, layout, shapes.fill(views, jobs, (0, 3))


def test_the_places_of_a_batch_that_nobody_has_are_somebodys_and_none_of_their_candidates_is_valid():
    views, _, _ = filled(job(1.0, 5, 6, 7), job(2.0, 0, 8))
    assert views["user.u"].tolist() == [1.0, 2.0, 1.0, 1.0]
    assert views["valid"].tolist() == [[True] * 3, [False, True, False], [False] * 3, [False] * 3]
    assert views["rows"][0].tolist() == [5, 6, 7]
    assert views["rows"][1, :2].tolist() == [0, 8]


def test_what_no_request_says_is_not_copied():
    _, layout, last = filled(job(1.0, 5))
    assert last == "valid"
    views, _, last = filled(job(1.0, 5), job(2.0, 6, bid=[4.0]))
    assert last == "value.bid"
    assert views["has.value.bid"].tolist() == [False, True, False, False]
    assert views["value.bid"][1, 0] == 4.0
    assert layout.end_of("valid") < layout.end_of("value.bid") == layout.num_bytes
