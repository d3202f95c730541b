"""What only an object store can do: be away, refuse, be full; and what its uploads cost."""

import http.server
import os
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest

from service.blobs.errors import BlobStoreAwayError
from service.blobs.remote import PART_BYTES, PARTS_MAX, client_options, part_bytes
from service.blobs.store import BlobStore, content_key
from service.contract.errors import ErrorCode, ProblemError

AWAY_SECONDS = 0.6
KEY = content_key("0" * 64)


@pytest.fixture
def store(s3_url, tmp_path):
    return BlobStore(s3_url, staging_dir=tmp_path / "staging", away_seconds=AWAY_SECONDS)


def uses(store, tmp_path):
    """Everything that asks the store something."""
    small, large = tmp_path / "small", tmp_path / "large"
    small.write_bytes(b"small")
    large.write_bytes(bytes(2 * PART_BYTES))
    return [
        lambda: store.size(KEY),
        lambda: store.exists(KEY),
        lambda: store.open_range(KEY),
        lambda: store.delete(KEY),
        lambda: store.delete_if_older(KEY, 0),
        lambda: list(store.keys_older_than(0)),
        lambda: store.put_content(small),
        lambda: store.put_content(large),
        store.check,
    ]


def test_a_silent_store_raises_in_time(store, s3_server, tmp_path):
    for use in uses(store, tmp_path):
        with s3_server.away():
            began = time.monotonic()
            with pytest.raises(BlobStoreAwayError, match=store.url):
                use()
            assert time.monotonic() - began < 2 * AWAY_SECONDS + 1
    store.check()


def test_a_store_that_goes_away_while_it_is_read(store, s3_server, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(17 * 1024**2))
    patient = BlobStore(store.url, staging_dir=tmp_path / "staging")  # a busy machine takes a while for so many bytes
    key, _, _ = patient.put_content(path)
    blocks = store.open_range(key)
    next(blocks)
    with s3_server.away(), pytest.raises(BlobStoreAwayError):
        list(blocks)
    assert len(b"".join(patient.open_range(key))) == 17 * 1024**2


def test_a_failed_upload_leaves_nothing_staged(store, s3_server):
    with store.writer(limit_bytes=10) as writer:
        writer.write(b"x")
        staged = writer.finish()
    with s3_server.away(), pytest.raises(BlobStoreAwayError):
        store.keep(staged)
    assert list(store._staging.iterdir()) == []


def test_a_bucket_that_is_not_there_is_no_missing_file(s3_url, tmp_path):
    store = BlobStore("s3://another-bucket/x", staging_dir=tmp_path, away_seconds=AWAY_SECONDS)
    path = tmp_path / "file"
    path.write_bytes(b"x")
    with pytest.raises(BlobStoreAwayError, match="404"):
        store.put_content(path)
    assert not store.probe()
    with pytest.raises(FileNotFoundError):
        store.put_content(tmp_path / "no such file")


@contextmanager
def server_answering(status):
    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self):
            self.rfile.read(int(self.headers.get("content-length", 0)))
            self.send_response(status)
            self.send_header("content-length", "0")
            self.end_headers()

        do_GET = do_HEAD = do_PUT = do_POST = answer

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_what_a_store_refuses_is_told(s3_url, tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"x")
    for status, error in ((403, BlobStoreAwayError), (401, BlobStoreAwayError), (507, ProblemError)):
        with server_answering(status) as endpoint:
            monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
            store = BlobStore(s3_url, staging_dir=tmp_path / "staging", away_seconds=AWAY_SECONDS)
            with pytest.raises(error) as caught:
                store.put_content(path)
            assert getattr(caught.value, "code", None) in {None, ErrorCode.STORAGE_FULL}
            assert not store.probe()


def test_a_closed_port_raises_in_time(s3_url, tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    store = BlobStore(s3_url, staging_dir=tmp_path, away_seconds=AWAY_SECONDS)
    with pytest.raises(BlobStoreAwayError):
        store.size(KEY)


def test_prefixes_keep_stores_apart(s3_url, tmp_path):
    first, second = (BlobStore(f"{s3_url}{end}", staging_dir=tmp_path / "staging") for end in ("/1", "/2/"))
    path = tmp_path / "file"
    path.write_bytes(b"x")
    key, _, _ = first.put_content(path)
    assert (first.exists(key), second.exists(key)) == (True, False)
    assert (list(first.keys_older_than(-60)), list(second.keys_older_than(-60))) == ([key], [])


def test_variables_that_name_how_to_reach_the_store(tmp_path):
    (tmp_path / "ca.pem").write_text("a certificate")
    plain = client_options({}, 30.0)
    assert set(plain) == {"connect_timeout", "timeout"}
    assert client_options({"AWS_ALLOW_HTTP": "true"}, 30.0)["allow_http"]
    assert client_options({"AWS_ENDPOINT_URL": "http://minio:9000"}, 30.0)["allow_http"]
    assert "allow_http" not in client_options({"AWS_ENDPOINT_URL": "https://minio:9000"}, 30.0)
    environment = {"AWS_CA_BUNDLE": str(tmp_path / "ca.pem"), "AWS_PROXY_URL": "http://proxy:3128"}
    said = client_options(environment, 30.0)
    assert (said["root_certificate"], said["proxy_url"]) == ("a certificate", "http://proxy:3128")


def test_no_upload_has_more_parts_than_s3_takes():
    assert part_bytes(0) == part_bytes(10**9) == PART_BYTES
    for file_bytes in (PARTS_MAX * PART_BYTES + 1, 10**12):
        assert file_bytes / part_bytes(file_bytes) <= PARTS_MAX


_MEASURE = """
import re, sys
from pathlib import Path
from service.blobs.store import BlobStore
store = BlobStore(sys.argv[1], staging_dir=Path(sys.argv[2]) / "staging")
store.check()
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
before = peak()
path = Path(sys.argv[2]) / "file"
key, _, _ = store.put_content(path)
with (Path(sys.argv[2]) / "copy").open("wb") as copy:
    copy.writelines(store.open_range(key))
print(peak() - before)
"""


def test_a_large_file_passes_through_little_memory(s3_url, tmp_path):
    with (tmp_path / "file").open("wb") as file:
        for _ in range(12):
            file.write(os.urandom(8 * 1024**2))
    command = [sys.executable, "-c", _MEASURE, s3_url, str(tmp_path)]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    assert int(said) < 64 * 1024, f"a file of 96 MiB took {said} KiB"
    print(f"peak grew by {said} KiB")
