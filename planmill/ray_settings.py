"""Settings of a Ray that this process starts for itself."""

import os
import secrets


def keep_ray_private() -> None:
    """To be called before Ray is imported, which is when Ray reads them.

    Its own ports ask for a token, of this run alone, and listen on loopback (the name says Windows; Linux obeys it
    too), and it reports no usage to anyone.
    """
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    if "RAY_AUTH_TOKEN_PATH" not in os.environ:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
