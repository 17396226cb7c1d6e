"""`eventbus run`: services in this process, until SIGTERM or Ctrl-C."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from eventbus.cli import output
from eventbus.cli.connection import Namespace, Url, broker_url, read_settings

if TYPE_CHECKING:
    from eventbus.worker import Worker

Services = Annotated[
    list[str],
    typer.Argument(
        metavar="MODULE:SERVICE", help="What to run; MODULE alone: every service in it.", show_default=False
    ),
]
# Of whatever runs until it is told to stop.
LogFormat = Annotated[
    Literal["console", "json"] | None,
    typer.Option("--log", help="How to log, on stderr (EVENTBUS_LOG; console on a terminal, else json)"),
]
LogLevel = Annotated[
    Literal["debug", "info", "warning", "error"] | None,
    typer.Option("--log-level", help="How much of it (EVENTBUS_LOG_LEVEL, info)"),
]


def run(
    services: Services,
    url: Url = None,
    namespace: Namespace = None,
    idempotency: Annotated[
        str | None, typer.Option(metavar="URL", help="Where handled keys are kept (EVENTBUS_IDEMPOTENCY, memory://)")
    ] = None,
    grace: Annotated[
        float, typer.Option(metavar="SECONDS", min=0, help="How long handlers at work may go on after a stop.")
    ] = 30,
    health: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Answer /live and /ready over HTTP there, for example 127.0.0.1:8081"),
    ] = None,
    reload: Annotated[
        bool, typer.Option("--reload", help="Start again when a Python file of the working directory changes.")
    ] = False,
    log: LogFormat = None,
    log_level: LogLevel = None,
) -> None:
    """Run services until SIGTERM or Ctrl-C.

    The first signal takes nothing more and lets handlers finish; a second one hands their events back at once.
    """
    settings = read_settings()
    url = broker_url(url, settings)
    address = None if health is None else host_and_port(health)
    if reload:
        from eventbus.cli.reload import run_and_reload

        raise typer.Exit(run_and_reload(grace_s=grace))

    from datetime import timedelta

    from eventbus.cli import load, logs
    from eventbus.telemetry import install_sdk
    from eventbus.worker import Worker, run_to_the_end

    logs.configure(log or settings.log, log_level or settings.log_level)
    loaded = load.services(services)
    install_sdk(",".join(service.name for service in loaded))  # before the worker, which asks for its tracer
    worker = Worker(*loaded, url=url, namespace=namespace, idempotency=idempotency, grace=timedelta(seconds=grace))
    run_to_the_end(_serve(worker, address))


def host_and_port(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not (port.isascii() and port.isdecimal()) or int(port) > 65535:
        raise output.WrongUsage(f"--health {text!r} is no HOST:PORT: give one like 127.0.0.1:8081")
    return host.removeprefix("[").removesuffix("]"), int(port)


async def _serve(worker: Worker, address: tuple[str, int] | None) -> None:
    from contextlib import AsyncExitStack

    from eventbus import health
    from eventbus.worker import serve

    async with AsyncExitStack() as around:
        watchdog = around.enter_context(health.Watchdog())
        if address is not None:
            url = await around.enter_async_context(health.served(worker, watchdog, *address))
            output.say(f"health   {url}/live and /ready")
        await serve(worker, output.say)
