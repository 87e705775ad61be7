"""Nothing that shows progress can end the work."""

import io
import sys

import pytest

from sparsemix.run import Run
from sparsemix.sweep.watch import Stages, Watch
from sparsemix.terminal import only_shows, say
from tiny import run_config, write_corpus


class Gone(io.StringIO):
    """A terminal that was closed, or a log on a full disk."""

    def write(self, _):
        raise BrokenPipeError(32, "Broken pipe")

    def flush(self):
        raise OSError(28, "No space left on device")

    def isatty(self):
        return True


@pytest.mark.parametrize("stream", [Gone(), None, open], ids=["gone", "none", "closed"])
def test_bars_and_lines_go_nowhere_where_standard_error_cannot_be_written(monkeypatch, tmp_path, stream):
    if stream is open:
        stream = io.StringIO()
        stream.close()
    monkeypatch.setattr(sys, "stderr", stream)
    run = Run(tmp_path / "run", run_config(write_corpus(tmp_path)))
    with Stages("data", say) as stages, Watch([run.folder], "training", say) as watch:
        stages("reading", 1, 2)
        run.log(step=1, loss=5.5, flops=1.0, wall_s=2.0, tokens=64, tokens_per_s=32.0)
        watch()
        watch.done(run.folder)
    say("a line")


def test_a_display_that_fails_says_so_once_and_shows_no_more():
    class Broken:
        title, calls = "training", 0

        def __init__(self):
            self.said = []
            self.say = self.said.append

        @only_shows
        def __call__(self):
            self.calls += 1
            raise KeyError("loss")

        @only_shows
        def stops(self):
            raise KeyboardInterrupt

    display = Broken()
    with pytest.raises(KeyboardInterrupt):
        display.stops()
    display()
    display()
    assert display.calls == 1
    assert display.said == ["training: progress is shown no more (KeyError: 'loss'); the work goes on"]
