"""Who leaves a race, and who must not."""

import numpy as np
import pytest

from diffmine.mining.racing import pays, rounds, survivors


@pytest.mark.parametrize("strata", [1, 2, 5, 6, 10, 25, 100])
def test_rounds_deal_out_every_stratum_once_and_let_ever_fewer_stay(strata: int) -> None:
    found = rounds(strata)
    assert sorted(s for one in found for s in one.strata) == list(range(strata))
    assert all(one.strata for one in found)
    assert [one.staying for one in found] == sorted((one.staying for one in found), reverse=True)
    assert all(one.staying >= 2 for one in found)


def test_strata_of_a_round_lie_apart_and_the_first_ones_in_the_lower_third() -> None:
    first, *others = rounds(100)
    assert all(abs(a - b) >= 5 for one in (first, *others[:3]) for a in one.strata for b in one.strata if a != b)
    assert first.strata[0] == 30


def test_a_race_for_one_in_twenty_takes_a_quarter_of_the_draws() -> None:
    each, left, spent = rounds(10), 1.0, 0.0
    for one in each:
        spent += len(one.strata) / 10 * left
        left = one.staying / 20
    assert spent < 0.25


def test_clear_losers_leave_and_twice_the_wanted_stay() -> None:
    best = np.concatenate([np.linspace(2, 1, 40), np.zeros(960)])
    for factor, staying in ((5, 100), (3.5, 70), (2, 40)):
        stay = survivors(best, np.full(1000, 0.05), 20, 0.95, factor)
        assert stay[:40].all()
        assert stay.sum() == staying


def test_nobody_leaves_when_differences_are_noise() -> None:
    best = np.linspace(1, 0.99, 500)
    assert survivors(best, np.full(500, 0.2), 10, 0.95, 2).all()
    assert survivors(best[:20], np.zeros(20), 10, 0.95, 2).all()
    assert survivors(np.ones(500), np.zeros(500), 10, 0.95, 2).all()


def test_the_border_is_the_last_one_wanted_and_as_noisy_as_those_around_it() -> None:
    """Ranks 10 to 39 count where 20 are wanted: 1.96 root mean squares of 0.3 and 0.4 are 69.3 steps below rank 19."""
    stderr = np.full(1001, 9.0)
    stderr[10:40:2], stderr[11:40:2] = 0.3, 0.4
    assert np.flatnonzero(~survivors(np.linspace(10, 0, 1001), stderr, 20, 0.975, 2))[0] == 19 + 69 + 1


def test_more_confidence_keeps_more() -> None:
    rng = np.random.default_rng(0)
    best, stderr = rng.normal(size=2000), np.full(2000, 0.3)
    counts = [int(survivors(best, stderr, 50, c, 2).sum()) for c in (0.6, 0.8, 0.95, 0.999)]
    assert counts == sorted(counts)
    assert 100 <= counts[0] < counts[-1] < 2000


def test_winners_survive_at_the_stated_confidence() -> None:
    """Noisy first looks at known scores: of the true best patches, at least the stated share stays."""
    rng, kept = np.random.default_rng(1), []
    for _ in range(50):
        true = rng.gamma(2, size=2000)
        noise = rng.normal(scale=0.8, size=2000)
        winners = np.argsort(-true)[:40]
        kept.append(survivors(true + noise, np.full(2000, 0.8), 40, 0.95, 5)[winners].mean())
    assert np.mean(kept) >= 0.95


def test_order_does_not_matter() -> None:
    rng = np.random.default_rng(2)
    best, stderr, order = rng.normal(size=300), rng.uniform(0.1, 0.3, 300), rng.permutation(300)
    assert np.array_equal(survivors(best[order], stderr[order], 20, 0.9, 2), survivors(best, stderr, 20, 0.9, 2)[order])


def test_a_race_pays_only_where_many_compete_for_few() -> None:
    assert pays(1501, 200)
    assert not pays(1500, 200)
