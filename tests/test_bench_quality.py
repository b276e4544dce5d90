"""Which rows `benchmarks/bench_quality.py --methods` makes."""

import pytest
from bench_quality import GROUPS, VARIANTS, wanted

from pyprune.eigendamage.config import METHOD
from pyprune.methods import METHODS, SHOT_METHODS

NAMES = [*METHODS, *SHOT_METHODS, METHOD, *VARIANTS]


@pytest.mark.parametrize("name", NAMES)
def test_a_method_is_its_own_rows(name):
    assert {method for method, _ in wanted([name], None)} == {name}
    home = next((patterns for members, patterns in GROUPS.values() if name in members), None)
    patterns = home or ("0.5", "2:4")
    assert wanted([name], None) == [(name, pattern) for pattern in patterns]


@pytest.mark.parametrize("group", GROUPS)
def test_a_group_is_all_of_its_members(group):
    members, patterns = GROUPS[group]
    assert group not in NAMES
    assert wanted([group], None) == [(m, p) for p in patterns for m in members]
    assert set(members) <= set(NAMES)


def test_other_names_are_refused():
    with pytest.raises(SystemExit, match="no method wandering"):
        wanted(["wandering"], None)
