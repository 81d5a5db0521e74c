"""What `collapse` did and refused, with the reasons, errors and costs."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class MergeRecord:
    """One merge, done or refused.

    `members`: paths merged into `result`; `worst_error`: largest relative error of the merged operation against what
    it replaces, in float64 (`worst_error_float32`: in float32); MACs per sample; ms at batch 1 when measured.
    """

    members: tuple[str, ...]
    result: str
    done: bool
    reason: str
    exactness: str
    worst_error: float
    worst_error_float32: float
    macs_before: int
    macs_after: int
    ms_before: float | None = None
    ms_after: float | None = None


@dataclass
class CollapseRecord:
    """What `collapse` did: merges, former activations absorbed elsewhere, dead channels deleted.

    `dead_kept`: why dead channels stayed, "" if none did or there were none.
    """

    merges: list[MergeRecord] = field(default_factory=list)
    narrowed: list[dict[str, Any]] = field(default_factory=list)
    absorbed: list[str] = field(default_factory=list)
    cost: str = ""
    dead_kept: str = ""

    @property
    def done(self) -> list[MergeRecord]:
        """The merges that were done."""
        return [m for m in self.merges if m.done]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {
            "merges": [asdict(m) for m in self.merges],
            "narrowed": self.narrowed,
            "absorbed": self.absorbed,
            "cost": self.cost,
            "dead_kept": self.dead_kept,
        }

    def __str__(self) -> str:
        lines = [f"{len(self.done)} of {len(self.merges)} merges done (cost: {self.cost})"]
        for m in self.merges:
            state = f"{m.exactness}, error {m.worst_error:.1e}" if m.done else f"refused: {m.reason}"
            lines.append(
                f"  {' + '.join(m.members)}: {m.macs_before / 1e6:.2f} -> {m.macs_after / 1e6:.2f} M MACs, {state}"
            )
        if self.dead_kept:
            lines.append(f"  dead channels stay: {self.dead_kept}")
        return "\n".join(lines)
