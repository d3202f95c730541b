"""The worker's cache of an object store: right bytes, one download, bounded size, and no trust in what lies there."""

import errno
import hashlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from service.blobs.errors import BlobDamagedError, BlobStoreAwayError
from service.blobs.store import BlobStore, content_key
from tests.s3_server import S3Server
from worker.cache import BlobCache

KIB = 1024


class CountingStore(BlobStore):
    """An object store in memory that counts downloads, and can hold each of them up."""

    def __init__(self, staging_dir: Path) -> None:
        super().__init__("memory:///", staging_dir=staging_dir)
        self.downloads: list[str] = []
        self.gate = threading.Event()
        self.gate.set()

    def open_range(self, key: str, *args: int, **kwargs: int) -> Iterator[bytes]:
        self.downloads.append(key)
        for block in super().open_range(key, *args, **kwargs):
            self.gate.wait(10)
            yield block


@pytest.fixture
def blobs(tmp_path: Path) -> CountingStore:
    return CountingStore(tmp_path / "staging")


@pytest.fixture
def work(tmp_path: Path) -> Path:
    directory = tmp_path / "work"
    directory.mkdir()
    return directory


def put(blobs: BlobStore, content: bytes, tmp_path: Path) -> tuple[str, str]:
    path = tmp_path / "to-be-stored"
    path.write_bytes(content)
    key, sha256, _ = blobs.put_content(path)
    return key, sha256


def cached_bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.iterdir())


def test_a_store_of_files_is_read_in_place(tmp_path: Path, work: Path) -> None:
    blobs = BlobStore((tmp_path / "blobs").as_uri())
    key, sha256 = put(blobs, b"model", tmp_path)
    cache = BlobCache(blobs, tmp_path / "cache", 10**6)
    assert cache.fetch(key, sha256, work) == blobs.local_path(key)
    assert not (tmp_path / "cache").exists()
    blobs.delete(key)
    with pytest.raises(FileNotFoundError):
        cache.fetch(key, sha256, work)


def test_the_second_fetch_downloads_nothing(blobs: CountingStore, tmp_path: Path, work: Path) -> None:
    content = os.urandom(9 * KIB * KIB)
    key, sha256 = put(blobs, content, tmp_path)
    for directory in (work, work, tmp_path):
        path = BlobCache(blobs, tmp_path / "cache", 10**8).fetch(key, sha256, directory)
        assert path.parent == directory
        assert path.read_bytes() == content
    assert blobs.downloads == [key]
    assert (work / sha256).samefile(tmp_path / "cache" / sha256)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [sha256]


def test_the_least_recently_used_files_make_room(blobs: CountingStore, tmp_path: Path, work: Path) -> None:
    cache = BlobCache(blobs, tmp_path / "cache", 30 * KIB)
    first, second, third, fourth = (put(blobs, os.urandom(10 * KIB), tmp_path) for _ in range(4))
    for key, sha256 in (first, second, third, first, fourth):
        cache.fetch(key, sha256, work)
        assert cached_bytes(tmp_path / "cache") <= 30 * KIB
    kept = {path.name for path in (tmp_path / "cache").iterdir()}
    assert kept == {sha256 for _, sha256 in (first, third, fourth)}
    assert (work / second[1]).stat().st_size == 10 * KIB, "a file in use was taken away"


def test_a_file_larger_than_the_cache_goes_past_it(blobs: CountingStore, tmp_path: Path, work: Path) -> None:
    cache = BlobCache(blobs, tmp_path / "cache", 10 * KIB)
    small, large = put(blobs, b"small", tmp_path), put(blobs, bytes(11 * KIB), tmp_path)
    cache.fetch(*small, work)
    assert cache.fetch(*large, work).stat().st_size == 11 * KIB
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [small[1]]


def test_what_need_not_be_kept_is_only_checked(blobs: CountingStore, tmp_path: Path, work: Path) -> None:
    key, sha256 = put(blobs, b"checkpoint", tmp_path)
    cache = BlobCache(blobs, tmp_path / "cache", 10**6)
    assert cache.fetch(key, sha256, work, keep=False).read_bytes() == b"checkpoint"
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("keep", [True, False])
def test_other_bytes_than_those_asked_for_are_refused(
    blobs: CountingStore, tmp_path: Path, work: Path, *, keep: bool
) -> None:
    key, found = put(blobs, b"other bytes", tmp_path)
    expected = hashlib.sha256(b"the bytes").hexdigest()
    with pytest.raises(BlobDamagedError) as caught:
        BlobCache(blobs, tmp_path / "cache", 10**6).fetch(key, expected, work, keep=keep)
    for said in (key, expected, found):
        assert said in str(caught.value)
    assert list(work.iterdir()) == list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("damage", ["flipped", "cut", "emptied"])
def test_a_cached_file_that_rotted_is_fetched_again(
    blobs: CountingStore, tmp_path: Path, work: Path, damage: str
) -> None:
    content = os.urandom(KIB)
    key, sha256 = put(blobs, content, tmp_path)
    cache = BlobCache(blobs, tmp_path / "cache", 10**6)
    cached = tmp_path / "cache" / sha256
    cache.fetch(key, sha256, tmp_path)
    cached.chmod(0o600)
    cached.write_bytes({"flipped": bytes([content[0] ^ 1]) + content[1:], "cut": content[:-1], "emptied": b""}[damage])
    assert cache.fetch(key, sha256, work).read_bytes() == content
    assert cached.read_bytes() == content
    assert len(blobs.downloads) == 2


def test_what_is_not_there_leaves_nothing(blobs: CountingStore, tmp_path: Path, work: Path) -> None:
    with pytest.raises(FileNotFoundError):
        BlobCache(blobs, tmp_path / "cache", 10**6).fetch(content_key("0" * 64), "0" * 64, work)
    assert list((tmp_path / "cache").iterdir()) == list(work.iterdir()) == []
    with pytest.raises(ValueError, match="64 hexadecimal"):
        BlobCache(blobs, tmp_path / "cache", 10**6).fetch(content_key("0" * 64), "../secret", work)


def test_two_attempts_download_once(blobs: CountingStore, tmp_path: Path) -> None:
    key, sha256 = put(blobs, b"model", tmp_path)
    blobs.gate.clear()

    def fetch(number: int) -> bytes:
        directory = tmp_path / f"work-{number}"
        directory.mkdir()
        return BlobCache(blobs, tmp_path / "cache", 10**6).fetch(key, sha256, directory).read_bytes()

    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(fetch, number) for number in range(4)]
        time.sleep(0.2)
        blobs.gate.set()
        assert [future.result(10) for future in futures] == [b"model"] * 4
    assert blobs.downloads == [key]


def test_a_stopped_download_is_not_waited_for(blobs: CountingStore, tmp_path: Path, work: Path) -> None:
    key, sha256 = put(blobs, b"model", tmp_path)
    blobs.gate.clear()
    with ThreadPoolExecutor(1) as pool:
        stopped = pool.submit(BlobCache(blobs, tmp_path / "cache", 10**6).fetch, key, sha256, tmp_path)
        while not blobs.downloads:
            time.sleep(0.01)
        other = BlobStore("memory:///", staging_dir=tmp_path / "staging")
        put(other, b"model", tmp_path)
        cache = BlobCache(other, tmp_path / "cache", 10**6, patience_seconds=0.2)
        assert cache.fetch(key, sha256, work).read_bytes() == b"model"
        blobs.gate.set()
        assert stopped.result(10).read_bytes() == b"model"
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [sha256]


@pytest.mark.parametrize("when", ["download", "wait"])
def test_whoever_is_canceled_stops_fetching(blobs: CountingStore, tmp_path: Path, work: Path, when: str) -> None:
    class CanceledError(Exception):
        pass

    def cancel() -> None:
        raise CanceledError

    key, sha256 = put(blobs, b"model", tmp_path)
    cache = BlobCache(blobs, tmp_path / "cache", 10**6)
    with ThreadPoolExecutor(1) as pool:
        if when == "wait":
            blobs.gate.clear()
            pool.submit(cache.fetch, key, sha256, tmp_path)
            while not blobs.downloads:
                time.sleep(0.01)
        with pytest.raises(CanceledError):
            cache.fetch(key, sha256, work, between_blocks=cancel)
        blobs.gate.set()
    assert list(work.iterdir()) == []


def test_leftovers_of_killed_workers_are_swept_and_running_downloads_are_not(
    blobs: CountingStore, tmp_path: Path, work: Path
) -> None:
    directory = tmp_path / "cache"
    directory.mkdir()
    for name in ("part-old", "part-young", "lock-old", "lock-young", "notes.txt"):
        (directory / name).write_bytes(bytes(KIB))
        if name.endswith("old"):
            os.utime(directory / name, (0, 0))
    key, sha256 = put(blobs, bytes(KIB), tmp_path)
    BlobCache(blobs, directory, 2 * KIB).fetch(key, sha256, work)
    assert {path.name for path in directory.iterdir()} == {"part-young", "lock-young", "notes.txt", sha256}
    key, sha256 = put(blobs, bytes(2 * KIB), tmp_path)
    BlobCache(blobs, directory, 2 * KIB).fetch(key, sha256, work)  # beside the other download there is no room for it
    assert not (directory / sha256).exists()


def test_a_cache_on_another_file_system_is_copied_from(
    blobs: CountingStore, tmp_path: Path, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(target: Path, source: Path) -> None:
        source.stat()
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    key, sha256 = put(blobs, b"model", tmp_path)
    for _ in range(2):
        path = BlobCache(blobs, tmp_path / "cache", 10**6).fetch(key, sha256, work)
        assert path.read_bytes() == b"model"
        assert not path.samefile(tmp_path / "cache" / sha256)
    assert blobs.downloads == [key]


def test_a_full_disk_takes_from_the_cache_first(
    blobs: CountingStore, tmp_path: Path, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = put(blobs, b"old", tmp_path), put(blobs, b"new", tmp_path)
    cache = BlobCache(blobs, tmp_path / "cache", 10**6)
    cache.fetch(*old, tmp_path)
    monkeypatch.setattr("worker.cache.shutil.disk_usage", lambda _: SimpleNamespace(free=0))
    cache.fetch(*new, work)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [new[1]]


_PROCESS = """
import contextlib, hashlib, random, sys
from pathlib import Path
from types import SimpleNamespace
from service.blobs.store import BlobStore, content_key
from worker.cache import BlobCache
url, home, seed, *hashes = sys.argv[1:]
work = Path(home) / f"work-{seed}"
work.mkdir()
cache = BlobCache(BlobStore(url, staging_dir=work / "staging"), Path(home) / "cache", 60_000)
generator = random.Random(int(seed))
def held():
    total = 0
    for entry in (Path(home) / "cache").glob("[0-9a-f]" * 64):
        with contextlib.suppress(FileNotFoundError):
            total += entry.stat().st_size
    return total
for _ in range(40):
    sha256 = generator.choice(hashes)
    path = cache.fetch(content_key(sha256), sha256, work)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == sha256
    assert min(held() for _ in range(3)) <= 60_000  # files come and go while they are counted
"""


def test_processes_share_a_cache_that_is_too_small_for_them(tmp_path: Path, s3_url: str) -> None:
    blobs = BlobStore(s3_url, staging_dir=tmp_path / "staging")
    hashes = [put(blobs, os.urandom(20_000), tmp_path)[1] for _ in range(6)]
    commands = [[sys.executable, "-c", _PROCESS, s3_url, str(tmp_path), str(seed), *hashes] for seed in range(3)]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    said = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], said
    assert all(path.name in hashes for path in (tmp_path / "cache").iterdir())
    assert cached_bytes(tmp_path / "cache") <= 60_000


def test_a_store_that_is_away_says_so_and_cached_files_need_no_store(
    tmp_path: Path, work: Path, s3_url: str, s3_server: S3Server
) -> None:
    blobs = BlobStore(s3_url, staging_dir=tmp_path / "staging", away_seconds=0.6)
    cached, other = put(blobs, b"cached", tmp_path), put(blobs, b"other", tmp_path)
    cache = BlobCache(blobs, tmp_path / "cache", 10**6)
    cache.fetch(*cached, tmp_path)
    with s3_server.away():
        assert cache.fetch(*cached, work).read_bytes() == b"cached"
        with pytest.raises(BlobStoreAwayError):
            cache.fetch(*other, work)
    assert cache.fetch(*other, work).read_bytes() == b"other"
