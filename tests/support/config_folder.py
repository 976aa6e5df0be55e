"""A configuration folder in a temporary place: what a test says, and otherwise as little as possible."""

from __future__ import annotations

from pathlib import Path

from gateway.settings import Settings, load_settings

NO_ROUTES = 'time_zone = "UTC"\nrules = []\n'
LOOPBACK_SENDER = '[[senders]]\nae_title = "CT1"\naddresses = ["127.0.0.1"]\n'


def write_config(
    folder: Path,
    *,
    gateway: str = "",
    destinations: str = "",
    routes: str = NO_ROUTES,
    port: int = 0,
    web_port: int = 0,
    reserve_mb: int = 1,
) -> Path:
    """`folder`/config with all four files; state is `folder`/state. `gateway` is appended to the [receiver] table."""
    config = folder / "config"
    config.mkdir(parents=True, exist_ok=True)
    (config / "gateway.toml").write_text(
        f'state_dir = "state"\n[web]\nport = {web_port}\n'
        f'[receiver]\nhost = "127.0.0.1"\nport = {port}\nreserve_mb = {reserve_mb}\n{gateway}\n',
        encoding="utf-8",
    )
    (config / "destinations.toml").write_text(destinations, encoding="utf-8")
    (config / "routes.toml").write_text(routes, encoding="utf-8")
    (config / "logging.toml").write_text('level = "error"\n', encoding="utf-8")
    return config


def settings_in(folder: Path, **parts: object) -> Settings:
    """The settings of such a folder."""
    return load_settings(write_config(folder, **parts))  # type: ignore[arg-type]
