"""adaptive_neon.seeds: who may see which seed."""

import numpy as np
import pytest

import adaptive_neon as neon

SIZES = {"synthetic": 6000, "select_images": 1000, "final_images": 500}


def ledger(**options):
    return neon.seeds.seed_ledger(**SIZES | options)


def test_selection_has_seeds_from_10_000():
    selection = ledger().selection
    assert (selection.first, selection.count, selection.last) == (10_000, 1000, 10_999)


def test_final_sets_follow_each_other():
    finals = ledger(final_repeats=3).finals
    assert [(seeds.first, seeds.count) for seeds in finals] == [
        (50_000, 500),
        (50_500, 500),
        (51_000, 500),
    ]


def test_another_final_seed_moves_all_final_sets_alone():
    moved, usual = ledger(final_seed=200_000, final_repeats=2), ledger(final_repeats=2)
    assert [seeds.first for seeds in moved.finals] == [200_000, 200_500]
    assert (moved.selection, moved.search) == (usual.selection, usual.search)


def test_search_has_as_many_seeds_as_the_selection():
    search = ledger().search
    assert (search.first, search.count) == (10_000_000, 1000)


@pytest.mark.parametrize(
    "of, final",
    [
        (lambda found: found.selection, False),
        (lambda found: found.search, False),
        (lambda found: found.finals[0], True),
        (lambda found: found.finals[1], True),
    ],
    ids=["selection", "search", "final 1", "final 2"],
)
def test_only_final_sets_are_final(of, final):
    assert of(ledger(final_repeats=2)).is_final == final


def test_seeds_of_a_set():
    seeds = neon.seeds.SeedSet("selection", 7, 3)
    assert seeds.seeds.tolist() == [7, 8, 9]


def test_start_of_a_set_keeps_its_purpose():
    start = neon.seeds.SeedSet("final 2", 7, 30).start(4)
    assert start == neon.seeds.SeedSet("final 2", 7, 4)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"final_repeats": 7, "final_images": 1234},
        {"synthetic": 10_000, "select_images": 40_000, "final_images": 100_000},
        {"final_seed": 12_000},
    ],
    ids=str,
)
def test_no_seed_is_in_two_sets(options):
    found = ledger(**options)
    synthetic = np.arange({**SIZES, **options}["synthetic"])
    sets = [synthetic, *(s.seeds for s in (found.selection, *found.finals, found.search))]
    everything = np.concatenate(sets)
    assert len(np.unique(everything)) == len(everything)


@pytest.mark.parametrize(
    "options, sets",
    [
        ({"synthetic": 10_001}, "synthetic set .* selection set"),
        ({"select_images": 40_001}, "selection set .* final 1 set"),
        ({"final_images": 9_950_001}, "final 1 set .* search set"),
        ({"final_images": 5_000_000, "final_repeats": 2}, "final 2 set .* search set"),
        ({"final_seed": 5_999}, "synthetic set .* final 1 set"),
        ({"final_seed": 9_501}, "selection set .* final 1 set"),
        ({"final_seed": 10_999}, "selection set .* final 1 set"),
    ],
    ids=str,
)
def test_sets_that_overlap_are_refused(options, sets):
    with pytest.raises(neon.files.UserError, match=f"seeds of the {sets}"):
        ledger(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"synthetic": 10_000},
        {"select_images": 40_000},
        {"final_images": 9_950_000},
        {"final_seed": 6_000},
        {"final_seed": 9_500},
        {"final_seed": 11_000},
    ],
    ids=str,
)
def test_sets_may_touch(options):
    ledger(**options)


def test_search_set_counts_only_for_a_search_by_gradient():
    ledger(final_images=9_950_001, searched=False)


@pytest.mark.parametrize(
    "options",
    [{"final_images": 10**8, "final_repeats": 42}, {"final_seed": 2**32 - 500}],
    ids=str,
)
def test_up_to_2_to_the_32_seeds(options):
    ledger(searched=False, **options)


@pytest.mark.parametrize(
    "options",
    [{"final_images": 10**8, "final_repeats": 43}, {"final_seed": 2**32 - 499}],
    ids=str,
)
def test_more_than_2_to_the_32_seeds_are_refused(options):
    with pytest.raises(neon.files.UserError, match="2\\^32 seeds"):
        ledger(searched=False, **options)


def test_papers_protocol_selects_on_seeds_that_were_trained_on():
    found = ledger(paper=True, select_images=2000)
    assert (found.selection.first, found.selection.count) == (0, 2000)
    assert found.finals[0].first == 50_000


def test_papers_protocol_allows_no_other_overlap():
    with pytest.raises(neon.files.UserError, match="overlap"):
        ledger(paper=True, final_seed=500)
