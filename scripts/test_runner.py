"""Checks of runner.py: several calls share a study, each run is trained once, and what each is told to run on."""
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import runner

# Stands in for `train`: it says who it is, takes a while, and leaves what runner.py looks for.
TRAIN = """#!/bin/sh
for word; do case $word in --run=*) run=runs/${word#--run=};; esac; done
echo "$$ $CUDA_VISIBLE_DEVICES ${RANK-none} $*" >>trained
mkdir -p $run && echo '{}' >$run/config.json
sleep ${SECONDS_OF_A_RUN:-0.3}
echo '{}' >$run/summary.json
"""
CALL = """
import sys
sys.path.insert(0, %r)
import runner
runner.device_of = lambda flags: "cuda"
jobs = [runner.Job("study", f"seed={i}", [f"--seed={i}"], 10) for i in range(6)]
print(runner.train_all(jobs, 0, int(sys.argv[1])))
"""


def in_study(test):
    """test(start) in an empty folder; start(gpus, GPUs that it sees) begins a call on the same study of six runs."""
    def wrapped():
        before = Path.cwd()
        with tempfile.TemporaryDirectory() as directory:
            os.chdir(directory)
            Path("build").mkdir()
            Path("build/train").write_text(TRAIN)
            Path("build/train").chmod(0o755)

            def start(gpus, seen, **environment):
                return subprocess.Popen(
                    [sys.executable, "-c", CALL % str(Path(runner.__file__).parent), str(gpus)], text=True,
                    stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                    env=dict(os.environ, BUILD="build", CUDA_VISIBLE_DEVICES=seen, RANK="3", **environment))
            test(start)
            os.chdir(before)
    return wrapped


def trained():
    return [line.split(maxsplit=3) for line in Path("trained").read_text().splitlines()]


@in_study
def test_two_calls(start):
    calls = [start(1, "0"), start(1, "1")]
    said = [call.communicate(timeout=60)[0] for call in calls]
    assert all("([], " in text for text in said), said
    assert any("([], False)" in text for text in said), said  # the last to end sees all done
    assert sorted(line[3].split("--seed=")[1][0] for line in trained()) == list("012345"), trained()
    assert {line[1] for line in trained()} == {"0", "1"}
    assert {line[2] for line in trained()} == {"none"}  # a run is not the rank that its call is


@in_study
def test_a_call_that_was_killed(start):
    first = start(1, "0", SECONDS_OF_A_RUN="4")
    while not Path("trained").exists():
        time.sleep(0.01)
    first.kill()
    first.communicate()
    second = start(1, "0").communicate(timeout=60)[0]
    assert "1 runs are at work in other processes" in second and "([], True)" in second, second
    while len(list(Path("runs/study").glob("*/summary.json"))) < 6:  # until the run of the killed call has ended
        time.sleep(0.1)
    time.sleep(0.2)
    assert "([], False)" in start(1, "0").communicate(timeout=60)[0]
    assert len(trained()) == 6, trained()


@in_study
def test_gpus_per_run(start):
    assert "--gpus-per-run 9: there are 2 GPUs here" in start(9, "0,1").communicate(timeout=60)[0]
    said = start(2, "0,1,2,3,4").communicate(timeout=60)[0]
    assert "2 at a time" in said, said
    assert {line[1] for line in trained()} == {"0,1", "2,3"}, trained()
    assert all("--ranks=2" in line[3] and "--lanes=2" in line[3] for line in trained()), trained()
    assert "was made with other flags (--lanes=2)" in start(1, "0").communicate(timeout=60)[0]


if __name__ == "__main__":
    for name, test in list(globals().items()):
        if name.startswith("test_"):
            test()
    print("runner.py: all checks passed")
