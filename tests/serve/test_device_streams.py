import threading

import pytest
import torch

from prerank.errors import ConfigError
from prerank.serve.device_cuda import CudaDevice, cuda_device
from prerank.serve.device_streams import CpuDevice
from tests.serve.late_device import LateDevice

DEVICES = [CpuDevice, lambda: LateDevice(threading.RLock())]


@pytest.fixture(params=[*DEVICES, pytest.param(cuda_device, marks=pytest.mark.gpu)])
def device(request):
    return request.param()


def test_what_a_stream_follows_is_done_first_and_when_its_event_has_happened_all_is_done(device):
    first, second = device.stream(), device.stream()
    numbers = torch.zeros(2, device=device.where)
    torch.ones(1, device=device.where).sum().item()  # what made them is done
    first.do(lambda: numbers[0].add_(3))
    second.follow(first.mark())
    second.do(lambda: numbers[1].copy_(numbers[0] * 2))
    second.mark().wait()
    assert numbers.tolist() == [3.0, 6.0]


def test_a_graph_does_its_work_again_on_what_is_in_its_memory_then(device):
    stream, pool = device.stream(), device.pool()
    given, made = torch.zeros(4, device=device.where), torch.zeros(4, device=device.where)

    def work():
        made.copy_(given * 2 + 1)

    pool.stream.do(work)
    pool.stream.mark().wait()
    graph = pool.capture(work)
    for number in (1.0, 5.0):
        stream.do(lambda number=number: given.fill_(number))
        stream.do(graph.replay)
        stream.mark().wait()
        assert made.tolist() == [2 * number + 1] * 4


def test_copies_from_and_to_page_locked_memory_come_in_order(device):
    stream = device.stream()
    here, back = device.locked((3,), torch.float32), device.locked((3,), torch.float32)
    there = torch.zeros(3, device=device.where)
    here.copy_(torch.tensor([1.0, 2.0, 3.0]))
    stream.do(lambda: there.copy_(here, non_blocking=True))
    stream.do(lambda: there.mul_(2))
    stream.do(lambda: back.copy_(there, non_blocking=True))
    stream.mark().wait()
    assert back.tolist() == [2.0, 4.0, 6.0]


def test_work_that_fails_while_it_is_captured_says_so_and_the_pool_goes_on(device):
    pool = device.pool()

    def wrong():
        raise ValueError("a shape that depends on data")

    with pytest.raises(ValueError, match="depends on data"):
        pool.capture(wrong).replay()  # where a graph is its work once more, it fails then
    assert pool.capture(lambda: None) is not None


def test_a_device_has_memory_and_ordinary_errors_do_not_mean_that_it_is_lost(device):
    assert device.free_bytes() > 1 << 20
    assert not device.is_lost(ValueError("no"))
    assert device.pool().num_bytes == 0


def test_only_errors_after_which_nothing_works_mean_that_a_cuda_device_is_lost():
    device = CudaDevice(torch.device("cuda", 0))

    def error(code):
        found = torch.AcceleratorError("CUDA error")
        found.error_code = code
        return found

    assert [device.is_lost(error(code)) for code in (700, 719, 214, 46)] == [True] * 4
    assert [device.is_lost(error(code)) for code in (1, 2, 900, 901)] == [False] * 4
    assert not device.is_lost(torch.OutOfMemoryError("CUDA out of memory"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_where_there_is_no_cuda_device_that_is_said():
    with pytest.raises(ConfigError, match=r"device cuda: (there is no CUDA device|this torch is built without CUDA)"):
        cuda_device()
