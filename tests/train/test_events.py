"""Event files say what TensorBoard reads, also after a crash: no step twice."""

import struct
from dataclasses import replace
from pathlib import Path

import pytest
from tensorboardX.crc32c import crc32c
from tensorboardX.proto.event_pb2 import Event, SessionLog

from tests.train.toy import PLAN, STEPS, Interrupted, Toy


def masked(data: bytes) -> int:
    crc = crc32c(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def events(path: Path) -> list[Event]:
    """A file of TFRecords: length, its checksum, data, its checksum."""
    data, found = path.read_bytes(), []
    while data:
        (length, of_length), data = struct.unpack("<QI", data[:12]), data[12:]
        assert of_length == masked(struct.pack("<Q", length))
        body, (checksum,), data = data[:length], struct.unpack("<I", data[length : length + 4]), data[length + 4 :]
        assert checksum == masked(body)
        found.append(Event.FromString(body))
    return found


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """As TensorBoard has them: a session that starts at a step voids what was said of it and of later ones."""
    points: dict[str, list[tuple[int, float]]] = {}
    for path in sorted(folder.glob("events.out.tfevents.*")):
        for event in events(path):
            if event.session_log.status == SessionLog.START:
                points = {tag: [p for p in curve if p[0] < event.step] for tag, curve in points.items()}
            for value in event.summary.value:
                points.setdefault(value.tag, []).append((event.step, value.simple_value))
    return points


def test_loss_learning_rate_and_speed_are_told_by_step_and_records_by_epoch(tmp_path):
    toy = Toy()
    toy.train(tmp_path)
    found = curves(tmp_path)
    assert set(found) == {"loss", "learning_rate", "examples/s"} | {
        f"epoch/{name}" for name in ("loss", "seconds", "waited_s", "quality")
    }
    for tag in ("loss", "learning_rate", "examples/s"):
        assert [step for step, _ in found[tag]] == list(range(1, STEPS + 1))
    assert [rate for _, rate in found["learning_rate"]] == pytest.approx([PLAN.rate(step) for step in range(STEPS)])
    assert found["epoch/quality"] == [(7, 3.0), (14, 1.0), (21, 2.0), (28, 1.5)]
    assert [loss for _, loss in found["epoch/loss"]] == pytest.approx([r["loss"] for r in toy.records])
    assert all(speed > 0 for _, speed in found["examples/s"])


@pytest.mark.parametrize("stop_at", [1, 7, 10])
def test_a_resumed_training_tells_every_step_once(tmp_path, stop_at):
    straight = Toy()
    straight.train(tmp_path / "straight")
    plan = replace(PLAN, checkpoint_s=1000.0)  # so that steps told are done again
    with pytest.raises(Interrupted):
        Toy(stop_at=stop_at).train(tmp_path / "stopped", plan)
    Toy().train(tmp_path / "stopped", plan)
    one, other = curves(tmp_path / "straight"), curves(tmp_path / "stopped")
    for tag in ("loss", "learning_rate", "epoch/quality", "epoch/loss"):
        assert one[tag] == other[tag]


def test_an_epoch_of_many_steps_has_about_a_hundred_points(tmp_path):
    Toy(quality=(1.0,)).train(tmp_path, replace(PLAN, num_examples=350, batch=1, epochs=1))
    assert [step for step, _ in curves(tmp_path)["loss"]] == list(range(3, 351, 3))
