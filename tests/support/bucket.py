"""An S3 server on loopback, which tests can tell to stumble, and what helps to look into its buckets."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

from cellseg_batch.engine.storage.paths import RemotePath, locate

SECRET = "a-key-that-nobody-may-see"
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "someone",
    "AWS_SECRET_ACCESS_KEY": SECRET,
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}
_ERROR = "<?xml version='1.0' encoding='UTF-8'?>\n<Error><Code>{0}</Code><Message>{0}</Message></Error>"


class Server:
    """The server; ``url`` is where it listens."""

    def __init__(self) -> None:
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._application = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True)
        self._numbers = count()
        self._fault = (0, "", "")
        self.url = f"http://127.0.0.1:{self._server.port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    @contextmanager
    def stumbling(self, every: int, status: str, code: str) -> Iterator[None]:
        """Answer each ``every``-th request with an error."""
        self._fault = (every, status, code)
        try:
            yield
        finally:
            self._fault = (0, "", "")

    def _answer(self, environ, start_response):
        every, status, code = self._fault
        if every and next(self._numbers) % every == every - 1:
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start_response(status, [("Content-Type", "application/xml")])
            return [_ERROR.format(code).encode()]
        return self._application(environ, start_response)


def upload(folder, bucket: RemotePath) -> RemotePath:
    """Copy a folder into a bucket, under its own name."""
    for path in folder.rglob("*"):
        if path.is_file():
            (bucket / folder.name / path.relative_to(folder).as_posix()).write(path.read_bytes())
    return bucket / folder.name


def download(place: RemotePath, folder) -> None:
    """Copy all that lies below ``place`` into a folder."""
    for path, _ in place.written():
        target = folder / path.relative_to(place).as_posix()
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())


def make_bucket(name: str) -> RemotePath:
    import boto3

    boto3.client("s3").create_bucket(Bucket=name)
    return locate(f"s3://{name}")
