"""Units and device profiles."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from palmette.device import DeviceProfile, format_bytes, parse_bytes, parse_latency, profile_named
from palmette.errors import InputError


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("512KiB", 524288),
        ("1 MiB", 1048576),
        ("1.5MB", 1500000),
        ("320 kb", 320000),
        ("0.5KiB", 512),
        ("4096", 4096),
        ("7B", 7),
        (12, 12),
        (0, 0),
        ("2GiB", 2**31),
    ],
)
def test_bytes_parse(text: str | int, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "KiB", "12 parsecs", "-1KiB", -1, "1.5B", "1e3", "12 KiB extra", True, None, 1.5])
def test_what_is_no_amount_of_memory_is_refused_by_name(text: object) -> None:
    with pytest.raises(InputError, match="is not an amount of memory") as error:
        parse_bytes(text)  # type: ignore[arg-type]
    assert repr(text) in str(error.value)


@given(st.integers(0, 2**62))
def test_an_int_is_its_own_size(size: int) -> None:
    assert parse_bytes(size) == size


@given(st.integers(0, 1023), st.sampled_from(["B", "KiB", "MiB", "GiB", "TiB"]))
def test_formatted_sizes_parse_back(number: int, unit: str) -> None:
    size = parse_bytes(f"{number}{unit}")
    assert parse_bytes(format_bytes(size)) == size


@pytest.mark.parametrize(
    ("text", "ms"), [("5ms", 5), ("0.2 s", 200), ("300us", 0.3), ("300 µs", 0.3), (7, 7), ("2.5", 2.5)]
)
def test_latency_parses(text: str | float, ms: float) -> None:
    assert parse_latency(text) == pytest.approx(ms)


@pytest.mark.parametrize("text", ["0ms", "-5ms", "soon", "5 KiB", float("nan"), float("inf"), 0, None])
def test_what_is_no_latency_is_refused(text: object) -> None:
    with pytest.raises(InputError):
        parse_latency(text)  # type: ignore[arg-type]


def test_a_profile_takes_text_and_says_which_bounds_break() -> None:
    board = DeviceProfile(name="board", ram="320KiB", flash="1MiB", latency_ms=10, weights_in="flash")
    assert (board.ram_bytes, board.flash_bytes) == (327680, 1048576)
    assert list(board.exceeded(param_bytes=2**20, peak_bytes=327680, latency_ms=10.0)) == []
    broken = list(board.exceeded(param_bytes=2**20 + 1, peak_bytes=327681, latency_ms=10.5))
    assert len(broken) == 3
    assert "takes 10.5 ms, the bound is 10 ms" in broken


def test_weights_in_ram_count_against_it() -> None:
    weights = 1000
    assert list(DeviceProfile(ram=1500, weights_in="flash").exceeded(param_bytes=weights, peak_bytes=600)) == []
    assert len(list(DeviceProfile(ram=1500).exceeded(param_bytes=weights, peak_bytes=600))) == 1


def test_the_reserve_of_the_runtime_counts_against_ram() -> None:
    board = DeviceProfile(ram="1KiB", weights_in="flash", reserve="24B")
    assert board.reserve_bytes == 24
    assert list(board.exceeded(param_bytes=0, peak_bytes=1000)) == []
    assert len(list(board.exceeded(param_bytes=0, peak_bytes=1001))) == 1


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("float16", 2), ("bfloat16", 2), ("int8", 1)])
def test_an_element_has_the_bytes_of_its_type(dtype: str, size: int) -> None:
    assert DeviceProfile(dtype=dtype).element_bytes == size


def test_a_type_of_unknown_size_is_refused_by_name() -> None:
    with pytest.raises(InputError, match=r"'int3' is not known .*Known: float32"):
        _ = DeviceProfile(dtype="int3").element_bytes


def test_a_profile_promises_nothing_in_place_unless_it_says_so() -> None:
    profile = DeviceProfile()
    assert (profile.inplace_elementwise, profile.inplace_depthwise, profile.reserve_bytes) == (False, False, 0)


def test_bad_bounds_are_refused_when_the_profile_is_made() -> None:
    bounds = ({"ram": "lots"}, {"flash": -1}, {"latency_ms": 0.0}, {"reserve": "some"})
    for bad in (*bounds, {"weights_in": "cloud"}, {"operators": "all"}):
        with pytest.raises(InputError):
            DeviceProfile(**bad)  # type: ignore[arg-type]


def test_profiles_by_name() -> None:
    assert profile_named("cpu").ram_bytes is None
    own = DeviceProfile(ram=1)
    assert profile_named(own) is own
    with pytest.raises(InputError, match="'abacus'"):
        profile_named("abacus")
