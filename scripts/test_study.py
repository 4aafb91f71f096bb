"""Checks of study.py: its statistics against values by hand, and a run as its directory and as a packed file."""
import math
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np

import runner
from study import (POINTS, equivalence, first_spike, growth_per_1000, heads_at_end, holm, largest_stable, largest_z,
                   losses_of, lr_sensitivity, no_difference, pack, paired_difference, read_run, read_runs,
                   seeds_needed, t_quantile, t_tail, unpaired_difference)


def test_pack():
    """A made-up run, as its directory and as the file of its study say it."""
    with tempfile.TemporaryDirectory() as directory:
        run = Path(directory, "study", "rotate=0.1_seed=2")
        run.mkdir(parents=True)
        (run / "config.json").write_text('{"rotary_dim": 6, "batch": 5, "accumulate": 2, "context": 10}')
        (run / "summary.json").write_text('{"val_loss": 3.14159}')
        (run / "log.csv").write_text("step,tokens,loss,lr,grad_norm\n" + "".join(
            f"{i},{100 * i},{10 - 0.01 * i},0.1,{i % 7}\n" for i in range(1, 401)))
        (run / "layers.csv").write_text("step,layer,head,max_logit,entropy\n" + "".join(
            f"{i},{layer},{head},{i + 2 * layer + head},{5 - layer - 0.1 * head}\n"
            for i in range(4, 401, 4) for layer in range(2) for head in range(2)))
        pack(Path(directory, "study"), Path(directory, "study.json"))
        (whole,), (packed,) = read_runs(Path(directory, "study")), read_runs(Path(directory, "study.json"))
    for run in whole, packed:
        assert (run.seed, run.arm["rotate"], run.state, run.config["rotary_dim"]) == (2, "0.1", "finished", 6)
        assert losses_of([run]) == {2: 3.14159}
        assert abs(run.initial_loss - 9.99) < 1e-6 and abs(run.final_loss - (10 - 0.01 * 390.5)) < 1e-4
        assert run.logit[-1] == 403 and run.entropy[-1] == 3.9 and run.logit_step[-1] == 400
        assert heads_at_end(run, "max_logit").tolist() == [[400, 401], [402, 403]]
    assert len(packed.log["loss"]) == POINTS and len(packed.logit) == 50
    for key in "loss", "tokens":
        assert abs(packed.log[key].mean() / whole.log[key].mean() - 1) < 0.01


def test_statistics():
    def near(a, b):
        assert abs(a - b) < 1e-3 * max(1, abs(b)), f"{a} is not {b}"

    for degrees, t in ((1, 12.706), (2, 4.303), (4, 2.776), (9, 2.262), (30, 2.042)):  # any table of Student's t
        near(t_quantile(degrees), t)
    mean, half, n = paired_difference({1: 1.0, 2: 2.0, 3: 4.0, 5: 9.0}, {3: 3.5, 2: 2.0, 1: 0.0, 4: 7.0})
    near(mean, 0.5), near(half, 4.303 * 0.5 / math.sqrt(3)), near(n, 3)
    near(t_tail(2.262, 9), 0.025), near(t_tail(-2.262, 9), 0.975), near(t_tail(0, 3), 0.5)
    # a: mean 3, variance 2.5; b: mean 5, variance 10 (n 5 each): error sqrt(2.5), degrees 6.25 / (0.25/4 + 4/4) = 5.882
    a, b = [1.0, 2, 3, 4, 5], [1.0, 3, 5, 7, 9]
    mean, half, error, degrees = unpaired_difference(a, b)
    near(mean, -2), near(error, math.sqrt(2.5)), near(degrees, 5.8824), near(half, 2.4592 * math.sqrt(2.5))
    near(no_difference(a, b), 0.2538)  # scipy.stats.ttest_ind(a, b, equal_var=False)
    near(equivalence(a, b, 10), t_tail(8 / math.sqrt(2.5), degrees)), near(equivalence(a, b, 2), 0.5)
    assert np.allclose(holm([0.01, 0.04, 0.03]), [0.03, 0.06, 0.06]) and np.allclose(holm([0.9, 0.6]), [1, 1])
    assert seeds_needed(0.02, 0.01) == 32  # 2.0 * 0.02 * sqrt(2 / 32) = 0.01
    near(lr_sensitivity([3.0, 2.0, 2.5], 5.0), 0.5)
    near(lr_sensitivity([2.0, math.inf, math.nan, 7.0], 5.0), (2 + 3 * 5) / 4 - 2)
    assert math.isnan(lr_sensitivity([math.inf, math.nan], 5.0))
    near(largest_stable([0.1, 0.001, 0.01], [True, True, True]), 0.1)
    near(largest_stable([0.1, 0.001, 0.01], [True, True, False]), 0.001)
    assert math.isnan(largest_stable([1, 2], [False, True]))
    step = np.arange(0, 2001, 10.0)
    near(growth_per_1000(step, np.where(step < 1000, 7.0, np.exp(0.0023 * step))), 2.3)
    near(first_spike(SimpleNamespace(spikes={"step": np.array([120.0, 90, 350])})), 90)
    assert first_spike(SimpleNamespace(spikes={})) == math.inf
    near(largest_z(np.array([1.0, 3, 1, 3, 5, 2]), 4), 3)


def test_states():
    """What the files of a run say about how it ended."""
    header = "step,tokens,loss,lr,grad_norm,tokens_per_second,log_z\n"
    good, nan = header + "1,32,5.5,0.1,1.5,9,0\n", header + "1,32,5.5,0.1,nan,9,0\n"
    for state, files in (("unfinished", {}), ("unfinished", {"log.csv": good}), ("diverged", {"log.csv": nan}),
                         ("finished", {"log.csv": good, "summary.json": '{"val_loss": 5.25}'}),
                         ("diverged", {"log.csv": good, "summary.json": '{"val_loss": null}'}),
                         ("diverged", {"log.csv": good, "val.csv": "step,tokens,val_loss\n1,32,nan\n"})):
        with tempfile.TemporaryDirectory() as directory:
            job = runner.Job("study", "rotate=0_seed=1", [], 1)
            job.directory = Path(directory, "rotate=0_seed=1")
            job.directory.mkdir()
            for name, text in files.items():
                (job.directory / name).write_text(text)
            assert job.state() == read_run(job.directory).state == state, (state, files)


if __name__ == "__main__":
    test_statistics()
    test_pack()
    test_states()
    print("statistics: as worked out by hand")
