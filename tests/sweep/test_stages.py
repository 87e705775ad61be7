"""Progress of one piece of work, on a terminal and off it."""

from sparsemix.sweep import watch


def test_off_a_terminal_a_long_stage_says_every_20_seconds_how_far_it_is(monkeypatch):
    clock, said = [0.0], []
    monkeypatch.setattr(watch.time, "monotonic", lambda: clock[0])
    with watch.Stages("data", said.append) as stages:
        for second in range(50):
            clock[0] = float(second)
            stages("reading", second * 10_000_000, None)
        for second in range(50):
            clock[0] = 50.0 + second
            stages("tokenizing", second, 100)
    assert [line.replace("\u00a0", " ") for line in said] == [
        *("data: reading", "data: reading, 210 MB", "data: reading, 420 MB"),
        *("data: tokenizing", "data: tokenizing, 21%", "data: tokenizing, 42%"),
    ]


def test_on_a_terminal_many_calls_draw_few_times(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(watch.time, "monotonic", lambda: clock[0])
    with watch.Stages("data", lambda line: None) as stages:
        stages("reading", 0, None)
        drawn = []
        monkeypatch.setattr(stages.bar, "update", lambda *_, **fields: drawn.append(fields["far"]))
        for call in range(1000):
            clock[0] = call / 1000
            stages("reading", call * 1000, None)
    assert 9 <= len(drawn) <= 11
