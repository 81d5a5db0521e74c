"""Small networks and data that the tests of the training wing share."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

CLASSES = 3


def data(n: int = 60, features: int = 5) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, features, generator=generator)
    return TensorDataset(x, x[:, :CLASSES].argmax(1))


def loader(n: int = 60, batch_size: int = 10, **options) -> DataLoader:
    return DataLoader(data(n), batch_size=batch_size, **{"shuffle": True, **options})


def net(seed: int = 0, dropout: float = 0.2) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, CLASSES))


class Block(nn.Module):
    """A residual block that ends in a ReLU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm, self.act = nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        self.second = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.second(self.act(self.norm(self.first(x)))))


class Residual(nn.Module):
    """A stem, three residual blocks and a head, for images [N, 3, 6, 6]."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, width, 3, padding=1), nn.Linear(width, CLASSES)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(torch.relu(self.stem(x))).mean((2, 3)))


def residual(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return Residual()


def images(n: int = 60, batch_size: int = 10, **options) -> DataLoader:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(n, 3, 6, 6, generator=generator)
    x[:, :CLASSES] += 2 * torch.eye(CLASSES)[torch.arange(n) % CLASSES][:, :, None, None]
    return DataLoader(
        TensorDataset(x, torch.arange(n) % CLASSES), batch_size=batch_size, **{"shuffle": True, **options}
    )


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
