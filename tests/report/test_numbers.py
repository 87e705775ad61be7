import math

from sparsemix.report.figures import log_ticks, nice_ticks, tick_labels
from sparsemix.report.numbers import duration, exponent, fixed, interval, p_value, si
from sparsemix.report.plots import mean_line


def test_the_mean_line_covers_only_what_every_seed_covers():
    line = mean_line("x", 1, [[(0.0, 4.0), (2.0, 2.0)], [(1.0, 5.0), (3.0, 1.0)], []])
    assert line is not None and line.points == [(1.0, 4.0), (2.0, 2.5)]
    assert mean_line("x", 1, [[]]) is None and mean_line("x", 1, [[(0.0, 1.0)], [(2.0, 1.0)]]) is None


def test_numbers_are_printed_for_people():
    assert [si(x).replace("\u00a0", " ") for x in (0, 7, 999, 999.9, 999_999, 1234, -2.5e6, 3e9, None)] == [
        "0", "7", "999", "1.00 k", "1.00 M", "1.23 k", "−2.50 M", "3.00 G", "–",
    ]  # fmt: skip
    assert (si(1.2e15, "FLOP"), si(0.0123, "s"), si(412, "B")) == ("1.20\u00a0PFLOP", "0.0123\u00a0s", "412\u00a0B")
    assert (fixed(-0.5, 2), fixed(0.5, 2, signed=True), fixed(math.inf, 2)) == ("−0.50", "+0.50", "not finite")
    assert (exponent(3e-4), exponent(1.25e-3), exponent(1.0)) == ("3e−4", "1.25e−3", "1e0")
    assert (p_value(0.0004), p_value(0.0123), interval([1.0, -2.0], 1)) == ("<\u00a00.001", "0.012", "[1.0,\u00a0−2.0]")
    assert (interval([None, 1.0], 1), interval(None, 1)) == ("–", "–")
    assert [duration(s).replace("\u00a0", " ") for s in (4.25, 725, 12_000, None)] == [
        "4.25 s",
        "12 min 5 s",
        "3 h 20 min",
        "–",
    ]


def test_ticks_are_round_and_inside():
    assert tick_labels(nice_ticks(0.03, 1.25)) == ["0.2", "0.4", "0.6", "0.8", "1.0", "1.2"]
    assert tick_labels(nice_ticks(-0.04, 0.021)) == ["−0.04", "−0.03", "−0.02", "−0.01", "0.00", "0.01", "0.02"]
    assert log_ticks(0.4, 3) == [0.5, 1, 2] and log_ticks(0.5, 2e4) == [1, 10, 100, 1e3, 1e4]
