"""Fine-tune a network inside a process whose memory the operating system caps.

    python examples/capped.py --vanilla     # torch alone: dies
    python examples/capped.py               # Palmette: learns, under the same cap

The cap is RLIMIT_AS: what the process has mapped when the network and the data are loaded, and `--cap` MiB more.
Without a cap, `--cap 0`, both learn, and the peak is printed.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import palmette as pm

BATCH, SIDE = 64, 48


class Block(nn.Module):
    """Two convolutions beside a shortcut; the second begins at zero, so that the network begins as its shortcuts."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(width, width, 3, 1, 1), nn.Conv2d(width, width, 3, 1, 1)
        nn.init.kaiming_normal_(self.first.weight)
        nn.init.zeros_(self.second.weight)

    def forward(self, x: Tensor) -> Tensor:
        """X plus what the block adds."""
        y: Tensor = x + self.second(F.relu(self.first(F.relu(x))))
        return y


def network() -> nn.Module:
    """A residual network for 48 x 48 images."""
    blocks = [Block(16) for _ in range(10)]
    return nn.Sequential(nn.Conv2d(1, 16, 3, 1, 1), *blocks, nn.AvgPool2d(6), nn.Flatten(), nn.Linear(16 * 64, 10))


def data() -> tuple[Tensor, Tensor]:
    """Scikit-learn's digits, 48 x 48."""
    digits = load_digits()
    x = torch.from_numpy(digits.images.astype(np.float32)[:, None] / 16)
    return F.interpolate(x, size=(SIDE, SIDE)), torch.from_numpy(digits.target.astype(np.int64))


def return_freed_memory() -> None:
    """Start again with an allocator that hands freed tensors back at once, so that the cap meets what is in use."""
    if "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        settings = {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576"}
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | settings)  # itself again


def mapped() -> int:
    """Bytes of address space that the process uses."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def cap(mebibytes: int) -> None:
    """Let the operating system refuse what goes beyond."""
    limit = mapped() + mebibytes * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of images told right, in eval mode."""
    model.eval()
    with torch.no_grad():
        right = sum(int((model(a).argmax(1) == b).sum()) for a, b in zip(x.split(16), y.split(16), strict=True))
    model.train()
    return right / len(x)


def main() -> None:
    """Cap the process, then train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vanilla", action="store_true", help="train without Palmette")
    parser.add_argument("--cap", type=int, default=224, metavar="MIB", help="what the process may map beyond its start")
    parser.add_argument("--budget", default="6MiB", help="what may be kept for backward")
    parser.add_argument("--steps", type=int, default=30)
    options = parser.parse_args()
    return_freed_memory()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x, y = data()
    train, test = slice(0, 1400), slice(1400, None)
    model = network()
    print(f"cap: {options.cap} MiB" if options.cap else "no cap", flush=True)
    if options.cap:
        cap(options.cap)
    if not options.vanilla:
        adaptation = pm.adapt(model, (x[:BATCH], y[:BATCH]), F.cross_entropy, budget=options.budget)
        print(adaptation.report(), flush=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.05, momentum=0.9)
    order = torch.Generator().manual_seed(0)
    for step in range(options.steps):
        index = torch.randint(train.stop, (BATCH,), generator=order)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x[index]), y[index])
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 2.0)
        optimizer.step()
        if step % 10 == 0:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
    print(f"test accuracy {accuracy(model, x[test], y[test]):.3f} of {len(y[test])} images")
    print(f"peak resident set {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024} MiB", file=sys.stderr)


if __name__ == "__main__":
    main()
