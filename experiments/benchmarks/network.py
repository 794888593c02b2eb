"""A network of n machines on this one: namespaces on a bridge, with caps and counters.

Each worker has a network namespace with an interface of its own, `eth0`, its own address and its
own /etc/hosts, and reaches the others over a bridge as it would over a switch. Links can be capped
(`tc tbf`) in both directions, and their interfaces count bytes and packets, as those of any
machine. Needs Linux, root and iproute2.
"""

import contextlib
import dataclasses
import importlib
import json
import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys
import tempfile

from experiments import cluster, launch


INTERFACE = "eth0"
# What Ethernet, IPv4 and TCP with time stamps, as Linux sends it, put before the payload.
HEADER_BYTES = 14 + 20 + 32
_HOSTS = pathlib.Path("/etc/netns")  # `ip netns exec NAME` lays what is in NAME here over /etc


@dataclasses.dataclass(frozen=True)
class Counters:
    """What an interface has sent and received since it exists, headers included."""

    sent_bytes: int
    sent_packets: int
    received_bytes: int
    received_packets: int

    def __sub__(self, earlier):
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(earlier), strict=True)
        return Counters(*(now - then for now, then in pairs))

    @property
    def sent_payload(self) -> int:
        """Bytes sent without the headers. A packet is one header, however long it is."""
        return self.sent_bytes - HEADER_BYTES * self.sent_packets


def own_counters() -> Counters:
    """Of the namespace in which this process runs."""
    return parse_counters(pathlib.Path("/proc/self/net/dev").read_text())


def parse_counters(text: str, interface: str = INTERFACE) -> Counters:
    """From the text of /proc/net/dev.

    Raises:
      ValueError: where it has no such interface.
    """
    for line in text.splitlines():
        name, colon, numbers = line.partition(":")
        if colon and name.strip() == interface:
            received, sent = numbers.split()[:8], numbers.split()[8:]
            return Counters(int(sent[0]), int(sent[1]), int(received[0]), int(received[1]))
    raise ValueError(f"There is no interface {interface!r} in {text!r}.")


def rate_bits(rate: str) -> float:
    """Bits a second of a rate as `tc` writes it: "100mbit", "1gbit".

    Raises:
      ValueError: for anything else.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([kmg])bit", rate)
    if not found:
        raise ValueError(f"A rate is a number and kbit, mbit or gbit, got {rate!r}.")
    return float(found[1]) * {"k": 1e3, "m": 1e6, "g": 1e9}[found[2]]


@dataclasses.dataclass(frozen=True)
class Network:
    """The namespaces of the workers, by name, and that of the bridge."""

    hub: str
    names: tuple[str, ...]

    @property
    def addresses(self) -> tuple[str, ...]:
        return tuple(f"10.77.0.{i + 1}" for i in range(len(self.names)))

    def cap(self, rate: str | None) -> None:
        """Caps all links in both directions; None lifts the cap. Also while they are in use."""
        for i, name in enumerate(self.names):
            for namespace, device in ((name, INTERFACE), (self.hub, f"worker{i}")):
                if rate is None:
                    with contextlib.suppress(OSError):  # there was none
                        _call("tc", "-n", namespace, "qdisc", "del", "dev", device, "root")
                    continue
                # A millisecond's worth at full speed, and room for one packet of the largest kind.
                burst = max(65_536, round(rate_bits(rate) / 8 / 1000))
                shape = ("tbf", "rate", rate, "burst", str(burst), "latency", "200ms")
                _call("tc", "-n", namespace, "qdisc", "replace", "dev", device, "root", *shape)

    def call(self, function: str, *args, environment=None, timeout=None) -> list:
        """Calls a function once in each namespace, as one job of JAX processes.

        Args:
          function: "module:name". It is called when its process has joined the job.
          args: and its results go through JSON.
          environment: variables of the processes, on top of ours.
          timeout: seconds, or None.

        Returns:
          What each call has returned.

        Raises:
          RuntimeError: if one of them fails. What it has printed is on standard output.
        """
        coordinator = f"{self.addresses[0]}:9911"  # the namespace has no other use for the port
        with tempfile.TemporaryDirectory() as folder:
            paths = [pathlib.Path(folder, f"{i}.json") for i in range(len(self.names))]
            jobs = []
            for i, (name, path) in enumerate(zip(self.names, paths, strict=True)):
                path.write_text(json.dumps(args))
                python = (sys.executable, "-m", "experiments.benchmarks.network")
                variables = launch.environment(coordinator, len(self.names), i)
                command = ["ip", "netns", "exec", name, *python, function, str(path)]
                jobs.append((command, variables | (environment or {})))
            if code := launch.run(jobs, timeout=timeout):
                raise RuntimeError(f"{function} failed with exit code {code}.")
            return [json.loads(path.read_text()) for path in paths]


@contextlib.contextmanager
def network(workers: int, *, rate: str | None = None):
    """Builds a `Network`, and takes it down again whatever happens inside.

    Args:
      workers: how many.
      rate: as of `Network.cap`.

    Raises:
      ValueError: for no worker, more than fit, or a rate that is none.
      OSError: without root or the tools. It says what is missing.
    """
    if not 1 <= workers <= 250:
        raise ValueError(f"`workers` must be between 1 and 250, got {workers}.")
    if rate is not None:
        rate_bits(rate)
    check_rights()
    mark = f"ef21-{os.getpid()}"
    built = Network(f"{mark}-hub", tuple(f"{mark}-{i}" for i in range(workers)))
    with launch.ended_by_sigterm():
        try:
            _build(built)
            built.cap(rate)
            yield built
        finally:
            _remove(built)


def check_rights() -> None:
    """Raises an OSError that says what is missing, if anything is."""
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        raise OSError(
            f"Network namespaces need Linux and iproute2, and {' and '.join(missing)} cannot be "
            "found: apt install iproute2."
        )
    if os.geteuid() != 0:
        raise OSError("Network namespaces need root: run this with sudo.")


def _build(built):
    _call("ip", "netns", "add", built.hub)
    _call("ip", "-n", built.hub, "link", "add", "bridge", "type", "bridge")
    _call("ip", "-n", built.hub, "link", "set", "bridge", "up")
    for i, (name, address) in enumerate(zip(built.names, built.addresses, strict=True)):
        port, cable = f"worker{i}", ("type", "veth", "peer", "name")
        _call("ip", "netns", "add", name)
        _call("ip", "link", "add", INTERFACE, "netns", name, *cable, port, "netns", built.hub)
        _call("ip", "-n", built.hub, "link", "set", port, "master", "bridge")
        _call("ip", "-n", built.hub, "link", "set", port, "up")
        _call("ip", "-n", name, "addr", "add", f"{address}/24", "dev", INTERFACE)
        _call("ip", "-n", name, "link", "set", INTERFACE, "up")
        _call("ip", "-n", name, "link", "set", "lo", "up")
        # All that arrives goes to one core (RPS). A sender that moves from core to core would else
        # overtake itself, as nothing does on a cable; TCP takes that for losses, and sends up to a
        # few per cent twice.
        _set(built.hub, f"/sys/class/net/{port}/queues/rx-0/rps_cpus", "1")
        _set(name, f"/sys/class/net/{INTERFACE}/queues/rx-0/rps_cpus", "1")
        _set(name, "/proc/sys/net/ipv4/tcp_congestion_control", "cubic")
        # JAX's collectives listen on the address of this machine's name.
        hosts = f"127.0.0.1 localhost\n{address} {socket.gethostname()}\n"
        (_HOSTS / name).mkdir(parents=True)
        (_HOSTS / name / "hosts").write_text(hosts)


def _set(namespace, path, value):
    """A setting of the kernel, if this one has it."""
    with contextlib.suppress(OSError):
        _call("ip", "netns", "exec", namespace, "sh", "-c", f"echo {value} > {path}")


def _remove(built):
    """What there is of it: it may not have been built to the end."""
    for name in (*built.names, built.hub):
        with contextlib.suppress(OSError):
            _call("ip", "netns", "del", name)
        shutil.rmtree(_HOSTS / name, ignore_errors=True)
    with contextlib.suppress(OSError):
        _HOSTS.rmdir()  # unless others have something there


def _call(*command):
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"`{' '.join(command)}` failed: {done.stderr.strip()}")


def _called(function, path):
    """The other end of `Network.call`: the file has the arguments, and then the result."""
    module, name = function.split(":")
    cluster.initialize()
    path = pathlib.Path(path)
    result = getattr(importlib.import_module(module), name)(*json.loads(path.read_text()))
    path.write_text(json.dumps(result))


if __name__ == "__main__":
    _called(*sys.argv[1:])
