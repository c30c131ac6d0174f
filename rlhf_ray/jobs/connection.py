"""Connecting to a cluster's job API: address, token, and error messages that say what to do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlhf_ray.errors import InputError
from rlhf_ray.runtime.addresses import AUTO, JOBS_ALLOWED, check_answers, check_this_machine


def read_token(environment: Mapping[str, str]) -> str | None:
    """The cluster's token, from the same places and in the same order as in Ray; None if there is none."""
    if token := environment.get("RAY_AUTH_TOKEN", "").strip():
        return token
    path = Path(environment.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
    return path.read_text().strip() if path.is_file() else None


class ClusterRefused(InputError, RuntimeError):
    """The cluster cannot be reached, needs another token, or refused a request."""


def dashboard_of(address: str) -> str:
    """The URL of a cluster's job API.

    Args:
        address: the cluster's, `HOST:PORT`, or `auto` for this machine's.

    Raises:
        AddressRefused: nothing answers there.
        ClusterRefused: it has no dashboard.
    """
    from ray.dashboard.utils import get_address_for_submission_client

    if address == AUTO:
        check_this_machine(JOBS_ALLOWED)
    else:
        check_answers(address, JOBS_ALLOWED)
    try:
        url = get_address_for_submission_client(address)
    except ValueError as error:
        raise ClusterRefused(f"{address}: {_first_line(error)}; {JOBS_ALLOWED}") from error
    if url == "http://":
        raise ClusterRefused(
            f"{address}: the cluster was started without its dashboard, which accepts jobs; {JOBS_ALLOWED}"
        )
    return url


@contextmanager
def readable_errors(address: str) -> Iterator[None]:
    """Turn Ray's errors into `ClusterRefused` with a message that says what to do."""
    from ray.exceptions import AuthenticationError, RayError
    from requests import RequestException

    hint = "set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to a file that holds it (`ray get-auth-token` prints it on the head)"
    try:
        yield
    except AuthenticationError as error:
        wrong = "failed" in str(error).split("\n")[0]
        why = "refuses this token" if wrong else "requires a token, and none was sent"
        raise ClusterRefused(f"{address} {why}; {hint}") from error
    except ConnectionError as error:
        raise ClusterRefused(
            f"{address}: {error}; give the dashboard's address with --address http://HOST:8265 or RAY_ADDRESS"
        ) from error
    except RequestException as error:
        raise ClusterRefused(f"{address}: {_first_line(error)}; {JOBS_ALLOWED}") from error
    except InputError:
        raise
    except (RuntimeError, RayError) as error:
        raise ClusterRefused(f"{address}: {_first_line(error)}") from error


def _first_line(error: Any) -> str:
    return str(error).strip().splitlines()[-1][:500] if str(error).strip() else type(error).__name__
