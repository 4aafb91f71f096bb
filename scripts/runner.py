"""Trains many runs at once, as many as the machine takes. sweep.py and nope.py say which.

A run is a directory runs/STUDY/NAME, and beside it NAME.txt: its flags, its commands and what they printed. Runs that
are finished are not repeated, one that was stopped goes on from its checkpoint. A run that diverged is a result and is
not repeated either; one that failed for another reason is tried again by the next call. On Ctrl-C all runs save first.

Who trains a run holds a lock on its NAME.lock, as long as he lives. So several calls, on several hosts too, or the
tasks of a Slurm array, work on one study side by side: each takes what nobody else has. The last to end writes the
report.
"""
import fcntl
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

BUILD = os.environ.get("BUILD", "build")
# Flags of `train` that describe the model; eval and bench know them too.
MODEL_FLAGS = ("layers width heads kv-heads head-size mlp-hidden context vocab rotary-dim rope-base rope-pairs qk-norm "
               "block norm mlp bias tied").split()


# By these a program started by torchrun, mpirun or srun knows which of several ranks it is.
RANK_VARIABLES = ("RANK WORLD_SIZE OMPI_COMM_WORLD_RANK OMPI_COMM_WORLD_SIZE SLURM_PROCID SLURM_STEP_NUM_TASKS").split()


class UserError(Exception):
    """A mistake of the user's: one line, exit code 2."""


def main(work):
    """Runs work() as a program: mistakes are one line and exit code 2, Ctrl-C and SIGTERM exit code 130."""
    def stop(*_):
        raise KeyboardInterrupt
    signal.signal(signal.SIGTERM, stop)
    try:
        sys.exit(work())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)


# ----------------------------------------------------------------------------------------------------------------------
# Runs

def joined(arguments, own=()):
    """Flags of `train` as on a command line, each as one word: --flag=value or --flag. The study's own are refused."""
    flags = []
    for word in arguments:
        if word == "--":
            continue
        if word.startswith("--"):
            flags.append(word)
        elif flags and "=" not in flags[-1]:
            flags[-1] += "=" + word
        else:
            raise UserError(f"{word}: not a flag of train")
        if flags[-1][2:].partition("=")[0].removeprefix("no-") in own:
            raise UserError(f"-- {word}: the study sets this itself; --help lists its own flags")
    return flags


def rotation_flag(flag, rotate):
    """The flag of `train` for a share of the head up to 1 or, above it, a number of channels; `flag` said so."""
    try:
        value = float(rotate)
    except ValueError:
        raise UserError(f"{flag} {rotate}: must be a share up to 1, or a number of channels") from None
    return f"--rotary-dim={value:g}" if value > 1 else f"--rotary-fraction={value:g}"


class Job:
    """A run to be trained: `name` below runs/STUDY, and the flags of `train`, each as one word."""
    to_do = "to train"

    def __init__(self, study, name, flags, steps, positions=0):
        self.run, self.steps = f"{study}/{name}", steps
        self.flags = [f"--val-every={steps}", f"--diagnostics-every={max(1, steps // 100)}", *flags, f"--steps={steps}"]
        self.positions = positions  # tokens for `eval positions`; 0: do not
        self.claim = None           # the locked file, while this call works on the run
        self.directory = Path("runs") / study / name
        self.output = Path(f"{self.directory}.txt")
        self.error = ""

    def flags_line(self):
        """The first line of its output: says later whether it was the same run."""
        return "flags: " + " ".join(self.flags)

    def last_row(self, name="log"):
        """The last whole row of log.csv or another csv file, as numbers; None if there is none."""
        try:
            with open(self.directory / f"{name}.csv", "rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - 1000))
                return [float(x) for x in file.read().decode().rpartition("\n")[0].rpartition("\n")[2].split(",")]
        except (OSError, ValueError):
            return None

    def state(self):
        """finished; diverged: loss, gradient norm or validation loss became inf or nan; or unfinished."""
        summary = self.directory / "summary.json"
        if summary.exists() and json.loads(summary.read_text()).get("val_loss", 0) is not None:
            return "finished"
        log, val = self.last_row(), self.last_row("val")
        finite = all(map(math.isfinite, (log[2:5] if log else []) + (val[2:] if val else [])))
        return "unfinished" if finite and not summary.exists() else "diverged"

    def step(self):
        state, row = self.state(), self.last_row()
        return self.steps if state != "unfinished" else int(row[0]) if row else 0

    def next_program(self):
        """What is still to be done: train, or eval to measure the loss by position; None: nothing."""
        state = self.state()
        if state == "unfinished":
            return "train"
        return "eval" if state == "finished" and self.positions and not self.csv().exists() else None

    def csv(self):
        return self.directory / "positions.csv"

    def next_command(self, threads, gpus=1):
        """The command for it, of a run that is claimed. Removes what is left of one without a checkpoint, which begins
        again."""
        program = self.next_program()
        if program == "train":
            command = [f"{BUILD}/train", f"--run={self.run}"]
            how = [f"--threads={threads}"] + [f"--ranks={gpus}"] * (gpus > 1)
            if any((self.directory / name / "state.json").exists() for name in ("checkpoint", "checkpoint.old")):
                return command + ["--resume"] + how
            shutil.rmtree(self.directory, ignore_errors=True)
            return command + self.flags + how
        if program == "eval":
            device = [flag for flag in self.flags if flag.startswith(("--device=", "--dtype="))]
            return [f"{BUILD}/eval", "positions", f"--run={self.run}", f"--tokens={self.positions}",
                    f"--out={self.csv()}", f"--threads={threads}", *device]
        return None

    def try_to_claim(self):
        """Whether the run is now this call's. Its programs inherit the lock: those of a call that was killed keep it."""
        file = open(f"{self.directory}.lock", "a")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return False
        except OSError as error:
            raise UserError(f"{file.name}: this file system knows no locks ({error.strerror})") from None
        self.claim = file
        return True

    def release(self):
        self.claim.close()
        self.claim = None


def refuse_other_flags(jobs):
    """A study's directory holds runs of one recipe: those that are there must have been made with the same flags."""
    for job in jobs:
        if not (job.directory / "config.json").exists() or not job.output.exists():
            continue
        before = job.output.read_text(errors="replace").partition("\n")[0]
        now = job.flags_line()
        if before != now:
            differ = sorted(set(before.split()) ^ set(now.split()))
            raise UserError(f"{job.directory} was made with other flags ({' '.join(differ)}); take another --name, or "
                            f"remove {job.directory.parent}")


# ----------------------------------------------------------------------------------------------------------------------
# The machine

def output_of(command):
    """What a program prints; UserError with its own line if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise UserError(f"{command[0]}: {error.strerror}; `make {command[0]}` builds it") from None
    if done.returncode:
        raise UserError(done.stderr.strip().removeprefix("error: ") or f"{command[0]}: exit code {done.returncode}")
    return done.stdout


def device_of(flags):
    """cpu or cuda: what `train` will take, by its --device and by what it was built for."""
    asked = [flag for flag in flags if flag.startswith("--device=")] or ["--device=auto"]
    settings = output_of([f"{BUILD}/bench", "--shape=nano", "--seconds=0", "--json", asked[-1]])
    return json.loads(settings)["device"]


def slots_of(jobs, most, gpus):
    """Where runs can go at the same time, as a list with the numbers of `gpus` GPUs for each, None on the CPU; and the
    CPU threads of each of a run's ranks. `most`: as many at a time; 0: as many as the cores, or the GPUs, are enough
    for. More on a GPU take turns and gain nothing
    (4.6 M tokens/s for three runs of 6 layers x 256 on an H100, 5.2 M for one), and are not safe: of two that took turns
    on an H100 (driver 580.159) one got wrong results in some steps and then an illegal instruction, in a matrix product
    of cuBLASLt by a cluster of eight blocks; the same products, alone on the GPU, never did.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if device_of(jobs[0].flags) == "cpu":
        slots = [None] * (most or max(1, cores // gpus))
    else:
        query = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
        there = [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu] or output_of(query).split()
        groups = [",".join(there[i:i + gpus]) for i in range(0, len(there) - gpus + 1, gpus)]
        if not groups:
            raise UserError(f"--gpus-per-run {gpus}: there are {len(there)} GPUs here")
        slots = [groups[i % len(groups)] for i in range(most or len(groups))]
    slots = slots[:len(jobs)]
    return slots, max(1, cores // (len(slots) * gpus))


# ----------------------------------------------------------------------------------------------------------------------
# Training them

def duration(seconds):
    hours, minutes, seconds = int(seconds) // 3600, int(seconds) // 60 % 60, int(seconds) % 60
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class Display:
    """One picture of all runs: rewritten in place on a terminal, elsewhere a line now and then."""

    def __init__(self, jobs):
        self.jobs, self.live = jobs, sys.stdout.isatty()
        self.start, self.at_start = time.time(), sum(job.step() for job in jobs)
        self.lines, self.next = 0, 0

    def show(self, running, done, last=False):
        now = time.time()
        if now < self.next and not last:
            return
        self.next = now + (1 if self.live else 30)
        rows = [(job, job.last_row()) for job in running]
        steps, total = sum(job.step() for job in self.jobs), sum(job.steps for job in self.jobs)
        made, passed = steps - self.at_start, now - self.start
        head = f"{len(done)} of {len(self.jobs)} runs done"
        for what, count in (("diverged", sum(job.state() == "diverged" for job in done)),
                            ("failed", sum(bool(job.error) for job in done))):
            head += f", {count} {what}" if count else ""
        head += f"; {len(running)} at work"
        started = [row for _, row in rows if row]
        if started:  # all steps that were made, in the tokens that a step has now
            head += f", {made / passed * sum(row[1] / row[0] for row in started) / len(started):,.0f} tokens/s"
        head += f"; {duration(passed)} so far"
        head += f", {duration((total - steps) * passed / made)} left" if made else ""
        if not self.live:
            return print(head, flush=True)
        height, width = shutil.get_terminal_size()[::-1]
        text = [head]
        for job, row in rows[:height - 3]:
            progress = f"step {row[0]:.0f}/{job.steps}  loss {row[2]:.4f}" if row else "starting"
            text.append(f"  {job.directory.name:44} {progress}")
        up = f"\033[{self.lines}A" if self.lines else ""
        print(up + "\033[J" + "\n".join(line[:width - 1] for line in text), flush=True)
        self.lines = len(text)


def train_all(jobs, most=0, gpus=1):
    """Trains all runs that nobody else is training, `most` at a time (0: as many as the machine takes), each on `gpus`
    GPUs. Returns the jobs that failed, and whether others are still at work on the study."""
    directory = jobs[0].directory.parent
    directory.mkdir(parents=True, exist_ok=True)
    if gpus > 1:
        for job in jobs:
            job.flags = [f"--lanes={gpus}", *job.flags]
    refuse_other_flags(jobs)
    waiting = [job for job in jobs if job.next_program()]
    done = [job for job in jobs if job not in waiting]
    if not waiting:
        return [], False
    slots, threads = slots_of(waiting, most, gpus)
    print(f"{len(waiting)} runs {jobs[0].to_do}, {len(slots)} at a time, in {directory}", flush=True)
    display, running, free = Display(jobs), {}, list(slots)  # running: job -> (process, GPU)
    # Whoever started this call as one of several tasks told it so; the runs that it starts are none of them.
    environment = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
    environment["OMP_WAIT_POLICY"] = "passive"

    def start(job, gpu, command):
        if not job.directory.exists():
            job.output.write_text(job.flags_line() + "\n")
        if gpu is not None:
            environment["CUDA_VISIBLE_DEVICES"] = gpu
        with open(job.output, "a") as output:
            print("$", *command, file=output, flush=True)
            running[job] = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                                            env=environment, pass_fds=[job.claim.fileno()]), gpu

    def finish(job):
        job.release()
        done.append(job)

    elsewhere = []
    try:
        while waiting or running:
            while free and waiting:
                job = waiting.pop(0)
                if not job.try_to_claim():
                    elsewhere.append(job)
                elif not job.next_program():  # another call has done it meanwhile
                    finish(job)
                else:
                    start(job, free.pop(0), job.next_command(threads, gpus))
            for job, (process, gpu) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[job]
                command = job.next_command(threads, gpus)
                if process.returncode and job.state() != "diverged" or command and command[:1] == process.args[:1]:
                    job.error = job.output.read_text(errors="replace").rstrip().rpartition("\n")[2]
                    if process.returncode < 0:
                        job.error = f"ended by signal {-process.returncode}"
                elif command:
                    start(job, gpu, command)
                    continue
                free.append(gpu)
                finish(job)
                waiting, elsewhere = waiting + elsewhere, []  # one may have been given up by another call
            display.show(running, done)
            time.sleep(0.1)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        for process, _ in running.values():
            process.terminate()
        print("\nstopping: every run finishes its step and saves", flush=True)
        for process, _ in running.values():
            process.wait()
        raise
    display.show(running, done, last=True)
    failed = [job for job in done if job.error]
    for error in dict.fromkeys(job.error for job in failed):
        names = [job.directory.name for job in failed if job.error == error]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        print(f"failed: {', '.join(names[:3])}{more}: {error}", file=sys.stderr)
    elsewhere = [job for job in elsewhere if job.next_program()]
    if elsewhere:
        print(f"{len(elsewhere)} runs are at work in other processes; the call that ends last writes the report")
    return failed, bool(elsewhere)


def measure_speed(runs, seconds=2):
    """tokens/s and seconds in RoPE of a training step, by `bench` alone on the machine: one of each model in `runs`.

    Returns {run directory: (tokens per second, RoPE seconds per step)}, without those where bench fails. What bench
    printed stays in the run's bench.json.
    """
    speeds, measured = {}, {}  # measured: what bench printed, by its command
    for run in runs:
        path = Path(run) / "bench.json"
        if not path.exists():
            config = json.loads((Path(run) / "config.json").read_text())
            command = [f"{BUILD}/bench", "--shape=nano", f"--batch={config['batch']}", f"--device={config['device']}",
                       f"--dtype={config['dtype']}", f"--seconds={seconds}", "--json"]
            for flag in MODEL_FLAGS:
                value = config[flag.replace("-", "_")]
                if isinstance(value, bool):
                    command.append(f"--{flag}" if value else f"--no-{flag}")
                else:
                    command.append(f"--{flag}={value}")
            key = tuple(command)
            if key not in measured:
                print(f"measuring speed: {path.parent.name}", flush=True)
            try:
                measured[key] = measured.get(key) or output_of(command)
                path.write_text(measured[key])
            except UserError as error:
                print(f"no speed of {path.parent.name}: {error}", file=sys.stderr)
                continue
        result = json.loads(path.read_text())
        rope = sum(value for name, value in result["operation_seconds"].items() if "rope" in name)
        speeds[run] = result["tokens_per_second"], rope
    return speeds
