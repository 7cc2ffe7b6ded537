"""Takes the arguments of `profiler.measure` and does what the request's model is called.

It imports nothing, so that a campaign of a dozen cases takes a second.
"""

import argparse
import fcntl
import json
import os
import signal
import sys


def record(asked, request, outcome):
    kind = {"record": "run", "request": request, "limit_bytes": asked.memory_limit}
    if asked.probe:
        arguments = json.loads(asked.arguments)
        kind = {"record": "probe", "name": asked.probe, "arguments": arguments}
    line = {
        **kind, "schema": "measurement/v1", "id": asked.id, "origin": "simulated",
        "group": asked.group, "outcome": outcome,
    }  # fmt: skip
    with open(asked.append, "a") as file:  # noqa: PTH123
        file.write(json.dumps(line) + "\n")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("request", nargs="?")
    for flag in ("probe", "arguments", "append", "group", "id", "device", "gpu", "lock", "steps"):
        parser.add_argument(f"--{flag}")
    parser.add_argument("--memory-limit", type=int)
    parser.add_argument("--snapshot")
    asked = parser.parse_args()

    request = {}
    if asked.request:
        with open(asked.request) as file:  # noqa: PTH123 - nothing is imported here
            request = json.load(file)
    act = request.get("model", asked.probe)
    if act == "refused":
        print("a warning\nprofiler.measure: no such kernel", file=sys.stderr)
        sys.exit(3)
    if act == "crashes early":
        sys.exit("ImportError: no torch")
    with open(asked.lock, "a") as lock:  # noqa: PTH123
        fcntl.flock(lock, fcntl.LOCK_EX)
        if log := os.environ.get("STUB_LOG"):
            with open(log, "a") as file:  # noqa: PTH123
                file.write(f"{act} in\n")
        if act in ("hangs", "hangs with a child"):
            # The other end sees when this process is there, and when it is gone.
            fifo = os.environ.get("STUB_FIFO")
            held = open(fifo, "w") if fifo else None  # noqa: F841, PTH123, SIM115
            if act == "hangs with a child" and os.fork() == 0:
                signal.pause()
            signal.pause()
        if act == "crashes":
            print("RuntimeError: the kernel failed\n\n", file=sys.stderr)
            sys.exit(1)
        if act == "dies":
            os.kill(os.getpid(), signal.SIGSEGV)
        if act == "half":
            with open(asked.append, "a") as file:  # noqa: PTH123
                file.write('{"record": "run", "id"')
            os.kill(os.getpid(), signal.SIGKILL)
        if act != "silent":
            record(asked, request, "out_of_memory" if act == "runs out" else "ok")
        if log:
            with open(log, "a") as file:  # noqa: PTH123
                file.write(f"{act} out\n")
    if act == "fails after its record":
        sys.exit(1)


if __name__ == "__main__":
    main()
