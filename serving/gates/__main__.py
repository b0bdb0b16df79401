"""``python -m serving.gates JOB RESULT``: run the gates of a job file. Started by :func:`serving.gates.run_gates`."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
from pathlib import Path

from endcap.errors import EndcapError
from endcap.processes import bind_to_parent


def main(argv: list[str] | None = None) -> int:
    """The process's exit code: 0 with a whole result, else that of the error."""
    bind_to_parent()
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    parser = argparse.ArgumentParser(prog="python -m serving.gates", description=__doc__)
    parser.add_argument("job", type=Path)
    parser.add_argument("result", type=Path)
    arguments = parser.parse_args(argv)

    from serving.asgi import one_line
    from serving.gates.course import run_course
    from serving.gates.job import read_job, write_result

    try:
        run_course(read_job(arguments.job), result=arguments.result, folder=arguments.result.parent)
    except EndcapError as error:
        with contextlib.suppress(EndcapError):
            write_result(arguments.result, (), error=error)
        sys.stderr.write(one_line(error) + "\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    # A run that hangs in the graph must not hold the process when everything else has ended.
    exit_code = main()
    sys.stderr.flush()
    os._exit(exit_code)
