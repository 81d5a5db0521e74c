"""The report: one self-contained page that says what the figures say and claims no more."""

from __future__ import annotations

import copy
import json
import math
import re
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from palmette.errors import RunError
from palmette.report import render, words
from palmette.report.figures import Figures, load_figures
from palmette.report.theme import COLOUR, distinct, shorten

sys.path.insert(0, str(Path(__file__).parent))
import sample

VOID = {"meta", "br", "wbr", "link", "hr", "img"}


class Page(HTMLParser):
    """Checks that tags are balanced and collects what a test asks about."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.words: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"[ \n\t]+", " ", "".join(self.words))


def page(folder: Path, changed: dict[str, Any] | None = None, *, with_plan: bool = True) -> Page:
    return Page(render(sample.write_run(folder, changed, with_plan=with_plan)).read_text())


def loaded(tmp_path: Path, changed: dict[str, Any] | None = None) -> Figures:
    return load_figures(sample.write_run(tmp_path, changed))


def with_difference(difference: list[float] | None, name: str = "shrunk") -> dict[str, Any]:
    rows = sample.figures()["rows"]
    next(r for r in rows if r["name"] == name)["difference"] = difference
    return {"rows": rows}


# ------------------------------------------------------------------------------------------------------- the file
def test_the_page_is_one_small_file_that_loads_nothing(tmp_path: Path) -> None:
    path = render(sample.write_run(tmp_path))
    text = path.read_text()
    assert path == tmp_path / "report.html"
    assert path.stat().st_size < 300_000
    assert "<script" not in text
    assert "@import" not in text
    seen = Page(text)
    for tag, name, value in seen.attributes:
        if name in ("src", "href", "xlink:href", "data", "action"):
            assert value.startswith("#"), (tag, name, value)
    assert not re.search(r"url\((?!#)", text)


def test_the_same_run_gives_the_same_bytes_and_no_date(tmp_path: Path) -> None:
    first = render(sample.write_run(tmp_path / "a")).read_bytes()
    second = render(sample.write_run(tmp_path / "b")).read_bytes()
    assert first == second
    assert b"Matplotlib" not in first
    assert not re.search(rb"20\d\d-\d\d-\d\d", first)


def test_every_picture_is_well_formed_named_and_themed(tmp_path: Path) -> None:
    text = render(sample.write_run(tmp_path)).read_text()
    pictures = re.findall(r'<svg role="img".*?</svg>', text, flags=re.DOTALL)
    assert len(pictures) == 4
    for picture in pictures:
        root = ET.fromstring(picture)
        assert len(root.attrib["aria-label"]) > 40
        assert "viewBox" in root.attrib
        assert "DejaVu" not in picture
    assert text.count("<figcaption>") == 4
    assert not any(colour in text for colour in COLOUR.values())
    used = set(re.findall(r"var\(--([\w-]+)\)", text))
    for scheme in re.findall(r":root \{(.*?)\}", text, flags=re.DOTALL):
        assert used <= set(re.findall(r"--([\w-]+):", scheme))


def test_ids_are_unique_and_references_resolve(tmp_path: Path) -> None:
    seen = page(tmp_path)
    ids = [value for _, name, value in seen.attributes if name == "id"]
    assert len(ids) == len(set(ids)) > 10
    targets = {v[1:] for _, name, v in seen.attributes if name in ("href", "xlink:href")}
    targets |= set(re.findall(r"url\(#([^)]+)\)", " ".join(v for _, _, v in seen.attributes)))
    assert targets <= set(ids)


def test_everything_from_outside_is_escaped(tmp_path: Path) -> None:
    evil = "<script>alert('x')</script>&\"$x^2$"
    changed = copy.deepcopy(sample.figures())
    for key in ("command", "method", "model", "data", "message", "split"):
        changed[key] = evil
    changed["environment"] = {evil: evil}
    changed["export"] = {evil: {"error": evil}}
    for part in changed["rounds"]:
        part.update(candidate=evil, reason=evil, sites=[evil])
    for part in changed["scores"]:
        part.update(name=evil, unit=evil)
    for part in changed["merges"]:
        part.update(members=[evil, evil], result=evil, reason=evil, exactness=evil)
    changed["rows"][2]["name"] = evil
    for row in changed["rows"]:
        for clock in row["latency"]:
            clock.update(runtime=evil + clock["runtime"], hardware=evil)
    seen = page(tmp_path, changed)
    assert not [tag for tag, _, _ in seen.attributes if tag == "script"]
    assert seen.text.count("alert('x')") > 20
    assert "<script" not in (tmp_path / "report.html").read_text()


# --------------------------------------------------------------------------------------------------- the content
def test_the_account_shows_every_number_of_every_row(tmp_path: Path) -> None:
    text = page(tmp_path).text
    for part in (
        "dense + same training",
        "random removal",
        "94.22\u202f%",
        "[93.75, 94.66]",
        "68.3\u202fM",
        "94.2\u202fM",
        "1.72\u202fMiB",
        "2.62\u202fms",
        "\u22120.24",
        "[\u22120.46, \u22120.02]",
        "10,000 test samples",
        "batch 1",
        "1 thread",
        "float32",
        sample.HARDWARE,
        "median of 30 interleaved runs",
        "ONNX Runtime",
        "PyTorch eager",
    ):
        assert part in text, part


def test_merges_refusals_exports_and_origin_are_listed(tmp_path: Path) -> None:
    text = page(tmp_path).text
    for part in (
        "features.6.conv.0.0 + features.6.conv.1.0 + features.6.conv.2",
        "bias map",
        "1.2e\u221214",
        "5.12\u202fM \u2192 3.24\u202fM",
        "0.212 \u2192 0.149\u202fms",
        "Refused merges",
        "padding mode 'reflect' has no merged form",
        "6.1e\u221207",
        "1.3e\u221215",
        "128.4 dB",
        "no difference",
        "--max-drop 0.5",
        "seed",
        "2.13.0",
        "features.6.conv.0.2",
        "affine",
        "missed, undone",
        "6.96\u202fMiB",
    ):
        assert part in text, part


def test_undone_rounds_do_not_count_as_removed(tmp_path: Path) -> None:
    figures = loaded(tmp_path)
    assert [r.round for r in figures.kept_rounds] == [0, 1, 2, 3, 4]
    assert sample.BLOCKS[4] in figures.removed_names
    assert sample.BLOCKS[11] not in figures.removed_names


# -------------------------------------------------------------------------------------------- claims and intervals
@pytest.mark.parametrize(
    ("difference", "kind", "said"),
    [
        ([-0.24, -0.46, -0.02], "good", "Within 0.5 points"),
        ([-0.30, -0.50, -0.10], "good", "Within 0.5 points"),
        ([-0.30, -0.51, -0.09], "open", "Within 0.5 points: not resolved"),
        ([0.30, -0.60, 1.20], "open", "Within 0.5 points: not resolved"),
        ([-0.90, -1.31, -0.49], "open", "Within 0.5 points: not resolved"),
        ([-0.90, -1.29, -0.51], "bad", "More than 0.5 points lost"),
        ([0.40, 0.10, 0.70], "good", "Within 0.5 points"),
        (None, "open", "Within 0.5 points: not resolved (no paired comparison)"),
    ],
)
def test_within_is_said_only_when_the_interval_is(
    difference: list[float] | None, kind: str, said: str, tmp_path: Path
) -> None:
    figures = loaded(tmp_path, with_difference(difference))
    assert words.verdict(figures) == words.Verdict(kind=kind, text=said)
    assert ("Accuracy: within" in words.headline(figures)) == (kind == "good")
    assert said in page(tmp_path, with_difference(difference)).text


@pytest.mark.parametrize(
    ("difference", "said"),
    [
        ([-1.35, -1.69, -1.01], "\u201ceasier\u201d chose better than chance"),
        ([-0.40, -0.70, -0.10], "a difference between \u201ceasier\u201d and chance is not resolved"),
        ([0.60, 0.30, 0.90], "chance chose better than \u201ceasier\u201d"),
        (None, "the two were not compared"),
    ],
)
def test_the_method_is_held_against_chance(difference: list[float] | None, said: str, tmp_path: Path) -> None:
    assert said in " ".join(words.lead(loaded(tmp_path, with_difference(difference, "random removal"))))


@pytest.mark.parametrize(
    ("median", "low", "high", "said"),
    [
        (2.0, 1.9, 2.1, "1.71\u00d7 as fast in ONNX Runtime"),
        (3.3, 3.2, 3.4, "No faster in ONNX Runtime beyond the spread of the timing"),
        (5.0, 4.9, 5.1, "Slower in ONNX Runtime (3.42\u202fms before, 5.00\u202fms after)"),
    ],
)
def test_speed_is_claimed_only_beyond_the_quartiles(
    median: float, low: float, high: float, said: str, tmp_path: Path
) -> None:
    rows = sample.figures()["rows"]
    rows[1]["latency"][1].update(median_ms=median, q25_ms=low, q75_ms=high)
    assert words.headline(loaded(tmp_path, {"rows": rows})).startswith(said)


def test_one_point_is_one_point(tmp_path: Path) -> None:
    assert "within 1 point of the dense network" in words.headline(loaded(tmp_path, {"max_drop": 1.0}))


def test_validation_figures_are_called_what_they_are(tmp_path: Path) -> None:
    assert "also chose when to stop" in page(tmp_path, {"split": "val"}).text
    assert "also chose when to stop" not in page(tmp_path).text


# ------------------------------------------------------------------------------------------- missing optional parts
def test_a_run_in_which_nothing_pays(tmp_path: Path) -> None:
    dense = sample.figures()["rows"][0]
    same = {**dense, "name": "shrunk", "difference": [0.0, -0.02, 0.02]}
    empty: dict[str, Any] = {"rounds": [], "scores": [], "merges": [], "verification": {}, "export": {}}
    message = "Nothing was removed: no activation can be removed at a gain."
    for rows in ([dense, same], [dense]):
        text = page(tmp_path, {**empty, "rows": rows, "message": message}, with_plan=False).text
        assert "Nothing was removed: the result is the dense network." in text
        assert message in text
        assert "Within" not in text
        assert "No operations were merged" in text
        assert "<svg role" not in (tmp_path / "report.html").read_text()


def test_a_run_without_clock_exports_controls_or_optional_entries(tmp_path: Path) -> None:
    base = sample.figures()
    rows = [{**r, "latency": []} for r in base["rows"][:2]]
    rounds = [{**r, "latency_ms": None} for r in base["rounds"]]
    merges = [{**m, "ms_before": None, "ms_after": None} for m in base["merges"]]
    required = ("schema", "command", "method", "seed", "model", "data", "max_drop", "environment")
    figures = {key: base[key] for key in required} | {"rows": rows, "rounds": rounds, "merges": merges}
    sample.write_run(tmp_path, with_plan=False)
    (tmp_path / "figures.json").write_text(json.dumps(figures))
    text = Page(render(tmp_path).read_text()).text
    assert "multiply-adds (millions)" in text
    assert "controls (dense with the same training, random removal) were not run" in text
    assert "Latency" not in text.split("What was removed")[0]


def test_every_round_undone_and_a_failed_export(tmp_path: Path) -> None:
    base = sample.figures()
    rows = [base["rows"][0], {**base["rows"][0], "name": "shrunk", "difference": [0.0, -0.02, 0.02]}]
    rounds = [{**r, "accepted": False} for r in base["rounds"]]
    changed = {"rows": rows, "rounds": rounds, "merges": [], "export": {"onnx": {"error": "not informative"}}}
    text = page(tmp_path, changed).text
    assert "not written: not informative" in text
    assert text.count("missed, undone") == 7


def test_a_run_of_hundreds_of_merges_stays_small_and_says_what_is_left_out(tmp_path: Path) -> None:
    base = sample.figures()
    long = "a_rather_long_block_name_that_goes_on"
    changed = {
        "scores": [{**base["scores"][0], "name": f"{long}.{i}", "score": i / 100} for i in range(1500)],
        "merges": [{**base["merges"][i % 7], "members": [f"{long}.{i}.a", f"{long}.{i}.b"]} for i in range(1500)],
        "rounds": [{**base["rounds"][i % 7], "round": i} for i in range(600)],
    }
    text = page(tmp_path, changed).text
    assert (tmp_path / "report.html").stat().st_size < 1_000_000
    assert "The first 300 of" in text
    assert "the 60 lowest of 1500 candidates" in text


def test_extreme_scores_and_intervals_draw(tmp_path: Path) -> None:
    base = sample.figures()
    values = [-3.0, 0.0, 1e-9, 1e12]
    scores = [{**base["scores"][0], "name": f"s{i}", "score": v, "entropy": 0.5} for i, v in enumerate(values)]
    rows = [{**r, "accuracy": 1.0, "interval": [0.999, 1.0]} for r in base["rows"]]
    assert "1.0e+12" in page(tmp_path, {"scores": scores, "rows": rows}).text
    zero = [{**s, "score": 0.0, "entropy": None} for s in scores]
    assert "0.000" in page(tmp_path, {"scores": zero}).text


# ------------------------------------------------------------------------------------------------------ bad folders
def test_a_folder_without_figures(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"holds no figures\.json"):
        render(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda f: f.update(schema=2), "another version"),
        (lambda f: f.pop("method"), "'method' is missing"),
        (lambda f: f.update(rows=[]), "'rows' is empty"),
        (lambda f: f["rows"][1].pop("macs"), r"rows\[1\].*'macs' is missing"),
        (lambda f: f["rounds"][2].update(val_accuracy="high"), r"rounds\[2\]: val_accuracy.*'high' is no float"),
        (lambda f: f["rounds"][0].update(val_interval=["a", 1]), "holds another kind of value"),
        (lambda f: f.update(merges=[3]), r"merges\[0\].*an object was expected"),
        (lambda f: f["rows"][0]["latency"][0].pop("runtime"), r"rows\[0\]: latency\[0\].*'runtime' is missing"),
    ],
)
def test_damaged_figures_are_named(change: Any, said: str, tmp_path: Path) -> None:
    figures = sample.figures()
    change(figures)
    (tmp_path / "figures.json").write_text(json.dumps(figures))
    with pytest.raises(RunError, match=said):
        render(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_truncated_figures(tmp_path: Path) -> None:
    (tmp_path / "figures.json").write_text(json.dumps(sample.figures())[:200])
    with pytest.raises(RunError, match="damaged"):
        render(tmp_path)


# ----------------------------------------------------------------------------------------------------------- words
@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (words.count(12_640_000), "12.6\u202fM"),
        (words.count(999_600), "1.00\u202fM"),
        (words.count(53), "53"),
        (words.size(117_000), "114\u202fKiB"),
        (words.size(12), "12\u202fB"),
        (words.ms(0.0421), "0.042\u202fms"),
        (words.ms(None), "\u2013"),
        (words.signed(-0.004), "0.00"),
        (words.signed(0.5), "+0.50"),
        (words.change(200, 150), "\u221225\u202f%"),
        (words.change(200, 199), "\u22120.5\u202f%"),
        (words.change(0, 10), ""),
        (words.error(0.0), "0"),
        (words.error(math.inf), "not finite"),
        (words.score(0.00012), "1.2e\u221204"),
        (words.typeset("lost -1.5 [-2.0, +1] at 1e-07"), "lost \u22121.5 [\u22122.0, +1] at 1e-07"),
        (words.plural(1, "block"), "1 block"),
        (words.plural(1200, "block"), "1,200 blocks"),
    ],
)
def test_numbers_carry_units_and_true_signs(text: str, wanted: str) -> None:
    assert text == wanted


def test_labels_keep_what_tells_them_apart() -> None:
    names = [f"encoder.layers.encoder_layer_{i}.mlp.activation" for i in range(12)]
    labels = distinct(names, 30)
    assert len(set(labels.values())) == 12
    assert all(len(label) <= 30 for label in labels.values())
    assert distinct(["a.b", "a.c"], 30) == {"a.b": "a.b", "a.c": "a.c"}
    assert distinct([], 30) == {}
    assert shorten("abcdefghij", 5) == "ab\u2026ij"
    alone = "one_single_component_without_any_dot_in_it"
    assert len(distinct([alone], 20)[alone]) == 20
