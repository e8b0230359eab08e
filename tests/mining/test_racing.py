"""Who leaves a race, and who must not."""

import numpy as np
import pytest

from diffmine.mining.racing import pays, rounds, survivors


@pytest.mark.parametrize("draws", [20, 21, 40, 100, 400])
def test_rounds_grow_and_spend_all_draws(draws: int) -> None:
    found = rounds(draws)
    assert sum(found) == draws
    assert all(n >= 4 and n % 2 == 0 for n in found[:-1])
    assert found == sorted(found)


def test_too_few_draws_are_one_round() -> None:
    assert rounds(12) == [12]


def test_clear_losers_leave_and_twice_the_wanted_stay() -> None:
    best = np.concatenate([np.linspace(2, 1, 40), np.zeros(960)])
    for rounds_done, staying in ((1, 100), (2, 80), (3, 40), (4, 40)):
        stay = survivors(best, np.full(1000, 0.05), 20, 0.95, rounds_done)
        assert stay[:40].all()
        assert stay.sum() == staying


def test_nobody_leaves_when_differences_are_noise() -> None:
    best = np.linspace(1, 0.99, 500)
    assert survivors(best, np.full(500, 0.2), 10, 0.95, 3).all()
    assert survivors(best[:20], np.zeros(20), 10, 0.95, 3).all()


def test_more_confidence_keeps_more() -> None:
    rng = np.random.default_rng(0)
    best, stderr = rng.normal(size=2000), np.full(2000, 0.3)
    counts = [int(survivors(best, stderr, 50, c, 3).sum()) for c in (0.6, 0.8, 0.95, 0.999)]
    assert counts == sorted(counts)
    assert 100 <= counts[0] < counts[-1] < 2000


def test_winners_survive_at_the_stated_confidence() -> None:
    """Noisy first looks at known scores: of the true best patches, at least the stated share stays."""
    rng, kept = np.random.default_rng(1), []
    for _ in range(50):
        true = rng.gamma(2, size=2000)
        noise = rng.normal(scale=0.8, size=2000)
        winners = np.argsort(-true)[:40]
        kept.append(survivors(true + noise, np.full(2000, 0.8), 40, 0.95, 1)[winners].mean())
    assert np.mean(kept) >= 0.95


def test_order_does_not_matter() -> None:
    rng = np.random.default_rng(2)
    best, stderr, order = rng.normal(size=300), rng.uniform(0.1, 0.3, 300), rng.permutation(300)
    assert np.array_equal(survivors(best[order], stderr[order], 20, 0.9, 3), survivors(best, stderr, 20, 0.9, 3)[order])


def test_a_race_pays_only_where_many_compete_for_few() -> None:
    assert pays(1001, 200)
    assert not pays(1000, 200)
