"""Real processes: that they take the steps of lanes, and that a job of them ends as it should."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import process_job
import pytest

from experiments import cluster, launch


REPOSITORY = pathlib.Path(__file__).parents[1]


def slow(*case):
    return pytest.param(*case, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("workers", "which", "topology"),
    [
        (2, "few", "sharded"),
        slow(2, "few", "gather"),
        *(slow(n, "few", topology) for n in (1, 4, 8) for topology in ("sharded", "gather")),
        *(slow(n, "all", topology) for n in (2, 4) for topology in ("sharded", "gather")),
    ],
)
def test_processes_take_the_steps_of_lanes(workers, which, topology, tmp_path):
    out = tmp_path / "path"
    job = ["-m", "tests.process_job", topology, which, str(out)]
    launcher = ["-m", "experiments.launch", "--processes", str(workers), "--timeout", "500"]
    command = [sys.executable, *launcher, "--", *job]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr

    uplinks = process_job.UPLINKS[which]
    tx = process_job.optimizer(topology, uplinks, workers)
    start = process_job.start(tx, uplinks, workers)
    lanes = process_job.train(tx, start, process_job.targets(uplinks, workers))
    first, *others = (np.load(f"{out}.{i}.npy") for i in range(workers))
    least = 0.1 if workers <= 2 else 0.02
    assert np.all(np.abs(lanes[-1]).mean(axis=(1, 2)) > least), "it has moved"
    assert np.any(lanes[-1] != lanes[-2]), "the downlink has yet to send something"
    for other in others:
        np.testing.assert_array_equal(other, first)
    names = process_job.layer_names(uplinks)
    for layer, uplink in enumerate(np.repeat(uplinks, process_job.COPIES)):
        np.testing.assert_allclose(
            first[:, layer], lanes[:, layer], atol=1e-6, err_msg=f"{names[layer]}, {uplink!r}"
        )


@pytest.mark.slow  # three jobs
def test_a_job_that_is_stopped_goes_on_from_its_checkpoint_to_the_same_bits(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("to err is human, to feed the error back is EF21\n" * 400)

    def job(out):
        settings = "--preset tiny --on devices --workers 2 --topology sharded --methods block16"
        settings += " --downlink natural_4bit --eval-every 10 --checkpoint-every 10"
        script = ["-m", "experiments.nanogpt", *settings.split(), "--text", text, "--out", out]
        launcher = [sys.executable, "-m", "experiments.launch", "--timeout", "250", "--"]
        return subprocess.Popen([*launcher, *script, "--steps", "100"], cwd=REPOSITORY)

    def curve(out):
        lines = [json.loads(line) for line in (out / "nanogpt.jsonl").read_text().splitlines()]
        return [(line["step"], line["loss_w"], line["loss_x"]) for line in lines[1:]]

    whole, parted = tmp_path / "whole", tmp_path / "parted"
    assert job(whole).wait() == 0
    stopped = job(parted)
    while not any((parted / "block16").glob("[1-9]*")):
        assert stopped.poll() is None
        time.sleep(0.01)
    stopped.terminate()
    stopped.wait()
    assert curve(parted)[-1][0] < 100
    assert job(parted).wait() == 0
    assert curve(parted) == curve(whole) and curve(whole)[-1][0] == 100


def test_alone_a_script_starts_no_job():
    code = "from experiments import cluster; cluster.initialize(); import jax; jax.devices()"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; print(jax.process_count())"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.stdout == "1\n", done.stderr


def job(*codes):
    """A Python program a process, by its code."""
    return [([sys.executable, "-c", code], None) for code in codes]


def test_under_slurm_a_process_has_the_devices_of_its_host_and_no_more():
    # What `srun --ntasks 2` tells its tasks, both on this machine.
    job = {
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
    }
    script = "from experiments import cluster; print(cluster.join(2).size, cluster.is_first())"
    tasks = []
    for task in ("0", "1"):
        place = {"SLURM_PROCID": task, "SLURM_LOCALID": task}
        environment = {**os.environ, **job, **place, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
        tasks.append(
            subprocess.Popen(
                [sys.executable, "-c", script],
                cwd=REPOSITORY,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    said = [task.communicate(timeout=120) for task in tasks]
    assert [out.strip() for out, _ in said] == ["2 True", "2 False"], said


def test_output_is_marked_with_its_process_and_success_is_zero():
    lines = []
    code = launch.run(
        job("print('a\\nb')", "import sys; sys.stderr.write('c')"), write=lines.append
    )
    assert code == 0
    assert sorted(lines) == ["[0] a\n", "[0] b\n", "[1] c\n"]


@pytest.mark.parametrize(
    ("failing", "expected"),
    [
        ("import sys; sys.exit(7)", 7),
        ("import os; os.kill(os.getpid(), 9)", 128 + signal.SIGKILL),
        ("raise RuntimeError('lost')", 1),
    ],
    ids=["exit", "signal", "exception"],
)
def test_a_process_that_fails_ends_all_with_its_code(failing, expected):
    lines, begin = [], time.monotonic()
    code = launch.run(job("import time; time.sleep(60)", failing), write=lines.append)
    assert code == expected
    assert time.monotonic() - begin < 30
    assert f"process 1 failed with exit code {expected}; ending all\n" in lines


def test_what_a_process_has_started_is_ended_with_it(tmp_path, monkeypatch):
    # A shell that waits for a grandchild: the signal has to reach both.
    monkeypatch.setattr(launch, "GRACE", 0.3)
    stubborn = f"trap '' TERM; sleep 60 & echo $! > {tmp_path}/pid; wait; wait"
    failing = (
        f"import os, sys, time\nwhile not os.path.exists('{tmp_path}/pid'): time.sleep(0.01)\n"
    )
    jobs = [(["sh", "-c", stubborn], None), *job(failing + "time.sleep(0.1); sys.exit(3)")]
    assert launch.run(jobs, write=lambda line: None) == 3
    pid = int((tmp_path / "pid").read_text())
    with pytest.raises(ProcessLookupError):
        for _ in range(100):  # until it is noticed
            os.kill(pid, 0)
            time.sleep(0.05)


def test_a_job_out_of_time_is_ended():
    lines = []
    assert launch.run(job("import time; time.sleep(60)"), timeout=0.5, write=lines.append) == 124
    assert lines == ["out of time; ending all\n"]


def test_a_process_is_told_its_place_and_to_stay_on_this_machine(monkeypatch):
    monkeypatch.setenv("https_proxy", "http://proxy:1")
    env = launch.environment("127.0.0.1:1234", 4, 2)
    assert env[cluster.COORDINATOR] == "127.0.0.1:1234"
    assert (env[cluster.PROCESSES], env[cluster.PROCESS_ID]) == ("4", "2")
    assert (env["JAX_PLATFORMS"], env["JAX_NUM_CPU_DEVICES"]) == ("cpu", "1")
    assert env["no_grpc_proxy"] == "127.0.0.1"


@pytest.mark.parametrize(
    ("addresses", "expected"),
    [(["127.0.1.1"], True), (["::1", "127.0.0.1"], True), (["127.0.0.1", "10.0.0.7"], False)],
    ids=repr,
)
def test_a_name_is_loopback_only_if_all_its_addresses_are(addresses, expected, monkeypatch):
    found = [(0, 0, 0, "", (address, 0)) for address in addresses]
    monkeypatch.setattr(launch.socket, "getaddrinfo", lambda *args, **kwargs: found)
    assert launch.is_loopback("box") is expected
    if expected:
        assert launch.loopback_prefix("box") == []


def test_where_gloo_would_listen_to_the_network_the_error_names_the_remedy(monkeypatch):
    monkeypatch.setattr(launch, "is_loopback", lambda name: False)
    with pytest.raises(OSError, match="Add a line to /etc/hosts: 127.0.0.1 box"):
        launch.loopback_prefix("box")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--processes", "0", "--", "-c", ""], "--processes must be at least 1, got 0"),
        ([], "arguments are required"),
    ],
    ids=["no process", "no script"],
)
def test_arguments_that_make_no_job_are_refused(args, message, capsys):
    with pytest.raises(SystemExit):
        launch.main(args)
    assert message in capsys.readouterr().err
