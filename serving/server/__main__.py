"""``python -m serving.server``: one replica of one package, in one process or in several on one port."""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import os
import re
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from endcap.errors import EndcapError, InputError
from endcap.processes import bind_to_parent
from serving import impressions
from serving.asgi import DrainingServer, listen, one_line
from serving.server import workers
from serving.server.answers import AnswerLog
from serving.tracing import traces_endpoint
from serving.watched import Watched, keep_fresh

if TYPE_CHECKING:
    from serving.server.grpc_server import GrpcServer

log = logging.getLogger("serving.server")

_FINISH_S = 3.0
"""For gRPC calls under way when the port closes; HTTP's have as long."""

_COMES_WITHIN_S = 120.0
"""A package of KServe's that comes as an image: the container that has it begins after this one, once it is pulled."""

_LABEL = re.compile(r"[A-Za-z0-9._-]{1,64}", re.ASCII)


def _label(text: str) -> str:
    if _LABEL.fullmatch(text) is None:
        raise argparse.ArgumentTypeError("1 to 64 letters, digits, dots, dashes or underscores")
    return text


def _sha256(text: str) -> str | None:
    if text in ("", "none"):
        return None
    if re.fullmatch(r"[0-9a-f]{64}", text, re.ASCII) is None:
        raise argparse.ArgumentTypeError("64 hexadecimal digits, or none")
    return text


def _thresholds(text: str) -> tuple[float, ...]:
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or len(found) > 32 or not all(0 < threshold < 3.6e6 for threshold in found):
        raise argparse.ArgumentTypeError("1 to 32 milliseconds above 0, with commas between")
    return found


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m serving.server", description=__doc__)
    parser.add_argument("--package", type=Path, required=True, help="folder of the signed package")
    parser.add_argument("--public-key", type=Path, required=True, help="PEM file to verify it with")
    parser.add_argument("--package-sha256", type=_sha256, metavar="HEX",
                        help="of the package's manifest, as the registry has it; none: any that is signed")  # fmt: skip
    parser.add_argument("--version", type=_label, required=True, help="label of the model version")
    parser.add_argument("--zone", type=_label, required=True)
    parser.add_argument("--port", type=int, required=True, help="0: any free one, named in the log")
    parser.add_argument(
        "--grpc-port",
        type=int,
        metavar="N",
        help="speak gRPC too (Open Inference Protocol), on this port; 0: any free one, named in the log",
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--variant", default="float32")
    parser.add_argument("--impression-key", type=Path, help="without it answers carry no impression")
    parser.add_argument("--admin-key", type=Path, metavar="FILE",
                        help="for /metrics, load and unload; with neither it nor --jwt-keys: the first open, the "
                        "others shut")  # fmt: skip
    parser.add_argument("--jwt-keys", type=Path, metavar="FILE",
                        help="the same for who sends a token (JWT) that one of these public keys signed: a JWKS or a "
                        "PEM file, read again when it changes; with --jwt-audience")  # fmt: skip
    parser.add_argument("--jwt-audience", metavar="NAME", help="whom such a token must be for")
    parser.add_argument("--jwt-issuer", metavar="NAME", help="who must have issued it; default: anybody with a key")
    parser.add_argument("--answers", type=Path, metavar="FILE",
                        help="append answers to requests that a shadow gets too, for a comparator")  # fmt: skip
    parser.add_argument("--access-log", metavar="FILE",
                        help="append a JSON line for each request that was let in, without shopper and history; -: to "
                        "standard output")  # fmt: skip
    parser.add_argument("--stock", type=Path, metavar="FILE",
                        help='{"out_of_stock": ["<item id>", ...]}, read again when it changes')  # fmt: skip
    parser.add_argument("--cache", metavar="WHERE",
                        help="keep answers: memory:ENTRIES in this process, or redis://HOST:PORT/DB, shared by "
                        "servers (password: ENDCAP_REDIS_PASSWORD); default: none are kept")  # fmt: skip
    parser.add_argument("--cache-ttl-s", type=float, default=60.0, help="a kept answer is served for so long at most")
    parser.add_argument("--provider", choices=("auto", "cpu", "cuda"), default="auto",
                        help="what runs the graph; auto: CUDA where onnxruntime offers it")  # fmt: skip
    parser.add_argument("--workers", type=int, default=2, help="runs of the graph at the same time")
    parser.add_argument("--threads", type=int, default=0,
                        help="of one run; default: the cores given over --workers and --processes")  # fmt: skip
    parser.add_argument("--processes", type=int, default=1, help="worker processes on the one port")
    parser.add_argument("--thresholds-ms", type=_thresholds, default=(), metavar="MS,...",
                        help="the objectives' latency thresholds: edges of the latency histograms")  # fmt: skip
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
    several = arguments.processes > 1
    try:
        traced = traces_endpoint(os.environ) is not None
        keys = impressions.watched_keys(arguments.impression_key) if arguments.impression_key else None
        _check(arguments)
        if several:
            sockets = workers.bind_all(arguments.host, arguments.port, arguments.processes)
        else:
            sockets = [listen(arguments.host, arguments.port)]
        answers = AnswerLog(arguments.answers) if arguments.answers else None
    except EndcapError as error:
        sys.stderr.write(one_line(error) + "\n")
        return error.exit_code

    from serving.server.access import AccessLog

    if traced:
        from serving.spans import Tracing  # before the fork: workers share what it takes
    from serving.server.admins import AdminKey, Admins, Tokens, read_public_keys
    from serving.server.app import Replica, ServerApp
    from serving.server.cache import open_cache
    from serving.server.engine import cores, on_gpu
    from serving.server.http import SheddingProtocol, sweep
    from serving.server.metrics import ServerMetrics
    from serving.server.service import Limits, Service, load_service

    given = max(1, cores() // arguments.processes)
    threads = arguments.threads or max(1, given // arguments.workers)
    limits = Limits(
        workers=arguments.workers, lanes=max(1, min(arguments.workers, given // threads)),
        timeout_s=arguments.timeout_s, max_rows=arguments.max_rows, max_tokens=arguments.max_tokens,
        max_wait_s=arguments.max_wait_ms / 1000, max_waiting=arguments.max_waiting,
    )  # fmt: skip
    metrics = ServerMetrics(arguments.version, thresholds_s=[one / 1000 for one in arguments.thresholds_ms],
                            processes=arguments.processes)  # fmt: skip
    try:
        key = AdminKey.read(arguments.admin_key) if arguments.admin_key is not None else None
        tokens = None
        if arguments.jwt_keys is not None:
            tokens = Tokens(Watched(arguments.jwt_keys, read_public_keys), audience=arguments.jwt_audience,
                            issuer=arguments.jwt_issuer)  # fmt: skip
        admin = None if key is None and tokens is None else Admins(key, tokens)
        cache = None
        if arguments.cache is not None:
            cache = open_cache(arguments.cache, ttl_s=arguments.cache_ttl_s, counts=metrics.cache,
                               troubles=metrics.cache_troubles)  # fmt: skip
    except EndcapError as error:
        sys.stderr.write(one_line(error) + "\n")
        return error.exit_code

    def load() -> Service:
        """Blocks."""
        try:
            service = load_service(arguments.package, arguments.public_key, variant=arguments.variant, limits=limits,
                                   threads=threads, provider=arguments.provider, stock=arguments.stock, cache=cache,
                                   version=arguments.version, secret=keys.value.every[-1] if keys else b"",
                                   sha256=arguments.package_sha256)  # fmt: skip
        except EndcapError:
            raise
        except Exception as error:
            what = f"could not load: {type(error).__name__}: {error}"
            raise EndcapError(what, where=arguments.package) from error
        gc.collect()
        gc.freeze()  # what is loaded stays: no collection need look at it again, nor touch memory that workers share
        return service

    app = ServerApp(Replica(arguments.version, arguments.zone), impression_key=keys, answers=answers, metrics=metrics,
                    admin=admin, load=None if several else load)  # fmt: skip

    def say_ready(service: Service) -> None:
        log.info(
            "ready: version %s zone %s port %d, %.2f s from start (verified %.3f s, loaded %.3f s)",
            arguments.version, arguments.zone, sockets[0].getsockname()[1], time.monotonic() - begun_s,
            service.verification_s, service.load_s,
        )  # fmt: skip

    def watched() -> list[Watched[Any]]:
        catalogue = app.service.catalogue if app.service is not None else None
        files = (keys, catalogue.watched if catalogue is not None else None, None if tokens is None else tokens.keys)
        return [file for file in files if file is not None]

    def serve(listener: socket.socket) -> int:
        """Until told to end; with a loaded package, or loading it first while health answers 503."""
        if traced:
            app.tracing = Tracing("endcap-server", {"service.version": arguments.version,
                                                    "endcap.zone": arguments.zone})  # fmt: skip
        try:
            if arguments.access_log is not None:  # after the fork: its thread does not live through one
                app.access = AccessLog(None if arguments.access_log == "-" else Path(arguments.access_log))
        except EndcapError as error:
            sys.stderr.write(one_line(error) + "\n")
            return error.exit_code
        tasks: list[asyncio.Task[None]] = []
        beside: list[GrpcServer] = []

        async def open_grpc(server: DrainingServer) -> None:
            from serving.server.grpc_backend import AppBackend  # grpc must not be there before the fork
            from serving.server.grpc_server import GrpcServer

            grpc = GrpcServer(AppBackend(app, version=arguments.version), host=arguments.host,
                              port=arguments.grpc_port, reuse_port=several, tracing=app.tracing)  # fmt: skip
            try:
                await grpc.start()
            except EndcapError as error:
                server.fail(error)
                return
            beside.append(grpc)
            log.info("grpc: port %d", grpc.port)

        async def close_grpc() -> None:
            for grpc in beside:
                await grpc.stop(grace_s=_FINISH_S)

        async def open_loaded(server: DrainingServer) -> None:
            for pause_s in _until_it_comes(arguments.package, os.environ):
                await asyncio.sleep(pause_s)
            try:
                service = await asyncio.get_running_loop().run_in_executor(None, load)
            except EndcapError as error:
                server.fail(error)
                return
            app.open(service)
            say_ready(service)

        def start(server: DrainingServer) -> None:
            tasks.append(asyncio.create_task(keep_fresh(watched, on_failure=metrics.files_refused.inc)))
            tasks.append(asyncio.create_task(sweep(server.server_state.connections)))
            if app.service is None:
                tasks.append(asyncio.create_task(open_loaded(server)))
            if arguments.grpc_port is not None:
                tasks.append(asyncio.create_task(open_grpc(server)))

        code = DrainingServer(
            app, drain_s=arguments.drain_s, on_started=start, http=SheddingProtocol,
            on_stopping=close_grpc if arguments.grpc_port is not None else None,
        ).run_on(listener)  # fmt: skip
        if app.service is not None:
            app.service.close()
        if answers is not None:
            answers.close()
        if app.access is not None:
            app.access.close()
        if app.tracing is not None:
            app.tracing.close()
        return code

    if not several:
        return serve(sockets[0])

    def work(number: int, listener: socket.socket) -> int:
        for other in sockets:
            if other is not listener:
                other.close()
        metrics.use(number)
        if shared is not None:
            app.open(shared)
        return serve(listener)

    shared: Service | None = None
    if threads == 1 and not on_gpu(arguments.provider):
        for pause_s in _until_it_comes(arguments.package, os.environ):
            time.sleep(pause_s)
        try:
            shared = load()
        except EndcapError as error:
            sys.stderr.write(one_line(error) + "\n")
            return error.exit_code
        say_ready(shared)
    return workers.supervise(sockets, work, drain_s=arguments.drain_s)


def _until_it_comes(package: Path, environment: Mapping[str, str]) -> Iterator[float]:
    """Seconds to wait before the next look, until the package is there, or nobody said that it may come later.

    KServe says so by ``MODEL_INIT_MODE=async``: its folder is then a link into another container's processes.
    """
    if environment.get("MODEL_INIT_MODE") != "async":
        return
    until_s = time.monotonic() + _COMES_WITHIN_S
    while not package.is_dir() and time.monotonic() < until_s:
        yield 0.1


def _check(arguments: argparse.Namespace) -> None:
    """Limits that make sense.

    Raises:
        InputError: one does not.
    """
    above = ("workers", "timeout_s", "max_waiting", "max_rows", "max_tokens", "processes", "cache_ttl_s")
    for name in (*above, "threads", "max_wait_ms", "drain_s"):
        value = getattr(arguments, name)
        if value < 0 or (value == 0 and name in above):
            raise InputError(f"{value} is out of range", where=f"--{name.replace('_', '-')}",
                             next_step="give a number above 0")  # fmt: skip
    if arguments.processes > 64:
        raise InputError("at most 64 worker processes", where="--processes")
    if (arguments.jwt_keys is None) != (arguments.jwt_audience is None):
        raise InputError("keys and audience of tokens go together", where="--jwt-keys",
                         next_step="give both --jwt-keys and --jwt-audience, or neither")  # fmt: skip
    if arguments.jwt_issuer is not None and arguments.jwt_keys is None:
        raise InputError("an issuer of tokens without keys", where="--jwt-issuer", next_step="give --jwt-keys too")
    if arguments.grpc_port == 0 and arguments.processes > 1:
        raise InputError("several processes need one port to share", where="--grpc-port", next_step="name a port")
    if arguments.processes > 1 and arguments.access_log not in (None, "-"):
        raise InputError("a file of requests is one process's", where="--access-log",
                         next_step="give - for standard output, or leave out --processes")  # fmt: skip
    if arguments.processes > 1 and arguments.answers is not None:
        raise InputError("the answers log is one process's", where="--answers", next_step="leave out --processes")


if __name__ == "__main__":
    # A run that hangs in the graph must not hold the process when everything else has ended.
    exit_code = main()
    sys.stderr.flush()
    os._exit(exit_code)
