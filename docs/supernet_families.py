"""The table of what each family of the coverage table becomes as a supernet."""

from __future__ import annotations

import json
from pathlib import Path

from layout import table

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "supernet_families.json"
KINDS = ("width", "depth", "kernel", "heads")


def families_section() -> str:
    """Choices of each kind, networks, the largest difference between extract and activate, and whether bytes agree."""
    stored = json.loads(RESULTS.read_text())
    rows = [stored["rows"][key] for key in sorted(stored["rows"])]
    lines = []
    for row in rows:
        same = "to the byte" if not row["failures"] else f"above in {len(row['failures'])} of {row['configurations']}"
        networks = f"{row['networks']:.2g}"
        counts = [str(row[kind]) for kind in KINDS]
        lines.append((f"`{row['family']}`", *counts, networks, str(row["static"]), f"{row['worst']:.1e}", same))
    exact = sum(not row["failures"] for row in rows)
    elastic = sum(any(row[kind] for kind in KINDS) for row in rows)
    reasons = sorted({reason for row in rows for reason in row["reasons"]})
    head = ("family", *KINDS, "networks", "static layers", "extract against activate", "bytes, predicted")
    return (
        f"## Supernets\n\n{elastic} of {len(rows)} families have something elastic. The largest configuration is the "
        "original bit for bit; the smallest and three random ones are extracted and compared with the active forward "
        "pass (largest relative difference). Peak memory and parameters are predicted in closed form and held against "
        f"the meter on the extracted network: equal in {exact} families, more than measured and never less in the "
        f"others. Measured by `python benchmarks/supernet/families.py`.\n\n{table(head, lines)}\n\n"
        f"Why layers stay as they are: {'; '.join(reasons)}."
    )
