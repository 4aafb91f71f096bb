"""Checks of study.py: its statistics against values by hand, and a run as its directory and as a packed file."""
import contextlib
import io
import itertools
import json
import math
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np

import length
import nope
import runner
import study
import sweep
from study import (POINTS, equivalence, exact_test, first_spike, growth_per_1000, half_point, heads_at_end, holm,
                   largest_stable, largest_z, losses_of, lr_sensitivity, no_difference, pack, paired_difference,
                   read_run, read_runs, seeds_needed, share_interval, t_quantile, t_tail, unpaired_difference)


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
    # Exact intervals of shares: 1 - 0.025^(1/8) where none of 8 is seen; any table for 3 of 10.
    assert np.allclose(share_interval(0, 8), (0, 1 - 0.025 ** (1 / 8))) and share_interval(8, 8)[1] == 1
    assert np.allclose(share_interval(3, 10), (0.0667, 0.6525), atol=1e-4)
    near(exact_test([1], [12], [9], [12]), 0.002759), near(exact_test([3], [3], [0], [3]), 0.1)
    near(exact_test([6], [24], [7], [24]), 1)
    # Doses at which all or none fail say nothing; two that do say more than one: 0.5^2 + 0.5^2 for one of one twice.
    near(exact_test([0, 3, 5], [2, 3, 5], [0, 0, 4], [2, 3, 4]), 0.1)
    near(exact_test([1, 1], [1, 1], [0, 0], [1, 1]), 0.5)
    # A quarter of 8 fails at 5, all at 6, so half at a third of the way; 0 and 8 of 8 are sure, 1 and 7 are not.
    rates, n = [3, 4, 5, 6, 7], [8] * 5
    assert np.allclose(half_point(rates, [0, 0, 2, 8, 8], n), (5 * 1.2 ** (1 / 3), 4, 6))
    assert np.allclose(half_point(rates, [0, 1, 4, 7, 8], n), (5, 3, 7))
    assert np.allclose(half_point(rates, [0, 0, 5, 3, 8], n), (30 ** 0.5, 4, 7))  # 5 and 3 count as 4 and 4
    # Five of five at the last one would show nothing (0.5^5 > 0.025), so it does not keep 6 from being the end.
    assert half_point(rates, [0, 0, 2, 8, 5], [8, 8, 8, 8, 5])[1:] == (4, 6)
    assert half_point(rates, [0, 0, 2, 8, 3], [8, 8, 8, 8, 6])[1:] == (4, math.inf)
    assert half_point(rates, [8] * 5, n) == (0, 0, 3) and half_point(rates, [1] * 5, n) == (math.inf, 0, math.inf)
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


def test_failures():
    """100 % is best at 2e-3, with 1.0 nats: a run fails above 1.1, and one that became nan does."""
    def runs(*losses):
        return [SimpleNamespace(final_loss=loss) for loss in losses]

    arms = {study.FULL: {1e-3: runs(1.2, 1.2), 2e-3: runs(0.9, 1.1)},
            study.rotation_label(0): {1e-3: runs(1.05, 1.09), 2e-3: runs(1.11, math.inf)}}
    assert abs(nope.bar_of(arms) - 1.1) < 1e-12
    header, (full, none) = nope.failures_table(nope.failures({"a model": arms}), [1e-3, 2e-3])
    assert nope.failures({1: arms, 2: arms})[study.FULL] == {1e-3: (4, 4), 2e-3: (0, 4)}  # over two models
    assert full[1:3] == ["2 of 2", "0 of 2"] and none[1:3] == ["0 of 2", "2 of 2"], (full, none)
    assert none[3].startswith("0.0014 "), none
    assert header[-1] == "p against NoPE" and full[-1] == "1" and none[-1] == "-"
    # An arm at one of NoPE's rates only is tested there: of 2 failures in 2 and 2 runs none is its, or all, 1/6 each.
    arms["another"] = {2e-3: runs(1.0, 1.0)}
    another = nope.failures_table(nope.failures({"a model": arms}), [1e-3, 2e-3])[1][2]
    assert another[1:3] == ["-", "0 of 2"] and another[-1] == "0.67", another  # twice 1/3, by Holm


def test_one_rate():
    """A sweep at one rate, without a ladder, trains the seeds that confirm at it."""
    args, passed = sweep.parse("--name no-such --lrs 0.004 --seeds 0 --confirm 2 --fractions 0.1,1".split())
    trained, runner_train_all = [], runner.train_all
    runner.train_all = lambda jobs, *_: (trained.extend(job.run for job in jobs), ([], False))[1]
    try:
        sweep.train(args, passed)
    finally:
        runner.train_all = runner_train_all
    assert trained == [f"no-such/rotate={rotate}_lr=0.004_seed={seed}" for seed in (101, 102) for rotate in ("0.1", "1")]


def test_length():
    """Evaluations of two made-up runs: which runs are taken, what is gained, from the files and from the packed one."""
    with tempfile.TemporaryDirectory() as directory:
        for seed in 1, 101, 102, 103:
            run = Path(directory, "sweep", f"rotate=0.1_with=head_lr=0.1_seed={seed}")
            run.mkdir(parents=True)
            (run / "config.json").write_text(json.dumps({"context": 4, "val": "val.bin", "seed": seed}))
            (run / "summary.json").write_text(json.dumps({"val_loss": None if seed == 101 else 3.5}))
        taken = length.chosen(f"{directory}/sweep", ["1", "0.1:head"], 2)
        assert [run.seed for run in taken] == [102, 103] and length.chosen(f"{directory}/sweep", ["0.1"], 2) == []
        out = Path(directory, "study", "evaluations")
        out.mkdir(parents=True)
        for run, (there, beyond, longer, half) in zip(taken, ((3.0, 3.5, 2.8, 3.2), (3.1, 3.2, 3.0, 3.2))):
            for scaling, first, ends in (("none", 4, (there, beyond)), ("yarn", 4, (there + 1, longer)),
                                         ("half", 2, (half, there))):
                name = out / f"{run.name}_scaling={scaling}"
                Path(f"{name}.txt").write_text(f"flags: --run={run.directory} --tokens=64 --data=novels.bin\n")
                Path(f"{name}.ends.csv").write_text("context,windows,loss,stderr,gain,gain_stderr\n" + "".join(
                    f"{first << i},16,{loss},0.1,0.2,0.03\n" for i, loss in enumerate(ends)))
                Path(f"{name}.csv").write_text("context,begin,end,windows,loss,stderr\n4,0,4,16,9,1\n8,0,4,16,3,1\n"
                                               "8,4,8,16,2,1\n")
        read = length.read(Path(directory, "study"))
        length.pack(read, Path(directory, "study.json"))
        for runs in read, length.read(Path(directory, "study.json")):
            said = [(run.seed, run.text, run.windows) for run in runs]
            assert said == [(102, "novels.bin", 16), (103, "novels.bin", 16)], said
            assert runs[0].positions["none"] == {"begin": [0, 4], "end": [4, 8], "loss": [3, 2]}
            # Against the loss at 4 with nothing changed, also where something is: 3.0 - 2.8 and 3.1 - 3.0.
            mean, half, n = length.gains(runs, "yarn", 8)
            assert abs(mean - 0.15) < 1e-6 and abs(half - 12.706 * 0.05) < 1e-3 and n == 2, (mean, half, n)
            assert abs(length.gains(runs, "none", 8)[0] + 0.3) < 1e-6 and length.gains(runs, "none", 4)[0] == 0
            assert abs(length.last_doubling(runs[0]) - 0.2) < 1e-6 and length.lengths_of(runs) == [4, 8]


def test_report():
    """The report of made-up runs: a ladder whose best rate is confirmed by other seeds, two schedules."""
    with tempfile.TemporaryDirectory() as directory:
        for steps, rotate, seed, lr in itertools.product((40, 200), ("0.1", "1"), (1, 101, 102), ("0.1", "0.2")):
            if seed > 100 and lr == "0.1":
                continue
            run = Path(directory, f"steps={steps}_rotate={rotate}_lr={lr}_seed={seed}")
            run.mkdir()
            loss = 3 + 0.25 * (rotate == "0.1") + 0.5 * (lr == "0.1") + 0.01 * (seed == 102) + 0.125 * (steps == 40)
            (run / "config.json").write_text(json.dumps(dict(
                rotary_dim=6, head_size=64, layers=6, width=256, heads=4, block="parallel", context=512, steps=steps,
                batch=2, accumulate=1, data="wiki", preset="nano")))
            (run / "summary.json").write_text(f'{{"val_loss": {loss}}}')
            (run / "log.csv").write_text("step,tokens,loss,lr,grad_norm\n" + "".join(
                f"{i},{1024 * i},{loss},0.1,1\n" for i in range(1, steps + 1)))
            (run / "positions.csv").write_text("context,begin,end,windows,loss,stderr\n" + "".join(
                f"512,{begin},{end},1,{at},0\n" for begin, end, at in (
                    (8, 32, loss), (32, 64, loss + 0.1), (64, 256, 9 + seed), (256, 512, loss))))
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            sweep.report(Path(directory), read_runs(directory), lambda runs: {})
        lines = printed.getvalue().splitlines()
        assert Path(directory, "report.html").stat().st_size > 100_000  # its plots are in it
    assert [line for line in lines if line.startswith("## ")][1:] == ["## steps 40", "## steps 200"]
    assert "| 10 % | 3.8750 | 3.3750 * | no |" in lines and "| 100 % | 3.5000 | 3.0000 * | no |" in lines, lines
    rows = [line for line in lines if line.startswith("| 10 % | +0.2500 ± ")]
    assert len(rows) == 4 and "worse" in rows[0] and rows[1].count("+0.2500") == 2 and "+0.0000" in rows[1], rows


if __name__ == "__main__":
    test_statistics()
    test_pack()
    test_states()
    test_failures()
    test_one_rate()
    test_length()
    test_report()
    print("statistics: as worked out by hand")
