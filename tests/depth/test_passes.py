"""A score looks at the data once, however many sites there are."""

from __future__ import annotations

import pytest

from palmette.depth import battery
from palmette.registry import Method, methods

TRIALS = {"tlc"}  # its score is the loss with each candidate masked in turn: a pass for each


class Counted:
    """The batches of a loader, and how many passes were begun and batches drawn."""

    def __init__(self, loader) -> None:
        self.batches, self.passes, self.drawn = list(loader), 0, 0

    def __iter__(self):
        self.passes += 1
        for batch in self.batches:
            self.drawn += 1
            yield batch

    def __len__(self) -> int:
        return len(self.batches)


@pytest.mark.parametrize("method", methods("depth"), ids=lambda method: method.name)
def test_scoring_all_sites_is_one_pass(method: Method) -> None:
    captured, found, loader, config = battery._prepared(method)
    counted = Counted(loader)
    method.score(captured, found, counted, config, seed=0)
    if method.name in TRIALS:
        assert len(found) < counted.passes <= 3 * len(found) + 2
    else:
        assert counted.passes <= 1
        assert counted.drawn <= len(counted)


def test_whatever_is_tried_site_by_site_is_a_method() -> None:
    assert {method.name for method in methods("depth")} >= TRIALS
