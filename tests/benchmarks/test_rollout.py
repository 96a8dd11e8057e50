"""A roll-out is measured on a world in which a mix of two spaces is seen, and nothing else is taken for one."""

from benchmarks.rollout_world import KEEP, World


def test_what_either_version_finds_is_no_mix_and_what_both_together_find_is(tmp_path):
    world = World.build(tmp_path / "rollout", 5_000, 40, 100.0)
    for user in range(40):
        for order in world.order:
            assert world.num_of_no_version(user, order[user][:KEEP], 4) == 0
            assert world.num_of_no_version(user, order[user], 4) == 0
        assert world.num_of_no_version(user, world.crossed[user], 4) >= 3
    assert all(0.4 < recall.mean() < 0.95 for recall in world.recall)
