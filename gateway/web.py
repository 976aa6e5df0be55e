"""HTTP: liveness, readiness, metrics. Loopback by default; beyond it a token or a client certificate is needed.

| path | answers |
| --- | --- |
| `/health/live` | 200 while the process runs |
| `/health/ready` | 200 when database, spool, workers and canaries are in order, else 503 with what is not |
| `/metrics` | Prometheus text format |

The token guards everything but `/health/live`.
"""

from __future__ import annotations

import hmac
import ssl
from collections.abc import Awaitable, Callable
from datetime import timedelta

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from sqlalchemy import func, select

from gateway.metrics import exposition
from gateway.monitoring.canary_watch import ALARM as CANARY_ALARM
from gateway.settings import Settings, WebSettings, secret
from storage.alarms import is_quiet, open_alarms
from storage.database import Database
from storage.errors import DatabaseAway, StorageError
from storage.records import Executor, utc_now
from storage.spool import Spool


def make_app(settings: Settings, database: Database, spool: Spool) -> FastAPI:
    """The application; raises SettingsInvalid when a configured token cannot be read."""
    web = settings.gateway.web
    token = secret(file=web.token_file, env=web.token_env, key="web.token")
    app = FastAPI(title="seggate", docs_url=None, redoc_url=None, openapi_url=None)

    @app.middleware("http")
    async def guard(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        if token and request.url.path != "/health/live":
            given = request.headers.get("authorization", "")
            if not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
                return PlainTextResponse("a bearer token is needed\n", status_code=401)
        return await call_next(request)

    @app.get("/health/live")
    def live() -> dict[str, str]:
        return {"status": "live"}

    @app.get("/health/ready")
    def ready() -> JSONResponse:
        checks = readiness(settings, database, spool)
        well = all(text == "ok" for text in checks.values())
        return JSONResponse({"ready": well, "checks": checks}, status_code=200 if well else 503)

    @app.get("/metrics")
    def metrics() -> Response:
        return Response(exposition(database, spool), media_type="text/plain; version=0.0.4; charset=utf-8")

    return app


def readiness(settings: Settings, database: Database, spool: Spool) -> dict[str, str]:
    """Each check with "ok" or what is wrong."""
    checks = {}
    limit = utc_now() - timedelta(seconds=settings.gateway.worker.takeover_s)
    try:
        with database.reading() as session:
            workers = session.scalar(
                select(func.count())
                .select_from(Executor)
                .where(Executor.role == "worker", Executor.beat_at >= limit, Executor.stopped_at.is_(None))
            )
            canaries = [alarm for alarm in open_alarms(session) if alarm.kind == CANARY_ALARM]
        checks["database"] = "ok"
        if settings.gateway.scheduler.canary_cron:
            loud = [alarm.subject for alarm in canaries if not is_quiet(alarm, utc_now())]
            checks["canary"] = f"wrong: {', '.join(sorted(loud))}; see `seggate alarms`" if loud else "ok"
        checks["worker"] = "ok" if workers else "no worker has reported lately"
    except DatabaseAway as error:
        checks["database"] = str(error)
    try:
        enough = spool.free_bytes() >= settings.gateway.receiver.reserve_mb << 20
        checks["spool"] = "ok" if enough else "free space is below receiver.reserve_mb; nothing is accepted"
    except (StorageError, OSError) as error:
        checks["spool"] = str(error)
    return checks


def server(app: FastAPI, web: WebSettings) -> uvicorn.Server:
    """A server for the application with the configured address and certificates."""
    tls = {}
    if web.tls_certificate is not None:
        tls = {"ssl_certfile": str(web.tls_certificate), "ssl_keyfile": str(web.tls_key)}
    config = uvicorn.Config(
        app,
        host=web.host,
        port=web.port,
        log_level="warning",
        access_log=False,
        server_header=False,
        ssl_certfile=tls.get("ssl_certfile"),
        ssl_keyfile=tls.get("ssl_keyfile"),
        ssl_ca_certs=str(web.client_ca) if web.client_ca else None,
        ssl_cert_reqs=ssl.CERT_REQUIRED if web.client_ca else ssl.CERT_NONE,
    )
    return uvicorn.Server(config)
