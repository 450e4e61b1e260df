"""The benchmark of spikes: what it measures."""

from pathlib import Path

import numpy as np
import pytest
import spikes


def test_the_columns_measure_the_size_of_updates_and_their_return() -> None:
    plain = np.ones((1, 100))
    spiked = plain.copy()
    spiked[0, 50] = 4.0  # Until step 50 + 10, an average of ten steps contains it.
    losses = np.stack([plain, np.linspace(1, 3, 100)[None]])
    run = spikes.Run("chain", np.stack([plain, spiked]), losses, spike=40)
    assert run.largest == 4
    assert run.smallest == 1
    assert run.steps_away == 11  # The average that begins ten steps after the spike is the last.
    assert run.last_loss == run.worst_loss == 3
    same = spikes.Run("chain", np.stack([plain, plain]), losses, spike=40)
    assert same.steps_away == 0
    halved = spikes.Run("chain", np.stack([plain, plain / 2]), losses, spike=40)
    assert halved.steps_away == np.inf
    assert spikes.steps_text(halved) == "more than all"


@pytest.mark.long
@pytest.mark.usefixtures("implicit_promotion", "optimized_programs")
def test_a_limit_on_gradients_keeps_a_spike_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = tmp_path / "spikes.png"
    free, limited = "SOAP", "`clip_by_global_norm(9)`, SOAP"
    sizes = ["--before", "60", "--after", "60", "--seeds", "1"]
    assert spikes.main([*sizes, "--chains", free, limited, "--image", str(image)]) == 0
    table = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if "SOAP" in line]
    largest = {row[0].removeprefix("| "): float(row[1]) for row in table[-2:]}
    assert largest[free] > 1.5 * largest[limited]
    assert image.stat().st_size > 1000
