"""``python -m serving.server``: one process, one replica, one package."""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import re
import sys
import time
from pathlib import Path
from typing import Any

from endcap.errors import EndcapError, InputError
from endcap.processes import bind_to_parent
from serving import impressions
from serving.asgi import DrainingServer, listen, one_line
from serving.server.answers import AnswerLog
from serving.watched import Watched, keep_fresh

log = logging.getLogger("serving.server")

_LABEL = re.compile(r"[A-Za-z0-9._-]{1,64}", re.ASCII)


def _label(text: str) -> str:
    if _LABEL.fullmatch(text) is None:
        raise argparse.ArgumentTypeError("1 to 64 letters, digits, dots, dashes or underscores")
    return text


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m serving.server", description=__doc__)
    parser.add_argument("--package", type=Path, required=True, help="folder of the signed package")
    parser.add_argument("--public-key", type=Path, required=True, help="PEM file to verify it with")
    parser.add_argument("--version", type=_label, required=True, help="label of the model version")
    parser.add_argument("--zone", type=_label, required=True)
    parser.add_argument("--port", type=int, required=True, help="0: any free one, named in the log")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--variant", default="float32")
    parser.add_argument("--impression-key", type=Path, help="without it answers carry no impression")
    parser.add_argument("--answers", type=Path, metavar="FILE",
                        help="append answers to requests that a shadow gets too, for a comparator")  # fmt: skip
    parser.add_argument("--stock", type=Path, metavar="FILE",
                        help='{"out_of_stock": ["<item id>", ...]}, read again when it changes')  # fmt: skip
    parser.add_argument("--provider", choices=("auto", "cpu", "cuda"), default="auto",
                        help="what runs the graph; auto: CUDA where onnxruntime offers it")  # fmt: skip
    parser.add_argument("--workers", type=int, default=2, help="runs of the graph at the same time")
    parser.add_argument("--threads", type=int, default=0, help="of one run; default: the cores given over --workers")
    parser.add_argument("--max-rows", type=int, default=64, help="of a batch")
    parser.add_argument("--max-tokens", type=int, default=16384, help="of a batch: its rows times its longest row")
    parser.add_argument("--max-wait-ms", type=float, default=2.0,
                        help="a request is held so long to gather others, and only while a run goes on")  # fmt: skip
    parser.add_argument("--timeout-s", type=float, default=2.0, help="a run that takes longer is ended (504)")
    parser.add_argument("--max-waiting", type=int, default=256, help="requests beyond this are turned away (503)")
    parser.add_argument("--drain-s", type=float, default=1.0, help="answer for this long after SIGTERM, but not ready")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """The process's exit code: 0 after a drain, 2 for bad arguments, 3 for a package that must not be served."""
    bind_to_parent()
    begun_s = time.monotonic()
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    arguments = _arguments(argv)
    try:
        keys = impressions.watched_keys(arguments.impression_key) if arguments.impression_key else None
        if min(arguments.workers, arguments.timeout_s, arguments.max_waiting, arguments.max_rows,
               arguments.max_tokens) <= 0 or min(arguments.threads, arguments.max_wait_ms) < 0:  # fmt: skip
            raise InputError("--workers, --timeout-s, --max-waiting, --max-rows and --max-tokens must be above 0, "
                             "--threads and --max-wait-ms not below")  # fmt: skip
        listener = listen(arguments.host, arguments.port)
        answers = AnswerLog(arguments.answers) if arguments.answers else None
    except EndcapError as error:
        sys.stderr.write(one_line(error) + "\n")
        return error.exit_code

    import prometheus_client

    from serving.server.app import Replica, ServerApp
    from serving.server.engine import cores
    from serving.server.service import Limits, Service, load_service

    prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
    threads = arguments.threads or max(1, cores() // arguments.workers)
    limits = Limits(
        workers=arguments.workers, lanes=max(1, min(arguments.workers, cores() // threads)),
        timeout_s=arguments.timeout_s, max_rows=arguments.max_rows, max_tokens=arguments.max_tokens,
        max_wait_s=arguments.max_wait_ms / 1000, max_waiting=arguments.max_waiting,
    )  # fmt: skip
    app = ServerApp(Replica(arguments.version, arguments.zone), impression_key=keys, answers=answers)

    async def load(server: DrainingServer) -> None:
        """Health answers 503 meanwhile."""
        loop = asyncio.get_running_loop()
        try:
            service: Service = await loop.run_in_executor(
                None,
                lambda: load_service(arguments.package, arguments.public_key, variant=arguments.variant,
                                     limits=limits, threads=threads, provider=arguments.provider,
                                     stock=arguments.stock),
            )  # fmt: skip
        except EndcapError as error:
            server.fail(error)
            return
        except Exception as error:  # noqa: BLE001 - said on one line, as any other refusal
            server.fail(EndcapError(f"could not load: {type(error).__name__}: {error}", where=arguments.package))
            return
        gc.collect()
        gc.freeze()  # what is loaded stays: no collection need look at it again
        app.open(service)
        log.info(
            "ready: version %s zone %s port %d, %.2f s from start (verified %.3f s, loaded %.3f s)",
            arguments.version, arguments.zone, listener.getsockname()[1], time.monotonic() - begun_s,
            service.verification_s, service.load_s,
        )  # fmt: skip

    def watched() -> list[Watched[Any]]:
        catalogue = app.service.catalogue if app.service is not None else None
        files = (keys, catalogue.watched if catalogue is not None else None)
        return [file for file in files if file is not None]

    tasks: list[asyncio.Task[None]] = []

    def start(server: DrainingServer) -> None:
        tasks.extend(asyncio.create_task(work) for work in (load(server), keep_fresh(watched)))

    server = DrainingServer(app, drain_s=arguments.drain_s, on_started=start)
    code = server.run_on(listener)
    if app.service is not None:
        app.service.close()
    if answers is not None:
        answers.close()
    return code


if __name__ == "__main__":
    # A run that hangs in the graph must not hold the process when everything else has ended.
    import os

    exit_code = main()
    sys.stderr.flush()
    os._exit(exit_code)
