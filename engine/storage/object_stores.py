"""The clients of object stores, and what goes wrong with them in words; paths and what lies there are not known here.

Credentials come from the environment, as every program that speaks to such a store takes them, and stay in the client.
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
# A store's hiccups are sat out for so long; then the worker's own attempts follow.
_MAX_RETRIES = 8
_RETRY_SECONDS = 60
_REQUEST_SECONDS = 120
# Credentials are asked for again after this long, well before boto3 would let them run out.
_CREDENTIALS_MINUTES = 5
_CLIENTS = 256


class StoreError(UsageError, OSError):
    """An object store does not answer, or refuses; rooms that expect a disk to fail take it for an OSError."""


def may_pass(error: BaseException | None) -> bool:
    """Whether a disk or a store had a part in an error, so that it may not come back; no library is loaded for it."""
    while error is not None:
        libraries = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
        # zarrs has no class of its own for what the system told it.
        if isinstance(error, OSError) or "obstore" in libraries or "(os error " in str(error):
            return True
        error = error.__cause__
    return False


@lru_cache(maxsize=_CLIENTS)
def client_of(scheme: str, bucket: str, prefix: str = "") -> Any:
    """What speaks to a bucket or a web server, as if there were only what lies below ``prefix``; threads share it.

    Raises:
        UsageError: the library is not installed, or there are no credentials.
    """
    stores, url = library().store, f"{scheme}://{bucket}"
    # Only an endpoint that says so itself is spoken to without TLS.
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

    # boto3 knows every place that credentials are usually kept in: variables, profiles, roles of machines.
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
    """What the library raises where a right is missing."""
    exceptions = library().exceptions
    return exceptions.PermissionDeniedError, exceptions.UnauthenticatedError


@contextmanager
def asking(location: str) -> Iterator[None]:
    """Name what goes wrong with ``location``; FileNotFoundError stays one where it is the object that is missing."""
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
    """The error of a store, without the pages of details that its library gives."""
    from botocore.exceptions import BotoCoreError

    text = str(error)
    code = re.search(r"<Code>(\w+)</Code>", text)
    found = code[1] if code else f"{type(error).__name__}: {text.splitlines()[0] if text else ''}".partition("<?xml")[0]
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
    return StoreError(location, expected="an object store that answers", found=found, cause=cause, remedy=remedy)
