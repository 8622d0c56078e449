"""s3://: a folder of a bucket, at Amazon or at anything that speaks its protocol (MinIO, Ceph, R2).

Owns the translation of S3's refusals into sentences, and that files of two versions are never taken for one model: each
is asked for by the entity tag that was listed, and the folder is listed again when all have come. An upload that stands
still for the whole of that time cannot be told from one that ended. Credentials, region and endpoint are boto3's own:
AWS_ACCESS_KEY_ID and its like, AWS_REGION, AWS_ENDPOINT_URL. Where there are no credentials, it asks without, as public
buckets allow.
"""

import hashlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import boto3
from boto3.s3.transfer import ProgressCallbackInvoker, TransferConfig, create_transfer_manager
from botocore import UNSIGNED
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionError,
    HTTPClientError,
    NoCredentialsError,
    PartialCredentialsError,
)
from s3transfer.exceptions import RetriesExceededError, S3DownloadFailedError
from s3transfer.futures import TransferFuture
from s3transfer.subscribers import BaseSubscriber

from gpumeter_worker.failure import MODEL_ACCESS_DENIED, MODEL_NOT_FOUND, StartupFailed, first_line
from gpumeter_worker.sources.location import Location
from gpumeter_worker.sources.progress import Progress
from gpumeter_worker.sources.remote import Damaged, RemoteFile, Snapshot, Unreachable
from gpumeter_worker.sources.wanted import wanted

T = TypeVar("T")

_PART_BYTES = 16 * 2**20
_PARALLEL = 8
_DENIED = ("AccessDenied", "403", "Forbidden", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken")
_PRECONDITION_FAILED = 412
_ABSENT = ("NoSuchBucket", "NoSuchKey", "404")


class _AsListed(BaseSubscriber):  # type: ignore[misc]
    """Has the library ask for the content that was listed, instead of looking what is there now."""

    def __init__(self, file: RemoteFile) -> None:
        self._file = file

    def on_queued(self, future: TransferFuture, **_: Any) -> None:
        """Called before the first request."""
        future.meta.provide_transfer_size(self._file.size)
        future.meta.provide_object_etag(self._file.tag)


class Bucket:
    """One folder of one bucket."""

    def __init__(self, location: Location, environment: Mapping[str, str]) -> None:
        self.uri = location.uri
        self.revision = ""
        self.resumed = ""
        self.pinned = ""
        self._bucket, _, key = location.uri.removeprefix("s3://").partition("/")
        self._folder = key.strip("/") + "/"
        self.allow_pickle = location.allow_pickle
        region = environment.get("AWS_REGION") or environment.get("AWS_DEFAULT_REGION") or "us-east-1"
        config = Config(connect_timeout=10, read_timeout=60, retries={"mode": "standard", "max_attempts": 3})
        session = boto3.Session(region_name=region)
        self._anonymous = session.get_credentials() is None
        if self._anonymous:
            config = config.merge(Config(signature_version=UNSIGNED))
        endpoint = environment.get("AWS_ENDPOINT_URL_S3") or environment.get("AWS_ENDPOINT_URL") or None
        self._client: Any = session.client("s3", config=config, endpoint_url=endpoint)
        self._at: str = self._client.meta.endpoint_url

    def look(self) -> Snapshot:
        """List the folder; the version is a hash of names, sizes and entity tags."""

        def ask() -> Snapshot:
            held: dict[str, tuple[int, str]] = {}
            for page in self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self._bucket, Prefix=self._folder
            ):
                for entry in page.get("Contents", []):
                    held[entry["Key"].removeprefix(self._folder)] = entry["Size"], entry["ETag"]
            names = wanted(held, allow_pickle=self.allow_pickle)
            if not names:
                raise StartupFailed(
                    MODEL_NOT_FOUND, f"{self.uri} holds no file of a model at {self._at}; correct spec.model.uri"
                )
            text = "\n".join(f"{name} {held[name][0]} {held[name][1]}" for name in names)
            files = tuple(RemoteFile(name, held[name][0], tag=held[name][1]) for name in names)
            version = hashlib.sha256(text.encode()).hexdigest()
            return Snapshot(version, sum(file.size for file in files), files)

        return self._translated(ask)

    def copy(self, snapshot: Snapshot, folder: Path, progress: Progress) -> None:
        """One file after the other, large ones in parts at a time; of small ones the library checks sums where the
        source keeps them."""
        for file in snapshot.files:
            target = folder / file.name
            if target.is_file() and target.stat().st_size == file.size:
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._translated(partial(self._get, file, target, progress))
            except StartupFailed as error:
                raise self._changed() if error.reason == MODEL_NOT_FOUND else error from None  # it was listed
        if self.look().version != snapshot.version:
            raise self._changed()

    def _get(self, file: RemoteFile, target: Path, progress: Progress) -> None:
        key = self._folder + file.name
        if file.size < _PART_BYTES:
            body = self._client.get_object(Bucket=self._bucket, Key=key, IfMatch=file.tag)["Body"].read()
            unfinished = target.with_name(f"{target.name}.incomplete")
            unfinished.write_bytes(body)
            unfinished.rename(target)
            progress.advance(len(body))
            return
        config = TransferConfig(
            multipart_chunksize=_PART_BYTES, multipart_threshold=_PART_BYTES, max_concurrency=_PARALLEL
        )
        with create_transfer_manager(self._client, config) as manager:
            listed = [_AsListed(file), ProgressCallbackInvoker(progress.advance)]
            manager.download(self._bucket, key, str(target), subscribers=listed).result()

    def _changed(self) -> Damaged:
        return Damaged(
            f"{self.uri} changed while it was fetched; wait until its upload has ended, and give every version of a "
            "model a folder of its own"
        )

    def elsewhere(self) -> None:
        """Nobody else keeps copies."""
        return None

    def _translated(self, ask: Callable[[], T]) -> T:
        try:
            return ask()
        except S3DownloadFailedError:
            raise self._changed() from None
        except ClientError as error:
            if error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") == _PRECONDITION_FAILED:
                raise self._changed() from None
            raise self._refused(error) from None
        except RetriesExceededError as error:
            raise Unreachable(
                f"{self._at} broke off again and again with {self.uri} ({first_line(error.last_exception)}); check the "
                "network"
            ) from None
        except (NoCredentialsError, PartialCredentialsError) as error:
            raise StartupFailed(
                MODEL_ACCESS_DENIED,
                f"{first_line(error)}; give both AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
            ) from None
        except (ConnectionError, HTTPClientError) as error:
            raise Unreachable(
                f"{self._at} cannot be reached for {self.uri} ({first_line(error)}); check AWS_ENDPOINT_URL"
            ) from None
        except BotoCoreError as error:
            raise Unreachable(f"{self.uri} cannot be fetched from {self._at} ({first_line(error)})") from None

    def _refused(self, error: ClientError) -> StartupFailed:
        code = str(error.response.get("Error", {}).get("Code", ""))
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        if code in _ABSENT or status == 404:
            return StartupFailed(
                MODEL_NOT_FOUND, f"{self._at} has no {self.uri} ({code}); correct spec.model.uri or AWS_ENDPOINT_URL"
            )
        if code in _DENIED or status in (401, 403):
            asked = (
                "without credentials, as it was given none" if self._anonymous else "with the credentials it was given"
            )
            return StartupFailed(
                MODEL_ACCESS_DENIED,
                f"{self._at} does not let this worker read {self.uri} {asked} ({code}); give AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY that may list and read it, from a Secret, in spec.template",
            )
        return Unreachable(
            f"{self._at} answered {status or code} for {self.uri} ({first_line(error)}); try again later"
        )
