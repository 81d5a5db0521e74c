"""Where a run may work: what is refused, what one process is given. For two see tests/depth/test_devices.py."""

from __future__ import annotations

import pytest
import torch
from lightning_fabric import Fabric
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from palmette import ranks
from palmette.errors import DataError, InputError
from palmette.train.spread import Spread, steps_per_epoch


def loader() -> DataLoader:
    return DataLoader(TensorDataset(torch.zeros(10, 2), torch.zeros(10)), batch_size=4)


class Stream(IterableDataset):
    """Samples without numbers."""

    def __iter__(self):
        return iter(range(3))


def test_one_device_needs_no_fabric() -> None:
    with Spread().entered("auto", [1, 2]) as fabric:
        assert fabric is None
        assert ranks.count() == 1


def test_a_fabric_of_ones_own_is_handed_on() -> None:
    own = Fabric(accelerator="cpu", devices=1)
    with Spread(fabric=own).entered("auto", [1, 2]) as fabric:
        assert fabric is own
        assert ranks.count() == 1


@pytest.mark.parametrize("options", [{"devices": 0}, {"nodes": 0}, {"devices": "2"}, {"ray": 3}])
def test_nonsense_is_refused(options) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        Spread(**options)


@pytest.mark.parametrize("train", [[(1, 2)], DataLoader(Stream())])
def test_data_that_cannot_be_dealt_out_are_refused(train) -> None:
    with pytest.raises(DataError, match="cannot be dealt out"), Spread(devices=2).entered("auto", train):
        pytest.fail("two processes were started")


def test_steps_of_an_epoch() -> None:
    assert steps_per_epoch(loader(), None) == steps_per_epoch(loader(), Fabric(accelerator="cpu", devices=1)) == 3
