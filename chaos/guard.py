"""Lets stopped processes go on when the drill that stopped them is gone, however it went.

Started as a script by :mod:`chaos.faults` (``guard.py FAULTS-FILE DRILL FAULT DEADLINE-S PID=SUBJECT ...``),
so it knows the standard library only. It holds a handle on each process (a process ID may be used again), says
``ready``, and waits on its standard input: ``done`` means that the drill let them go by itself; an end without it
means that the drill died. The deadline is for a drill that lives and hangs.
"""

import contextlib
import json
import os
import select
import signal
import sys
import time


def main() -> None:
    file, drill, fault, deadline_s, *held = sys.argv[1:]
    handles: list[tuple[int, str]] = []
    for pair in held:
        pid, _, subject = pair.partition("=")
        with contextlib.suppress(ProcessLookupError):
            handles.append((os.pidfd_open(int(pid)), subject))
    # A terminal's Ctrl-C and a polite end are for the drill; the guard ends with it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.write(1, b"ready\n")
    readable, _, _ = select.select([0], [], [], float(deadline_s))
    if readable and os.read(0, 16).startswith(b"done"):
        return
    for handle, subject in handles:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(handle, signal.SIGCONT)
        record = {"at_s": time.time(), "drill": drill, "fault": fault, "phase": "reverted", "subject": subject}
        with contextlib.suppress(OSError):
            log = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
            os.write(log, json.dumps(record, separators=(",", ":")).encode() + b"\n")
            os.close(log)


if __name__ == "__main__":
    main()
