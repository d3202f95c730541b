import asyncio
import errno
import hashlib
import os
import shutil
import threading

import pytest

from service.blobs.errors import BlobStoreAwayError
from service.blobs.opening import make_store, open_blobs
from service.blobs.store import BlobStore, checkpoint_key, content_key
from service.blobs.writer import AsyncBlobWriter
from service.contract.errors import ErrorCode, ProblemError
from service.contract.ids import JOB, new_id
from service.settings import Settings


@pytest.fixture
def disk(tmp_path):
    return BlobStore((tmp_path / "with space and %").as_uri())


@pytest.fixture(params=["disk", "memory", "s3"])
def store(request, tmp_path):
    """Each kind of store there is; what is asked of one is asked of all."""
    if request.param == "disk":
        return request.getfixturevalue("disk")
    url = "memory:///" if request.param == "memory" else request.getfixturevalue("s3_url")
    return BlobStore(url, staging_dir=tmp_path / "staging")


def stage(store, content, limit=10**9):
    with store.writer(limit_bytes=limit, what="model") as writer:
        writer.write(content)
        return writer.finish()


def staged_files(store):
    return list(store._staging.iterdir())


def read(store, key, *range_):
    return b"".join(store.open_range(key, *range_))


def test_a_kept_file_is_found_by_its_content(store):
    staged = stage(store, b"hello")
    key = store.keep(staged)
    assert staged.sha256 == hashlib.sha256(b"hello").hexdigest()
    assert key == content_key(staged.sha256)
    assert read(store, key) == b"hello"
    assert (store.local_path(key) is None) is (store.root is None)
    assert (store.exists(key), store.size(key)) == (True, 5)
    assert store.keep(stage(store, b"hello")) == key
    assert staged_files(store) == []


def test_ranges_are_read_in_blocks(store):
    content = os.urandom(10_000)
    key = store.keep(stage(store, content))
    assert b"".join(store.open_range(key)) == content
    assert b"".join(store.open_range(key, 100, 5000, block_bytes=7)) == content[100:5000]
    assert b"".join(store.open_range(key, 9_990, 99_999)) == content[9_990:]
    assert list(store.open_range(key, 20_000)) == []
    with pytest.raises(FileNotFoundError):
        store.open_range(content_key("0" * 64))


def test_a_file_over_the_limit_leaves_nothing(store):
    with pytest.raises(ProblemError) as caught:
        stage(store, b"12345", limit=4)
    assert caught.value.code is ErrorCode.TOO_LARGE
    assert "RANKPRESS_MAX_MODEL_BYTES" in caught.value.detail
    assert staged_files(store) == []


def test_a_full_disk_is_told_as_such(disk):
    class FullDisk:
        def write(self, block):
            raise OSError(errno.ENOSPC, "No space left on device")

        def close(self):
            pass

    def write():
        with disk.writer(limit_bytes=10) as writer:
            writer._file.close()
            writer._file = FullDisk()
            writer.write(b"x")

    with pytest.raises(ProblemError) as caught:
        write()
    assert caught.value.code is ErrorCode.STORAGE_FULL
    assert staged_files(disk) == []


def test_discard_is_for_what_was_refused(store):
    staged = stage(store, b"x")
    staged.discard()
    staged.discard()
    assert staged_files(store) == []


@pytest.mark.parametrize("key", ["../secret", "sha256/../../x", "/etc/passwd", "sha256/ab/short", "staging/x", ""])
def test_only_keys_of_our_own_making_are_read(store, key):
    for use in (store.local_path, store.exists, store.delete, store.open_range):
        with pytest.raises(ValueError, match="blob key"):
            use(key)
    with pytest.raises(ValueError, match="64 hexadecimal"):
        content_key(key)


@pytest.mark.parametrize("content", [b"", os.urandom(17 * 1024**2 + 3)], ids=["empty", "larger than a part"])
def test_files_of_any_size_come_back_whole(store, tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    key, _, size = store.put_content(tmp_path / "file")
    assert size == store.size(key) == len(content)
    assert read(store, key, 0, None) == content
    start = 8 * 1024**2 - 5  # over the border between two requests
    assert read(store, key, start, start + 10) == content[start : start + 10]
    assert staged_files(store) == []


@pytest.mark.parametrize("move", [True, False])
def test_checkpoints_are_stored_under_their_epoch(store, tmp_path, move):
    job_id = new_id(JOB)
    path = tmp_path / "state"
    path.write_bytes(b"state")
    key = checkpoint_key(job_id, 3, 17)
    assert key.startswith(f"checkpoints/{job_id}/3/17-")
    store.put_file(path, key, move=move)
    assert path.exists() is not move
    assert read(store, key, 0, None) == b"state"
    assert checkpoint_key(job_id, 3, 17) != key
    store.delete(key)
    store.delete(key)
    assert not store.exists(key)
    with pytest.raises(FileNotFoundError):
        store.size(key)


def test_put_content_returns_what_a_row_needs(store, tmp_path):
    path = tmp_path / "artifact"
    path.write_bytes(b"artifact")
    sha256 = hashlib.sha256(b"artifact").hexdigest()
    assert store.put_content(path) == (content_key(sha256), sha256, 8)


def test_old_keys_are_listed_and_young_ones_spared(store):
    kept = {store.keep(stage(store, text)) for text in (b"one", b"two")}
    stage(store, b"still staged")
    assert list(store.keys_older_than(60)) == []
    assert set(store.keys_older_than(-60)) == kept
    key = kept.pop()
    assert not store.delete_if_older(key, 60)
    assert store.delete_if_older(key, -60)
    assert not store.delete_if_older(key, -60)
    assert set(store.keys_older_than(-60)) == kept


def test_more_keys_than_a_page_are_listed(store, monkeypatch):
    monkeypatch.setattr("service.blobs.store._KEYS_OF_A_PAGE", 2)
    kept = {store.keep(stage(store, bytes([number]))) for number in range(5)}
    assert set(store.keys_older_than(-60)) == kept


def test_a_file_stored_again_is_young_again(disk):
    old = disk.keep(stage(disk, b"old"))
    os.utime(disk.local_path(old), (0, 0))
    assert list(disk.keys_older_than(60)) == [old]
    disk.keep(stage(disk, b"old"))
    assert not disk.delete_if_older(old, 60)
    os.utime(disk.local_path(old), (0, 0))
    assert disk.delete_if_older(old, 60)


def test_what_else_lies_in_the_store_is_not_listed(disk):
    (disk.root / "sha256").mkdir()
    (disk.root / "sha256" / "notes.txt").write_text("not ours")
    assert list(disk.keys_older_than(-60)) == []


def test_the_probe_writes_reads_and_deletes(store):
    store.check()
    assert store.probe()


def test_what_a_killed_probe_left_is_swept(disk):
    (disk.root / "probe").mkdir()
    (disk.root / "probe" / ("0" * 16)).touch()
    (left,) = disk.keys_older_than(-60)
    assert disk.delete_if_older(left, -60)
    assert list((disk.root / "probe").iterdir()) == []


def test_the_probe_tells_what_is_wrong(disk):
    (disk.root / "probe").write_text("in the way")
    assert not disk.probe()
    with pytest.raises(BlobStoreAwayError, match="probe"):
        disk.check()


def test_the_async_writer_hashes_in_order_with_bounded_blocks(disk):
    chunks = [os.urandom(size) for size in (1, 1000, 65_536, 3, 200_000, 0, 77)]
    sizes, threads = [], set()

    async def upload():
        writer = disk.writer(limit_bytes=10**9)
        write = writer.write

        def watched(block):
            sizes.append(len(block))
            threads.add(threading.get_ident())
            write(block)

        writer.write = watched
        async with AsyncBlobWriter(writer, block_bytes=50_000) as staged:
            for chunk in chunks:
                await staged.write(chunk)
            return await staged.finish()

    staged = asyncio.run(upload())
    assert staged.sha256 == hashlib.sha256(b"".join(chunks)).hexdigest()
    assert staged.bytes == sum(map(len, chunks)) == staged.path.stat().st_size
    assert max(sizes) < 50_000 + 200_001
    assert threading.get_ident() not in threads


@pytest.mark.parametrize("how", ["too large", "broken off", "canceled"])
def test_an_upload_that_ends_early_leaves_nothing(disk, how):
    async def upload():
        async with AsyncBlobWriter(disk.writer(limit_bytes=100), block_bytes=10) as writer:
            for _ in range(3):
                await writer.write(bytes(30))
            if how == "broken off":
                raise ConnectionResetError
            if how == "canceled":
                asyncio.current_task().cancel()
                await asyncio.sleep(1)
            await writer.write(bytes(30))
            await writer.finish()

    error = {"too large": ProblemError, "broken off": ConnectionResetError, "canceled": asyncio.CancelledError}[how]
    with pytest.raises(error):
        asyncio.run(upload())
    assert staged_files(disk) == []


@pytest.fixture
def shared(tmp_path):
    """A folder that machines share, made by the one that migrates, and opened by another."""
    settings = Settings(data_dir=tmp_path / "data", blob_url=(tmp_path / "shared").as_uri())
    with pytest.raises(BlobStoreAwayError, match="is it mounted"):
        open_blobs(settings)
    assert not (tmp_path / "shared").exists()
    assert make_store(settings)
    assert not make_store(settings)
    return open_blobs(settings)


@pytest.mark.parametrize("left", ["nothing", "an empty mount point"])
def test_a_folder_that_was_unmounted_is_away_and_no_file_is_missing(shared, tmp_path, left):
    key = shared.keep(stage(shared, b"kept"))
    (tmp_path / "file").write_bytes(b"more")
    shared.root.rename(tmp_path / "elsewhere")
    if left != "nothing":
        shared.root.mkdir()
    uses = [
        lambda: shared.size(key),
        lambda: shared.open_range(key),
        lambda: shared.delete(key),
        lambda: shared.delete_if_older(key, -60),
        lambda: list(shared.keys_older_than(-60)),
        lambda: shared.sweep_staging(0),
        lambda: shared.put_content(tmp_path / "file"),
        lambda: shared.put_content(tmp_path / "file", move=True),
        lambda: stage(shared, b"more"),
        shared.check,
    ]
    for use in uses:
        with pytest.raises(BlobStoreAwayError, match="is it mounted"):
            use()
    assert (tmp_path / "file").exists()
    assert not shared.root.exists() or list(shared.root.iterdir()) == []
    if left != "nothing":
        shared.root.rmdir()
    (tmp_path / "elsewhere").rename(shared.root)
    assert read(shared, key) == b"kept"


def test_the_store_in_the_data_directory_is_made_at_its_first_use(tmp_path):
    settings = Settings(data_dir=tmp_path)
    assert not make_store(settings)
    store = open_blobs(settings)
    store.check()
    shutil.rmtree(store.root)
    with pytest.raises(BlobStoreAwayError, match="expected the folder"):
        store.exists(content_key("0" * 64))
    assert not store.root.exists()


def test_an_object_store_needs_no_folder(tmp_path, s3_url):
    settings = Settings(data_dir=tmp_path, blob_url=s3_url)
    assert not make_store(settings)
    open_blobs(settings).check()
