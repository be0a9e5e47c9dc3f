"""Make the clients of object stores and turn their errors into messages; it must not know paths or their content.

Credentials come from the environment variables and files that are usual for such stores, and stay in the client.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache, lru_cache
from typing import Any

from cellseg_batch.engine.errors import CellsegError, UsageError

SCHEMES = ("s3", "gs", "http", "https")
WEB = ("http", "https")
# Limits of the client's retries when a store fails for a moment; then the worker's own retries follow.
_MAX_RETRIES = 8
_RETRY_SECONDS = 60
_REQUEST_SECONDS = 120
# Credentials are read again after this time, well before those of boto3 expire.
_CREDENTIALS_MINUTES = 5
_CLIENTS = 256


class StoreError(UsageError, OSError):
    """An object store does not answer, or refuses; code that handles a failing disk catches it as an OSError."""


def may_pass(error: BaseException | None) -> bool:
    """Whether a disk or a store had a part in an error, so that a retry may succeed; imports no library."""
    while error is not None:
        libraries = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
        # zarrs has no exception class of its own for errors of the system.
        if isinstance(error, OSError) or "obstore" in libraries or "(os error " in str(error):
            return True
        error = error.__cause__
    return False


@lru_cache(maxsize=_CLIENTS)
def client_of(scheme: str, bucket: str, prefix: str = "") -> Any:
    """The client of a bucket or a web server, an ``obstore.store.ObjectStore``, which threads share.

    Args:
        scheme: one of `SCHEMES`.
        bucket: the bucket, or the name and port of the web server.
        prefix: beginning of all names that the client sees, left out of them; "" shows all.

    Raises:
        UsageError: the library is not installed, or there are no credentials.
    """
    stores, url = library().store, f"{scheme}://{bucket}"
    # Connect without TLS only if an endpoint begins with http://.
    endpoints = [url, *(value for name, value in os.environ.items() if name.startswith("AWS_ENDPOINT"))]
    options: dict[str, Any] = {
        "client_options": {
            "allow_http": any(endpoint.startswith("http://") for endpoint in endpoints),
            "timeout": timedelta(seconds=_REQUEST_SECONDS),
        },
        "retry_config": {"max_retries": _MAX_RETRIES, "retry_timeout": timedelta(seconds=_RETRY_SECONDS)},
    }
    if scheme in WEB:
        return stores.HTTPStore.from_url(f"{url}/{prefix}", **options)
    if scheme == "gs":
        return stores.GCSStore(bucket, prefix=prefix or None, **options)
    if os.environ.get("AWS_SKIP_SIGNATURE", "").lower() not in ("1", "true"):
        options["credential_provider"] = _credentials()
    return stores.S3Store(bucket, prefix=prefix or None, **options)


@cache
def _credentials() -> Any:
    from obstore.auth.boto3 import Boto3CredentialProvider

    # boto3 knows all usual sources of credentials: variables, profiles, roles of machines.
    return Boto3CredentialProvider(ttl=timedelta(minutes=_CREDENTIALS_MINUTES))


def library() -> Any:
    """The module obstore.

    Raises:
        UsageError: it is not installed.
    """
    try:
        import boto3  # noqa: F401
        import obstore.store
    except ImportError:
        raise UsageError(
            "object stores",
            expected="the packages obstore and boto3",
            found="none",
            remedy="install them with: pip install 'cellseg-batch[s3]'",
        ) from None
    return obstore


def refusals() -> tuple[type[Exception], ...]:
    """Exceptions that the library raises if a permission is missing."""
    exceptions = library().exceptions
    return exceptions.PermissionDeniedError, exceptions.UnauthenticatedError


@contextmanager
def asking(location: str) -> Iterator[None]:
    """Turn errors of requests about ``location`` into StoreError; a missing object stays a FileNotFoundError."""
    try:
        yield
    except CellsegError:
        raise
    except FileNotFoundError as error:
        if "NoSuchBucket" in str(error):
            raise _refused(location, error) from error
        raise FileNotFoundError(location) from None
    except _failures() as error:
        raise _refused(location, error) from error


def _failures() -> tuple[type[Exception], ...]:
    from botocore.exceptions import BotoCoreError

    return library().exceptions.BaseError, BotoCoreError, ValueError, OSError


def _refused(location: str, error: Exception) -> StoreError:
    """Make a StoreError from the library's error, without its pages of details."""
    from botocore.exceptions import BotoCoreError

    text = str(error)
    code = re.search(r"<Code>(\w+)</Code>", text)
    summary = f"{type(error).__name__}: {text.splitlines()[0] if text else ''}".partition("<?xml")[0]
    if "NoSuchBucket" in text:
        cause, remedy = "a misspelt name", "check the name of the bucket"
    elif isinstance(error, (*refusals(), BotoCoreError)) or re.search("get_credentials|status code: 40[13]", text):
        cause = "credentials that are missing, wrong or not enough"
        remedy = (
            "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; for public data AWS_SKIP_SIGNATURE=true"
        )
    else:
        cause = "no network, or a wrong AWS_ENDPOINT_URL or AWS_REGION"
        remedy = "run it again once the store answers; what is finished is kept"
    return StoreError(
        location,
        expected="an object store that answers",
        found=code[1] if code else summary,
        cause=cause,
        remedy=remedy,
    )
