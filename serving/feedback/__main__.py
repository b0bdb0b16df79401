"""``python -m serving.feedback``: the one collector of a target."""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
from pathlib import Path

import prometheus_client

from endcap.errors import EndcapError, InputError
from endcap.processes import bind_to_parent
from serving import impressions
from serving.asgi import DrainingServer, listen, one_line
from serving.feedback.app import FeedbackApp, FeedbackMetrics
from serving.feedback.attribution import to_us
from serving.feedback.store import FeedbackStore
from serving.feedback.writer import Writer
from serving.server.http import SheddingProtocol
from serving.watched import keep_fresh

log = logging.getLogger("serving.feedback")


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m serving.feedback", description=__doc__)
    parser.add_argument("--database", type=Path, required=True, help="SQLite file, made if it is not there")
    parser.add_argument("--impression-key", type=Path, required=True)
    parser.add_argument("--window-s", type=float, required=True, help="attribution window, from the time of issue")
    parser.add_argument("--port", type=int, required=True, help="0: any free one, named in the log")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--drain-s", type=float, default=0.5, help="answer for this long after SIGTERM, but not ready")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """The process's exit code: 0 after a drain, 1 for a database that is damaged or held, 2 for bad arguments."""
    bind_to_parent()
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    arguments = _arguments(argv)
    try:
        if not 0 < arguments.window_s <= 30 * 86400:
            raise InputError("--window-s must be above 0 and at most 30 days")
        keys = impressions.watched_keys(arguments.impression_key)
        listener = listen(arguments.host, arguments.port)
        store = FeedbackStore(arguments.database, window_us=to_us(arguments.window_s))
    except EndcapError as error:
        sys.stderr.write(one_line(error) + "\n")
        return error.exit_code
    prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
    metrics = FeedbackMetrics()
    app = FeedbackApp(arguments.database, keys, metrics)
    writers: list[Writer] = []
    tasks: list[asyncio.Task[None]] = []

    def start(server: DrainingServer) -> None:
        writers.append(Writer(store, on_damage=server.fail, on_commit=metrics.committed))
        app.open(writers[0])
        tasks.append(asyncio.create_task(keep_fresh(lambda: [keys], on_failure=metrics.keys_refused.inc)))
        log.info("ready: port %d, window %g s, %s", listener.getsockname()[1], arguments.window_s, arguments.database)

    code = DrainingServer(app, drain_s=arguments.drain_s, on_started=start, http=SheddingProtocol).run_on(listener)
    for writer in writers:
        writer.close()
    return code


if __name__ == "__main__":
    sys.exit(main())
